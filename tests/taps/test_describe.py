"""What is said of a model's taps: found places, votes, classifier, and what else there is."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from shared.small_networks import SmallCNN, num_hooks, small_cnn, small_vit
from softlabels.taps import Classifier, describe_taps


def paths(survey) -> list[str]:
    return [finding.path for finding in survey.others]


def test_the_text_of_a_cnn():
    survey = describe_taps(timm.create_model("resnet18", num_classes=10), (3, 64, 64))

    assert (
        str(survey)
        == """\
ResNet, images of 3x64x64, 10 classes

middle      layer3  CNN stage, 4x4, 256 channels; read as the mean over positions
            - where the published runs of ResNet tapped: stage 2, counted from 0: the last but one
last        layer4  CNN stage, 2x2, 512 channels
votes       4 an image, each position through the model's own forward_head
classifier  fc      512 -> 10

also possible, with taps={'middle': PATH} or {'last': PATH}:
  conv1     map, 32x32, 64 channels
  layer1.0  CNN block, 16x16, 64 channels
  layer1.1  CNN block, 16x16, 64 channels
  layer1    CNN stage, 16x16, 64 channels
  layer2.0  CNN block, 8x8, 128 channels
  layer2.1  CNN block, 8x8, 128 channels
  layer2    CNN stage, 8x8, 128 channels
  layer3.0  CNN block, 4x4, 256 channels
  layer3.1  CNN block, 4x4, 256 channels
  layer4.0  CNN block, 2x2, 512 channels
  layer4.1  CNN block, 2x2, 512 channels"""
    )


def test_the_text_of_a_vit():
    assert (
        str(describe_taps(small_vit()))
        == """\
VisionTransformer, images of 3x16x16, 5 classes

middle      blocks.1  class token and 4x4 patch tokens, 24 channels; read as the class token
last        norm      class token and 4x4 patch tokens, 24 channels
votes       16 an image, each position through the model's own forward_head
            - the class token predicts: the task's loss trains no patch token, so that votes may \
mean little (the share that agrees is logged)
classifier  head      24 -> 5

also possible, with taps={'middle': PATH} or {'last': PATH}:
  patch_embed            4x4 patch tokens, 24 channels
  blocks.0 ... blocks.3  class token and 4x4 patch tokens, 24 channels (3 places)
  blocks                 class token and 4x4 patch tokens, 24 channels"""
    )


def test_the_text_of_a_plain_sequential():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )

    assert (
        str(describe_taps(model, (3, 32, 32)))
        == """\
Sequential, images of 3x32x32, 10 classes

middle      1  map, 32x32, 8 channels; read as the mean over positions
last        3  map, 16x16, 16 channels
votes       256 an image, each position through 4, 5, 6
classifier  6  16 -> 10

also possible, with taps={'middle': PATH} or {'last': PATH}:
  0  map, 32x32, 8 channels"""
    )


# What is said of a place


def test_a_place_that_is_not_the_published_one_is_told():
    model = timm.create_model("mobilenetv2_050", num_classes=10)

    (note,) = describe_taps(model, (3, 64, 64), {"middle": "blocks.4"}).middle.notes
    (usual,) = describe_taps(model, (3, 64, 64)).middle.notes

    assert note.startswith("the published runs of MobileNetV2 tapped blocks.6: the last block")
    assert usual.startswith("where the published runs of MobileNetV2 tapped: the last block")


def test_the_layer_norm_of_a_published_run_is_told():
    survey = describe_taps(torchvision.models.swin_t(num_classes=10), (3, 64, 64))

    assert survey.middle.text == (
        "stage with channels last, 4x4, 384 channels; read as the mean over positions after a "
        "LayerNorm of its own"
    )
    assert survey.classifier == Classifier("head", 768, 10)


def test_a_network_without_published_runs_has_no_note():
    assert describe_taps(small_cnn(), (3, 16, 16)).middle.notes == ()


def test_the_warning_of_the_rule_is_a_note(recwarn):
    model = torchvision.models.squeezenet1_1(num_classes=10)

    survey = describe_taps(model, (3, 64, 64))

    assert "no map at twice the final resolution (3, 3)" in survey.middle.notes[0]
    assert survey.classifier == Classifier("classifier.1", 512, 10)
    assert not recwarn.list


class WideHead(SmallCNN):
    """In timm's two halves, with a convolution over 3x3 positions in the head."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(16, 16, 3, padding=1)

    def forward_features(self, images: Tensor) -> Tensor:
        return self.stage2(self.stage1(self.stem(images)))

    def forward_head(self, feature: Tensor) -> Tensor:
        return self.fc(self.mix(feature).relu().mean((2, 3)))

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


def test_a_head_that_does_not_pool_first_is_told():
    (note,) = describe_taps(WideHead(), (3, 16, 16)).votes.notes

    assert "does not begin with a mean over positions" in note


def test_a_relu_that_no_module_shows_is_told():
    class FunctionalRelu(SmallCNN):
        def forward(self, images: Tensor) -> Tensor:
            feature = self.stage2[:2](self.stage1(self.stem(images)))
            return self.fc(self.pool(feature.relu()).flatten(1))

    survey = describe_taps(FunctionalRelu(), (3, 16, 16))

    assert survey.votes.text == "16 an image, each position through a ReLU, pool, fc"


