"""The signals that a method may read, each as the distiller provides it."""

from __future__ import annotations

import copy
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from shared.recording import Recording
from shared.small_networks import (
    IMAGE_SHAPE,
    NUM_CLASSES,
    hard_labels,
    images_of,
    mixed_labels,
    small_cnn,
    small_vit,
)
from shared.toy_method import ToyAdapters, ToyLoss
from softlabels import Distiller, FeatureTap, NKDLoss, Teacher, ZipfLSLoss
from softlabels.distill.external_inputs import external_values
from softlabels.inputs import (
    Features,
    FromBatch,
    Input,
    Logits,
    Target,
    TeacherLogits,
    Votes,
    WeakLogits,
)
from softlabels.losses import Method


def provided(
    kind: Input, student: nn.Module, target: Tensor | None = None, **extras: Tensor
) -> object:
    """What a method that reads the signal is given for a batch."""
    method = Recording(value=kind)
    distiller = Distiller(student, method, example_shape=IMAGE_SHAPE)
    distiller(images_of(), hard_labels() if target is None else target, **extras)
    return method.values["value"]


# Signals of the student and of the batch


def test_logits_are_the_students():
    student = small_cnn().eval()

    torch.testing.assert_close(provided(Logits(), student), student(images_of()))


@pytest.mark.parametrize("target", [hard_labels(), mixed_labels()])
def test_the_target_is_the_batchs_as_it_came(target):
    assert provided(Target(), small_cnn(), target) is target


@pytest.mark.parametrize(
    ("tap", "path", "width"),
    [("middle", "stage1", 12), ("last", "stage2", 16), ("stem.0", "stem.0", 8)],
)
def test_weak_logits_are_a_linear_head_on_the_pooled_feature(tap, path, width):
    student = small_cnn().eval()
    method = Recording(value=WeakLogits(tap=tap))
    distiller = Distiller(student, method, example_shape=IMAGE_SHAPE)
    distiller(images_of(), hard_labels())
    weight, bias = (
        distiller.state_dict()[f"trainable.providers.value.fc.{name}"]
        for name in ("weight", "bias")
    )

    with FeatureTap(student, [path]) as extra:
        student(images_of())
        pooled = extra.pop()[path].mean((2, 3))

    assert weight.shape == (NUM_CLASSES, width)
    torch.testing.assert_close(method.values["value"], pooled @ weight.T + bias)


def test_weak_logits_of_a_vit_read_the_class_token():
    student = small_vit().eval()
    method = Recording(value=WeakLogits())
    distiller = Distiller(student, method)
    with FeatureTap(student, ["blocks.1"]) as tap:
        distiller(images_of(), hard_labels())
        class_token = tap.pop()["blocks.1"][:, 0]

    head = distiller.trainable.get_submodule("providers.value")
    torch.testing.assert_close(method.values["value"], head.fc(class_token))


def test_features_come_in_the_order_of_their_stages():
    student = small_cnn().eval()
    stages = ("last", "stem.0", "middle", "fc")

    features = provided(Features(stages=stages), student)

    with FeatureTap(student, ["stage2", "stem.0", "stage1", "fc"]) as tap:
        student(images_of())
        expected = list(tap.pop().values())
    assert [tuple(f.shape) for f in features] == [
        (4, 16, 4, 4),
        (4, 8, 16, 16),
        (4, 12, 8, 8),
        (4, NUM_CLASSES),
    ]
    for feature, wanted in zip(features, expected, strict=True):
        torch.testing.assert_close(feature, wanted)
        assert feature.requires_grad


@pytest.mark.parametrize(("upsample", "num_votes"), [(1, 16), (2, 64)])
def test_votes_come_from_the_students_own_classifier(upsample, num_votes):
    student = small_cnn().eval()

    votes = provided(Votes(upsample=upsample), student)

    maps = student.stage2(student.stage1(student.stem(images_of())))
    if upsample == 2:
        maps = nn.functional.interpolate(maps, scale_factor=2, mode="bilinear")
    logits = torch.einsum("bdhw,cd->bhwc", maps, student.fc.weight) + student.fc.bias
    assert torch.equal(votes, logits.argmax(3).flatten(1))
    assert votes.shape == (4, num_votes)


@pytest.mark.parametrize("name", ["index", "epoch"])
def test_an_extra_of_the_batch_comes_by_its_name(name):
    extra = torch.arange(4)

    assert provided(FromBatch(name), small_cnn(), **{name: extra}) is extra


