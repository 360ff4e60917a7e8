"""Signals of further forwards, branches, forms of features, the teacher's layers and peers."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from shared.recording import Recording
from shared.small_networks import (
    IMAGE_SHAPE,
    NUM_CLASSES,
    hard_labels,
    images_of,
    num_hooks,
    small_cnn,
    small_vit,
)
from softlabels import Distiller, FeatureTap, KDLoss, Teacher, ZipfLSLoss
from softlabels.inputs import (
    AuxBranches,
    AuxLogits,
    Classifier,
    Features,
    FromBatch,
    Input,
    Logits,
    NormParameters,
    PeerLogits,
    SecondPass,
    Target,
    TeacherLogits,
    WeakLogits,
)
from softlabels.losses import KDCLLoss

SECOND = images_of(8)[4:]
PARTNER = images_of(12)[8:]


def distiller_of(student: nn.Module | None = None, /, **inputs: Input) -> Distiller:
    return Distiller(
        small_cnn().eval() if student is None else student,
        Recording(**inputs),
        example_shape=IMAGE_SHAPE,
    )


def values_of(distiller: Distiller, **extras: Tensor) -> Mapping[str, object]:
    """What its method is given for a batch."""
    distiller(images_of(), hard_labels(), **extras)
    return distiller.method.values


def tapped(model: nn.Module, path: str, images: Tensor) -> Tensor:
    with FeatureTap(model, [path]) as tap:
        model(images)
        return tap.pop()[path]


# Again: further images of the batch


def test_logits_of_further_images_are_those_of_a_forward_of_their_own():
    distiller = distiller_of(
        logits=Logits(),
        second=SecondPass(),
        partner=SecondPass("partner"),
        own=SecondPass("my_images"),
    )

    values = values_of(distiller, second_view=SECOND, partner=PARTNER, my_images=images_of())

    student = distiller.student
    torch.testing.assert_close(values["logits"], student(images_of()))
    torch.testing.assert_close(values["second"], student(SECOND))
    torch.testing.assert_close(values["partner"], student(PARTNER))
    torch.testing.assert_close(values["own"], values["logits"])
    assert all(value.requires_grad for value in values.values())


def test_features_of_further_images_are_read_in_their_forward():
    of_maps = Features(stages=("middle", "last"), form="map")
    distiller = distiller_of(
        plain=of_maps, second=SecondPass(of=of_maps), partner=SecondPass("partner")
    )

    values = values_of(distiller, second_view=SECOND, partner=PARTNER)

    for argument, images in (("plain", images_of()), ("second", SECOND)):
        for feature, path in zip(values[argument], ("stage1", "stage2"), strict=True):
            torch.testing.assert_close(feature, tapped(distiller.student, path, images))


@pytest.mark.parametrize("gradient", [True, False])
def test_a_further_forward_is_trained_through_or_not(gradient):
    distiller = distiller_of(second=SecondPass(gradient=gradient))
    step = distiller(images_of(), hard_labels(), second_view=SECOND)
    value = distiller.method.values["second"]

    assert value.requires_grad is gradient
    (found,) = torch.autograd.grad(
        step.terms["task"] + (step.terms["method"] if gradient else 0), distiller.student.fc.weight
    )
    student = distiller.student
    loss = nn.functional.cross_entropy(student(images_of()), hard_labels())
    if gradient:
        loss = loss + student(SECOND).square().mean()
    (expected,) = torch.autograd.grad(loss, student.fc.weight)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(value, student(SECOND))


def test_one_extra_may_be_read_with_and_without_gradient():
    distiller = distiller_of(
        a=SecondPass(), b=SecondPass(gradient=False), c=SecondPass(of=WeakLogits())
    )

    values = values_of(distiller, second_view=SECOND)

    assert values["a"].requires_grad
    assert not values["b"].requires_grad
    torch.testing.assert_close(values["a"], values["b"])
    assert values["c"].requires_grad
    assert distiller.extras == ("second_view",)


def test_no_forward_is_made_twice():
    calls = []
    student = small_cnn().eval()
    distiller = distiller_of(
        student,
        a=SecondPass(),
        b=SecondPass(of=WeakLogits()),
        c=SecondPass(of=Features()),
        d=WeakLogits(),
    )
    student.register_forward_hook(lambda *_: calls.append(1))

    values_of(distiller, second_view=SECOND)

    assert len(calls) == 2


def test_nothing_is_recorded_for_a_forward_of_the_student_alone():
    distiller = distiller_of(a=Features(), b=SecondPass(of=Features()))
    values_of(distiller, second_view=SECOND)

    for _ in range(2):
        distiller.student(images_of())
    values_of(distiller, second_view=SECOND)


@pytest.mark.parametrize("turned_round", [False, True])
@pytest.mark.parametrize("kind", [WeakLogits(), AuxLogits(("middle", "last")), AuxBranches()])
def test_learned_parts_are_the_same_for_further_images(kind, turned_round):
    inputs = {"plain": kind, "second": SecondPass(of=kind)}
    alone = distiller_of(plain=kind)
    distiller = distiller_of(**(dict(reversed(inputs.items())) if turned_round else inputs))
    torch.nn.Module.eval(distiller.trainable)

    # The same state, whatever else is read: learned parts are named after the plain argument.
    assert distiller.state_dict().keys() == alone.state_dict().keys()
    values = values_of(distiller, second_view=SECOND)
    for argument, images in (("plain", images_of()), ("second", SECOND)):
        alone.load_state_dict(distiller.state_dict())
        torch.nn.Module.eval(alone.trainable)
        alone(images, hard_labels())
        torch.testing.assert_close(values[argument], alone.method.values["plain"])


def test_a_head_that_only_further_images_need_is_named_after_their_argument():
    distiller = distiller_of(second=SecondPass(of=WeakLogits()))

    value = values_of(distiller, second_view=SECOND)["second"]

    pooled = tapped(distiller.student, "stage1", SECOND).mean((2, 3))
    head = distiller.trainable.providers["second"].fc
    torch.testing.assert_close(value, head(pooled))


def test_both_forwards_train_a_shared_head():
    distiller = distiller_of(plain=WeakLogits(), second=SecondPass(of=WeakLogits()))
    step = distiller(images_of(), hard_labels(), second_view=SECOND)
    head = distiller.trainable.providers["plain"].fc

    (found,) = torch.autograd.grad(step.terms["method"], head.weight)

    pooled = [tapped(distiller.student, "stage1", x).mean((2, 3)) for x in (images_of(), SECOND)]
    expected = sum(
        2 * (head(values) / head(values).numel()).T @ values for values in pooled
    ).detach()
    torch.testing.assert_close(found, expected)


def test_soft_labels_of_a_method_with_further_images():
    class WithLabels(Recording):
        def soft_labels(self, target: Tensor, **values: Tensor) -> object:
            return values["second"]

    distiller = Distiller(
        small_cnn().eval(), WithLabels(second=SecondPass()), example_shape=IMAGE_SHAPE
    )

    found = distiller.soft_labels(images_of(), hard_labels(), second_view=SECOND)

    torch.testing.assert_close(found, distiller.student(SECOND).detach())
    assert not found.requires_grad


def test_missing_images_are_an_error_that_names_them():
    distiller = distiller_of(second=SecondPass(), partner=SecondPass("partner"))

    with pytest.raises(
        ValueError,
        match=r"reads 'second_view' from the batch, got no extras: call distiller\(images, target, "
        r"second_view=\.\.\.\)",
    ):
        distiller(images_of(), hard_labels())
    with pytest.raises(ValueError, match="reads 'partner' from the batch, got index, second_view"):
        distiller(images_of(), hard_labels(), second_view=SECOND, index=torch.arange(4))


def test_extras_are_what_the_batch_must_bring_each_once():
    distiller = distiller_of(
        a=FromBatch("index"),
        b=SecondPass(),
        c=SecondPass(of=WeakLogits()),
        d=SecondPass("partner"),
        e=FromBatch("mixup_index"),
        f=FromBatch("index"),
        g=Target(),
    )

    assert distiller.extras == ("index", "second_view", "partner", "mixup_index")
    assert Distiller(small_cnn()).extras == ()
    assert Distiller(small_cnn(), ZipfLSLoss(), example_shape=IMAGE_SHAPE).extras == ()


def test_heads_are_built_with_and_given_what_further_images_give():
    class Doubling(nn.Module):
        def forward(self, values: Mapping[str, object]) -> dict[str, object]:
            return {"second": 2 * values["second"]}

    class WithHeads(Recording):
        def build_adapters(self, shapes: Mapping[str, object]) -> nn.Module:
            self.shapes = shapes
            return Doubling()

    method = WithHeads(
        second=SecondPass(), maps=SecondPass("partner", Features()), index=FromBatch()
    )
    distiller = Distiller(small_cnn().eval(), method, example_shape=IMAGE_SHAPE)
    distiller(
        images_of(), hard_labels(), second_view=SECOND, partner=PARTNER, index=torch.arange(4)
    )

    assert method.shapes == {"second": (2, NUM_CLASSES), "maps": [(2, 16, 4, 4)]}
    torch.testing.assert_close(method.values["second"], 2 * distiller.student(SECOND))
    assert torch.equal(method.values["index"], torch.arange(4))


def test_an_exported_student_keeps_nothing_of_it():
    distiller = distiller_of(second=SecondPass(of=Features()), partner=SecondPass("partner"))

    exported = distiller.export()

    assert num_hooks(exported) == 0
    assert exported.state_dict().keys() == small_cnn().state_dict().keys()


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [True, False])
def test_the_trained_module_with_further_images_compiles_to_one_graph(gradient):
    distiller = distiller_of(
        small_cnn(norm="group"),
        logits=Logits(),
        weak=WeakLogits(),
        second=SecondPass(of=WeakLogits(), gradient=gradient),
        branches=SecondPass("partner", AuxBranches()),
        maps=SecondPass(
            "partner", Features(stages=("stages",), form="map", before_activation=True)
        ),
    )
    distiller.eval()
    extras = {"second_view": SECOND, "partner": PARTNER}
    plain = distiller(images_of(), hard_labels(), **extras)
    expected = torch.autograd.grad(plain.loss, distiller.student.stem[0].weight)

    torch._dynamo.reset()
    distiller.trainable = torch.compile(distiller.trainable, backend="aot_eager", fullgraph=True)
    step = distiller(images_of(), hard_labels(), **extras)

    torch.testing.assert_close(step.loss, plain.loss)
    found = torch.autograd.grad(step.loss, distiller.student.stem[0].weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# Branches


@pytest.mark.parametrize(
    ("make", "stages", "last"),
    [
        (small_cnn, ("stages",), (4, 16, 4, 4)),
        (small_vit, ("block:0", "block:2"), (4, 24, 4, 4)),
    ],
)
def test_branches_give_logits_then_maps(make, stages, last):
    distiller = distiller_of(make().eval(), exits=AuxBranches(stages))
    distiller.eval()

    values = values_of(distiller)["exits"]

    assert [tuple(v.shape) for v in values] == [(4, 5)] * 2 + [last] * 2
    branches = distiller.trainable.providers["exits"].branches
    for branch, logits, reached in zip(branches, values[:2], values[2:], strict=True):
        torch.testing.assert_close(logits, branch.fc(reached.mean((2, 3))))
    if make is small_cnn:
        for branch, path, reached in zip(branches, ("stem", "stage1"), values[2:], strict=True):
            torch.testing.assert_close(
                reached, branch.blocks(tapped(distiller.student, path, images_of()))
            )


def test_branches_are_trained_and_stored_and_not_exported():
    distiller = distiller_of(small_cnn(), exits=AuxBranches(stages=("stage1", "last")))

    distiller(images_of(), hard_labels()).loss.backward()

    names = [name for name, _ in distiller.named_parameters() if ".branches." in name]
    assert {name.split(".")[4] for name in names} == {"0"}  # the last map is no exit
    assert all(p.grad.any() for name, p in distiller.named_parameters() if name in names)
    assert {*names} <= distiller.state_dict().keys()
    assert not any("branch" in name for name in distiller.export().state_dict())
    with pytest.raises(ValueError, match=r"exits need a place before the last map \('stage2'\)"):
        distiller_of(exits=AuxBranches(stages=("last",)))


# Forms of features


@pytest.mark.parametrize("form", ["raw", "map", "pooled"])
def test_forms_of_a_map(form):
    distiller = distiller_of(features=Features(stages=("stages",), form=form))

    values = values_of(distiller)["features"]

    for value, path in zip(values, ("stem", "stage1", "stage2"), strict=True):
        feature = tapped(distiller.student, path, images_of())
        torch.testing.assert_close(value, feature.mean((2, 3)) if form == "pooled" else feature)


@pytest.mark.parametrize("form", ["raw", "map", "pooled"])
def test_forms_of_tokens(form):
    student = small_vit().eval()
    values = values_of(distiller_of(student, f=Features(stages=("block:1", "last"), form=form)))

    tokens = tapped(student, "blocks.1", images_of())
    expected = {
        "raw": tokens,
        "map": torch.stack([tokens[:, 1 + k] for k in range(16)], 2).view(4, 24, 4, 4),
        "pooled": tokens[:, 0],
    }[form]
    torch.testing.assert_close(values["f"][0], expected)
    assert len(values["f"]) == 2


def test_forms_of_a_map_with_channels_last():
    class Last(nn.Module):
        """A convolution that gives [B, H, W, D]."""

        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 6, 2, 2)

        def forward(self, images: Tensor) -> Tensor:
            return self.convolution(images).permute(0, 2, 3, 1)

    class Pooled(nn.Module):
        def forward(self, maps: Tensor) -> Tensor:
            return maps.mean((1, 2))

    student = nn.Sequential(Last(), Pooled(), nn.Linear(6, NUM_CLASSES))
    values = values_of(
        distiller_of(
            student, raw=Features(), map=Features(form="map"), pooled=Features(form="pooled")
        )
    )

    raw = student[0](images_of())
    assert tuple(raw.shape) == (4, 8, 8, 6)
    torch.testing.assert_close(values["raw"], [raw])
    torch.testing.assert_close(values["map"], [raw.permute(0, 3, 1, 2)])
    torch.testing.assert_close(values["pooled"], [raw.mean((1, 2))])


@pytest.mark.parametrize("of", ["student", "teacher"])
def test_a_place_without_a_grid_gives_no_map(of):
    teacher = small_cnn(seed=1) if of == "teacher" else None

    with pytest.raises(
        ValueError,
        match=rf"needs maps with rows and columns, but 'fc' of the {of} gives a feature of kind "
        "'vector' without a grid",
    ):
        Distiller(
            small_cnn(),
            Recording(f=Features(of=of, stages=("fc",), form="map")),
            teacher=teacher,
            example_shape=IMAGE_SHAPE,
        )


def test_before_the_activation_of_the_teacher():
    teacher = Teacher(small_cnn(seed=1))
    method = Recording(f=Features("teacher", ("stage1",), "map", True), g=Features("teacher"))
    distiller = Distiller(small_cnn(), method, teacher=teacher, example_shape=IMAGE_SHAPE)

    values = values_of(distiller)

    model = teacher.model
    before = model.stage1[1](model.stage1[0](model.stem(images_of())))
    torch.testing.assert_close(values["f"], [before])
    torch.testing.assert_close(values["g"], [model.stage2(before.relu())])
    assert not any(t.requires_grad for t in (*values["f"], *values["g"]))


# The teacher's layers


def with_norms(seed: int = 1, num_classes: int = NUM_CLASSES) -> nn.Module:
    model = small_cnn(num_classes, seed=seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return model


def test_norm_parameters_are_scale_and_shift_of_each_stage():
    model = with_norms()
    method = Recording(all=NormParameters(), last=NormParameters(stages=("last",)))
    distiller = Distiller(small_cnn(), method, teacher=model, example_shape=IMAGE_SHAPE)

    values = values_of(distiller)

    norms = [model.stem[1], model.stage1[1], model.stage2[1]]
    assert [tuple(value.shape) for value in values["all"]] == [(2, 8), (2, 12), (2, 16)]
    for value, norm in zip(values["all"], norms, strict=True):
        assert torch.equal(value[0], norm.weight)
        assert torch.equal(value[1], norm.bias)
        assert not value.requires_grad
    assert torch.equal(values["last"][0], values["all"][2])


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (small_vit(), "needs a BatchNorm .* of VisionTransformer, found none"),
        (small_cnn(norm="group"), "needs a BatchNorm .* of SmallCNN, found none"),
    ],
)
def test_a_teacher_without_norms_has_no_norm_parameters(teacher, message):
    with pytest.raises(ValueError, match=message):
        Distiller(
            small_cnn(), Recording(n=NormParameters()), teacher=teacher, example_shape=IMAGE_SHAPE
        )


def test_the_teachers_classifier_makes_its_logits():
    method = Recording(classifier=Classifier(), pooled=Features("teacher", form="pooled"),
                       logits=TeacherLogits())  # fmt: skip
    distiller = Distiller(small_cnn(), method, teacher=small_cnn(seed=1), example_shape=IMAGE_SHAPE)

    values = values_of(distiller)

    weight, bias = values["classifier"]
    assert (tuple(weight.shape), tuple(bias.shape)) == ((NUM_CLASSES, 16), (NUM_CLASSES,))
    torch.testing.assert_close(values["pooled"][0] @ weight.T + bias, values["logits"])
    assert not weight.requires_grad


def test_rows_of_the_classifier_are_in_the_students_order():
    class_map = [6, 0, 3, 3, 5]
    teacher = Teacher(small_cnn(7, seed=1), class_map=class_map)
    method = Recording(classifier=Classifier(), pooled=Features("teacher", form="pooled"),
                       logits=TeacherLogits())  # fmt: skip
    values = values_of(Distiller(small_cnn(), method, teacher=teacher, example_shape=IMAGE_SHAPE))

    weight, bias = values["classifier"]
    assert torch.equal(weight, teacher.model.fc.weight[class_map])
    assert torch.equal(bias, teacher.model.fc.bias[class_map])
    torch.testing.assert_close(values["pooled"][0] @ weight.T + bias, values["logits"])


def test_a_classifier_without_bias_has_one_of_zeros():
    model = small_cnn(seed=1)
    model.fc = nn.Linear(16, NUM_CLASSES, bias=False)
    distiller = Distiller(
        small_cnn(), Recording(c=Classifier()), teacher=model, example_shape=IMAGE_SHAPE
    )

    weight, bias = values_of(distiller)["c"]

    assert torch.equal(weight, model.fc.weight)
    assert torch.equal(bias, torch.zeros(NUM_CLASSES))


def test_what_is_read_of_the_teachers_layers_is_what_they_hold_now():
    """Not a copy from the time when the distiller was made, as before a move to a device."""
    model = with_norms()
    method = Recording(c=Classifier(), n=NormParameters())
    distiller = Distiller(small_cnn(), method, teacher=model, example_shape=IMAGE_SHAPE).double()

    distiller(images_of().double(), hard_labels())

    assert {t.dtype for t in (*method.values["c"], *method.values["n"])} == {torch.float64}


def test_logits_of_another_network_have_no_classifier():
    model = nn.Sequential(nn.Conv2d(3, NUM_CLASSES, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    with pytest.raises(ValueError, match="needs a linear classifier at the end of Sequential"):
        Distiller(small_cnn(), Recording(c=Classifier()), teacher=model, example_shape=IMAGE_SHAPE)


# A peer


def peers() -> Distiller:
    return Distiller(
        small_cnn(norm="group"),
        Recording(logits=Logits(), peer_logits=PeerLogits()),
        peer=small_cnn(norm="group", seed=5),
        example_shape=IMAGE_SHAPE,
    )


def test_logits_of_a_peer_are_its_own_and_train_it():
    distiller = peers()
    peer = distiller.trainable.peer

    distiller(images_of(), hard_labels()).loss.backward()

    values = distiller.method.values
    torch.testing.assert_close(values["peer_logits"], peer(images_of()))
    torch.testing.assert_close(values["logits"], distiller.student(images_of()))
    assert not torch.equal(values["logits"], values["peer_logits"])
    assert all(parameter.grad.any() for parameter in peer.parameters())
    own = copy.deepcopy(peer)
    own.zero_grad()
    own(images_of()).square().mean().backward()
    torch.testing.assert_close(peer.fc.weight.grad, own.fc.weight.grad)


def test_a_peer_is_trained_and_stored_and_not_exported():
    distiller = peers()
    trained = {name for name, _ in distiller.named_parameters()}
    of_peer = {f"trainable.peer.{name}" for name in small_cnn(norm="group").state_dict()}

    assert of_peer <= trained
    assert of_peer <= distiller.state_dict().keys()
    assert distiller.export().state_dict().keys() == small_cnn(norm="group").state_dict().keys()
    other = peers()
    with torch.no_grad():
        other.trainable.peer.fc.weight.zero_()
    distiller.load_state_dict(other.state_dict())
    assert not distiller.trainable.peer.fc.weight.any()


def test_a_peer_follows_the_students_mode_and_dtype():
    distiller = Distiller(
        small_cnn().eval().double(), KDCLLoss(), peer=small_cnn(seed=5), example_shape=IMAGE_SHAPE
    )
    peer = distiller.trainable.peer

    assert not peer.training
    distiller.train()
    assert peer.training
    distiller.eval()
    assert not any(module.training for module in peer.modules())
    distiller.double()
    assert distiller(images_of().double(), hard_labels()).loss.isfinite()


# Superfluous and missing networks


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        (KDLoss(), (), r"KDLoss reads from a teacher: pass teacher=Teacher\(model\)"),
        (Recording(c=Classifier()), (), "Recording reads from a teacher"),
        (Recording(n=NormParameters()), (), "Recording reads from a teacher"),
        (KDCLLoss(), (), "KDCLLoss reads from a peer: pass peer=network"),
        (KDCLLoss(), ("teacher", "peer"), "KDCLLoss reads from no teacher, but one is given"),
        (KDLoss(), ("teacher", "peer"), "KDLoss reads from no peer, but one is given: leave it"),
        (None, ("teacher",), "training without a method reads from no teacher, but one is given"),
        (None, ("peer",), "training without a method reads from no peer, but one is given"),
        (ZipfLSLoss(), ("teacher",), "ZipfLSLoss reads from no teacher, but one is given"),
    ],
)
def test_a_network_that_is_missing_or_superfluous(method, given, message):
    networks = {name: small_cnn(seed=3 + k) for k, name in enumerate(given)}

    with pytest.raises(ValueError, match=message):
        Distiller(small_cnn(), method, example_shape=IMAGE_SHAPE, **networks)


@pytest.mark.parametrize(("name", "method"), [("teacher", KDLoss()), ("peer", KDCLLoss())])
def test_a_network_that_is_the_student_itself(name, method):
    student = small_cnn()

    with pytest.raises(ValueError, match=f"{name} and student share parameters: pass a copy as"):
        Distiller(student, method, example_shape=IMAGE_SHAPE, **{name: student})