# What else could be tapped


@pytest.mark.parametrize(
    ("library", "name", "expected"),
    [
        ("timm", "convnext_atto", {"stem", "stages.0", "stages.1.downsample", "stages.3.blocks.1"}),
        ("torchvision", "shufflenet_v2_x1_0", {"conv1", "stage2", "stage2.0", "stage4.3"}),
        (
            "torchvision",
            "regnet_x_1_6gf",
            {"stem", "trunk_output.block1", "trunk_output.block3.block3-9"},
        ),
        ("torchvision", "densenet121", {"features.conv0", "features.denseblock1"}),
    ],
)
def test_stages_and_blocks_are_listed_and_not_their_insides(library, name, expected):
    build = timm.create_model if library == "timm" else torchvision.models.get_model
    model = build(name, num_classes=10)
    survey = describe_taps(model, (3, 64, 64))

    listed = set(paths(survey))
    assert expected <= listed
    assert not listed & {survey.middle.path, survey.last.path, survey.classifier.path}
    insides = ("branch", ".f.", "conv_dw", ".mlp", "norm", "bn", "act", "relu")
    assert not [path for path in listed if any(inside in path for inside in insides)]


def test_what_is_listed_can_be_tapped():
    class Shared(SmallCNN):
        """One block that runs twice, and one that never does."""

        def __init__(self) -> None:
            super().__init__()
            self.twice = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))
            self.never = nn.Conv2d(8, 8, 1)

        def forward(self, images: Tensor) -> Tensor:
            feature = self.twice(self.twice(self.stem(images)))
            feature = self.stage2(self.stage1(feature))
            return self.fc(self.pool(feature).flatten(1))

    model = Shared()
    survey = describe_taps(model, (3, 16, 16))

    assert paths(survey) == ["stem"]
    for path in paths(survey):
        again = describe_taps(model, (3, 16, 16), {"middle": path})
        assert again.middle.path == path
        assert "stage1" in paths(again)


# Where something is not found


def test_what_is_not_found_has_its_reason():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 12), nn.ReLU(), nn.Linear(12, 5))

    survey = describe_taps(model, (3, 4, 4))

    assert survey.middle.point is survey.last.point is survey.votes.point is None
    assert survey.middle.text.startswith("found no last map or tokens in Sequential")
    assert survey.votes.text == "none without a last map"
    assert paths(survey) == ["1"]
    assert str(survey).endswith("1  vector, 12 channels")


def test_a_middle_alone_that_is_not_found_has_its_reason():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )

    survey = describe_taps(model, (3, 8, 8))

    assert "found no middle feature in Sequential" in survey.lines()[2]
    assert (survey.last.path, survey.votes.path) == ("0", "0")


def test_votes_alone_that_cannot_be_made_have_their_reason():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(36, 5)
    )

    survey = describe_taps(model, (3, 8, 8))

    assert (survey.middle.path, survey.last.path, survey.votes.path) == ("0", "2", "")
    assert "classifier that works at a single position" in survey.votes.text


def test_a_model_without_a_linear_classifier_says_so():
    class Cosine(SmallCNN):
        def __init__(self) -> None:
            super().__init__()
            self.prototypes = nn.Parameter(torch.randn(16, 5))

        def forward(self, images: Tensor) -> Tensor:
            feature = self.stage2(self.stage1(self.stem(images)))
            return self.pool(feature).flatten(1) @ self.prototypes

    survey = describe_taps(Cosine(), (3, 16, 16))

    assert survey.classifier is None
    assert "classifier  found no linear layer that gives the logits" in survey.lines()


# Errors, and what is left as it was


@pytest.mark.parametrize(
    ("model", "shape", "error", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), (3, 4, 4), ValueError, "nothing to tap in"),
        (small_cnn(), (1, 16, 16), ValueError, r"dry run of SmallCNN .* \(2, 1, 16, 16\) failed"),
        (small_cnn(), (3, 16), ValueError, r"must be \(channels, height, width\)"),
        (nn.Sequential(small_cnn(), nn.GRU(5, 3)), (3, 16, 16), ValueError, "must return logits"),
        ("resnet18", None, TypeError, "model must be an nn.Module, got str"),
    ],
)
def test_an_error_is_one_line(model, shape, error, message):
    with pytest.raises(error, match=message) as caught:
        describe_taps(model, shape)
    assert "\n" not in str(caught.value)


def test_an_override_that_names_no_module_is_an_error():
    with pytest.raises(ValueError, match=r"no module 'stagel'; near names: .*stage1"):
        describe_taps(small_cnn(), (3, 16, 16), {"middle": "stagel"})


def test_the_model_is_left_as_it_was():
    model = small_cnn().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}

    describe_taps(model, (3, 16, 16))

    assert num_hooks(model) == 0
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_survey_can_be_written_as_json():
    record = json.loads(json.dumps(asdict(describe_taps(small_cnn(), (3, 16, 16)))))

    assert record["middle"]["point"]["path"] == "stage1"
    assert record["classifier"] == {"path": "fc", "in_features": 16, "out_features": 5}