def test_a_missing_extra_is_an_error_that_says_how_to_pass_it():
    distiller = Distiller(small_cnn(), Recording(value=FromBatch("index")))

    with pytest.raises(
        ValueError,
        match=r"reads 'index' from the batch, got no extras: call distiller\(images, target, "
        r"index=\.\.\.\)",
    ):
        distiller(images_of(), hard_labels())
    with pytest.raises(ValueError, match="reads 'index' from the batch, got epoch, idx: call"):
        distiller(images_of(), hard_labels(), idx=torch.arange(4), epoch=torch.tensor(1))


def test_extras_that_no_method_reads_do_no_harm():
    distiller = Distiller(small_cnn())

    assert distiller(images_of(), hard_labels(), index=torch.arange(4)).loss.isfinite()


def test_a_wrong_path_in_a_signal_is_an_error_that_lists_near_names():
    for kind in (WeakLogits(tap="stage11"), Features(stages=("middle", "stage11"))):
        with pytest.raises(ValueError, match=r"no module 'stage11'; near names: .*stage1"):
            Distiller(small_cnn(), Recording(value=kind), example_shape=IMAGE_SHAPE)


def test_a_signal_costs_no_dry_run_unless_it_needs_one():
    def layout() -> None:
        raise AssertionError("a dry run")

    for kind in (Logits(), TeacherLogits()):
        kind.provider(layout)
    for kind in (WeakLogits(), Votes(), Features(), Features(of="teacher")):
        with pytest.raises(AssertionError, match="a dry run"):
            kind.provider(layout)


# Whether the votes agree


def test_votes_of_a_class_token_report_how_many_agree_with_the_prediction():
    student = small_vit().double().eval()
    images = images_of(16).double()
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():  # a fresh head votes for one class everywhere
        student.head.weight.normal_(generator=generator)
        student.head.bias -= student.head(student.forward_features(images)).mean((0, 1))
    distiller = Distiller(student, ZipfLSLoss())

    step = distiller(images, hard_labels(16))

    votes = student.head(student.forward_features(images)[:, 1:]).argmax(2)
    majority = torch.stack([row.bincount(minlength=NUM_CLASSES).argmax() for row in votes])
    expected, of_first_votes = (
        (of_votes == step.logits.argmax(1)).double().mean() for of_votes in (majority, votes[:, 0])
    )
    assert expected not in (0, 1, of_first_votes)
    torch.testing.assert_close(step.monitored["votes_agree"].double(), expected)


def test_votes_of_a_map_report_nothing():
    step = Distiller(small_cnn(), ZipfLSLoss(), example_shape=IMAGE_SHAPE)(
        images_of(), hard_labels()
    )

    assert not step.monitored


# Signals of the teacher


class CountingTeacher(Teacher):
    calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(images)


def test_the_teacher_runs_once_for_all_that_is_read_from_it():
    teacher = CountingTeacher(small_cnn(seed=1))
    method = Recording(value=TeacherLogits(), more=Features(of="teacher", stages=("stem", "last")))
    distiller = Distiller(small_cnn(), method, teacher=teacher)
    teacher.calls = 0

    distiller(images_of(), hard_labels())

    assert teacher.calls == 1
    torch.testing.assert_close(method.values["value"], teacher.model(images_of()))
    stem, last = method.values["more"]
    torch.testing.assert_close(stem, teacher.model.stem(images_of()))
    assert last.shape == (4, 16, 4, 4)
    for value in (method.values["value"], last, stem):
        assert not value.requires_grad
        assert not value.is_inference()


def test_features_of_the_teacher_are_of_its_own_input():
    """The teacher sees larger images, normalized its own way, and of three channels."""
    method = Recording(value=Features(of="teacher", stages=("middle",)))
    teacher = Teacher(
        small_cnn(seed=1),
        input_size=32,
        normalization=((0.5, 0.4, 0.3), (0.2, 0.2, 0.2)),
        student_normalization=((0.5,), (0.25,)),
    )
    distiller = Distiller(small_cnn(channels=1), method, teacher=teacher, example_shape=(1, 16, 16))
    images = images_of(4, (1, 16, 16))

    distiller(images, hard_labels())

    model = teacher.model
    expected = model.stage1(model.stem(teacher.prepared(images)))
    assert expected.shape == (4, 12, 16, 16)
    torch.testing.assert_close(method.values["value"][0], expected)


def test_the_teacher_may_be_used_elsewhere_between_two_steps():
    teacher = Teacher(small_cnn(seed=1))
    method = Recording(value=Features(of="teacher"))
    distiller = Distiller(small_cnn(), method, teacher=teacher)

    for _ in range(2):
        distiller(images_of(), hard_labels())
        teacher(images_of(8))
        teacher(images_of(8))

    assert method.values["value"][0].shape[0] == 4


def test_two_distillers_may_share_a_teacher_and_a_student():
    student, teacher = small_cnn(norm="group"), Teacher(small_cnn(seed=1))
    method = Recording(value=Features(), more=Features(of="teacher"))
    first = Distiller(student, method, teacher=teacher, example_shape=IMAGE_SHAPE)
    second = Distiller(student, copy.copy(method), teacher=teacher, example_shape=IMAGE_SHAPE)

    losses = [d(images_of(), hard_labels()).loss.detach() for d in (first, second, first)]

    assert len({float(loss) for loss in losses}) == 1


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (TeacherLogits(), True),
        (Features(of="teacher"), True),
        (Features(), False),
        (Logits(), False),
        (Votes(), False),
        (FromBatch("teacher"), False),
    ],
)
def test_which_signals_need_a_teacher(kind, expected):
    assert kind.reads_teacher is expected
    if expected:
        with pytest.raises(ValueError, match=r"Recording reads from a teacher: pass teacher=Tea"):
            Distiller(small_cnn(), Recording(value=kind), example_shape=IMAGE_SHAPE)


def test_given_values_are_those_that_do_not_come_from_the_student():
    target, index, logits = hard_labels(), torch.arange(4), torch.zeros(4, NUM_CLASSES)
    inputs = {
        "a": Logits(),
        "b": Target(),
        "c": FromBatch("index"),
        "d": TeacherLogits(),
        "e": Votes(),
    }

    values, _ = external_values(inputs, target, {"index": index}, {TeacherLogits(): logits})

    assert values.keys() == {"b", "c", "d"}
    assert values["b"] is target
    assert values["c"] is index
    assert values["d"] is logits


# A method of one file: two stages, a learned head, a memory by sample index


def toy_distiller(**settings: object) -> Distiller:
    student = small_cnn(norm="group")  # the same in training and in eval mode
    return Distiller(student, ToyLoss(**settings), example_shape=IMAGE_SHAPE)


def test_the_toys_heads_are_built_from_the_shapes_of_its_signals():
    distiller = toy_distiller()

    assert distiller.method.built_from == {"features": [(2, 12, 8, 8), (2, 16, 4, 4)]}
    heads = distiller.trainable.adapters
    assert isinstance(heads, ToyAdapters)
    assert [layer.in_features for layer in heads.projections] == [12, 16]


def test_the_toy_trains_its_heads_and_the_student():
    distiller = toy_distiller()
    optimizer = torch.optim.SGD(distiller.parameters(), 0.1)
    before = copy.deepcopy(distiller.state_dict())

    losses = []
    for _ in range(5):
        step = distiller(images_of(), hard_labels(), index=torch.arange(4))
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        losses.append(float(step.terms["method"].detach()))

    after = distiller.state_dict()
    for name, parameter in distiller.named_parameters():
        assert parameter.grad.any(), name
        assert not torch.equal(before[name], after[name]), name
    assert losses[-1] < losses[0]


def test_the_toy_remembers_samples_after_a_step_and_counts_epochs():
    distiller = toy_distiller()
    heads = distiller.trainable.adapters
    index = torch.tensor([7, 2, 0, 5])

    distiller.after_step()  # nothing was seen yet
    assert not heads.memory.any()
    step = distiller(images_of(), hard_labels(), index=index)
    assert not heads.memory.any()  # a forward changes no state
    distiller.after_step()

    features = torch.stack(distiller.trainable(images_of(), {"index": index}).read["features"])
    torch.testing.assert_close(heads.memory[index], features.mean(0))
    assert heads.memory.any(1).nonzero().flatten().tolist() == [0, 2, 5, 7]
    assert not heads.memory.requires_grad
    heads.memory.zero_()
    distiller.after_step()  # the batch was taken in already
    assert not heads.memory.any()

    distiller.after_epoch()
    assert heads.num_epochs == 1
    again = distiller(images_of(), hard_labels(), index=index)
    torch.testing.assert_close(again.terms["method"], step.terms["method"])


def test_the_toys_memory_enters_the_loss():
    distiller = toy_distiller()
    index = torch.arange(4)

    first = distiller(images_of(), hard_labels(), index=index)
    distiller.after_step()
    second = distiller(images_of(), hard_labels(), index=index)

    assert second.terms["method"] < first.terms["method"]


def test_a_memory_takes_in_every_part_of_an_accumulated_batch():
    distiller = toy_distiller()

    for index in ([0, 1, 2, 3], [4, 5, 6, 7]):
        distiller(images_of(), hard_labels(), index=torch.tensor(index)).loss.backward()
    distiller.after_step()

    memory = distiller.trainable.adapters.memory
    assert memory.any(1).nonzero().flatten().tolist() == list(range(8))


def test_a_memory_takes_in_nothing_of_an_evaluation():
    distiller = toy_distiller()

    with torch.no_grad():
        distiller(images_of(), hard_labels(), index=torch.arange(4))
    distiller.soft_labels(images_of(), hard_labels(), index=torch.arange(4))
    distiller.eval()(images_of(), hard_labels(), index=torch.arange(4))
    distiller.train().after_step()

    assert not distiller.trainable.adapters.memory.any()


def test_a_loop_that_forgets_after_step_is_told_so():
    distiller = toy_distiller()
    image, label, index = images_of(1), hard_labels(1), torch.zeros(1, dtype=torch.long)
    for _ in range(256):
        distiller(image, label, index=index)

    with pytest.raises(RuntimeError, match=r"256 batches wait for it: call distiller\.after_step"):
        distiller(image, label, index=index)

    distiller.after_step()
    distiller(image, label, index=index)


def test_the_toys_heads_and_memory_are_stored_and_come_back():
    distiller = toy_distiller()
    distiller(images_of(), hard_labels(), index=torch.arange(4))
    distiller.after_step()
    distiller.after_epoch()

    state = distiller.state_dict()
    other = toy_distiller()
    other.load_state_dict(state)

    assert {
        "trainable.adapters.projections.0.weight",
        "trainable.adapters.memory",
        "trainable.adapters.num_epochs",
    } <= state.keys()
    for name, value in other.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert other.trainable.adapters.num_epochs == 1


def test_the_toy_without_soft_labels_shows_the_labels_themselves():
    soft = toy_distiller().soft_labels(images_of(), hard_labels(), index=torch.arange(4))

    assert torch.equal(soft.target, nn.functional.one_hot(hard_labels(), NUM_CLASSES).float())
    assert not soft.non_target.any()


def test_the_toy_asks_for_its_extra():
    with pytest.raises(ValueError, match=r"index=\.\.\."):
        toy_distiller()(images_of(), hard_labels())


def test_a_head_may_read_the_teacher():
    class Regressed(Method):
        of_batch = True
        inputs: ClassVar = {
            "features": Features(stages=("middle",)),
            "wanted": Features(of="teacher", stages=("middle",)),
        }

        def build_adapters(self, shapes: dict[str, list[tuple[int, ...]]]) -> nn.Module:
            return Regressor(shapes["features"][0][1], shapes["wanted"][0][1])

        def terms(self, features: list[Tensor], wanted: list[Tensor]) -> dict[str, Tensor]:
            return {"distance": nn.functional.mse_loss(features[0], wanted[0])}

    class Regressor(nn.Module):
        def __init__(self, width: int, wanted: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(width, wanted, 1)

        def forward(self, values: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
            assert values["wanted"][0].shape[1] == 16
            return {"features": [self.conv(values["features"][0])]}

    teacher = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        nn.Conv2d(16, 20, 3, 2, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(20, NUM_CLASSES),
    )
    distiller = Distiller(small_cnn(), Regressed(), teacher=teacher, example_shape=IMAGE_SHAPE)

    distiller(images_of(), hard_labels()).loss.backward()

    assert distiller.trainable.adapters.conv.weight.shape == (16, 12, 1, 1)
    assert distiller.trainable.adapters.conv.weight.grad.any()
    assert teacher[0].weight.grad is None


def test_nkd_reads_the_teacher_it_was_given():
    teacher = CountingTeacher(small_cnn(seed=1))
    distiller = Distiller(small_cnn(), NKDLoss(), teacher=teacher)

    distiller(images_of(), hard_labels())

    assert teacher.calls == 1
