"""Student, teacher and method wired together: one forward, one loss, and what is trained."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

import softlabels.models  # noqa: F401  # registers resnet20 with timm
from shared.recording import Recording
from shared.small_networks import (
    IMAGE_SHAPE,
    NUM_CLASSES,
    hard_labels,
    images_of,
    mixed_labels,
    num_hooks,
    small_cnn,
    small_vit,
)
from softlabels import (
    Distiller,
    FeatureTap,
    KDLoss,
    LabelSmoothingLoss,
    NKDLoss,
    SoftLabels,
    StepOutput,
    Teacher,
    USKDLoss,
    ZipfLSLoss,
    kd_loss,
    label_smoothing_loss,
    losses,
    nkd_loss,
    uskd_loss,
    uskd_targets,
    zipf_ls_loss,
    zipf_ls_targets,
)
from softlabels.inputs import FromBatch, Logits, Target

TASK_WEIGHT, METHOD_WEIGHT = 0.7, 1.3


@dataclass
class Parts:
    """What a method reads, taken out of the networks by hand."""

    logits: Tensor
    teacher_logits: Tensor
    weak_logits: Tensor
    votes: Tensor
    target: Tensor


@dataclass(frozen=True)
class Method:
    build: Callable[[], nn.Module]
    by_hand: Callable[[Parts], Tensor]
    needs_teacher: bool = False


# Those of two signals of each kind, by hand; tests/methods has every method.
METHOD_CASES = {
    "kd": Method(
        lambda: KDLoss(temperature=2),
        lambda p: kd_loss(p.logits, p.teacher_logits, temperature=2),
        needs_teacher=True,
    ),
    "nkd": Method(
        lambda: NKDLoss(temperature=3, mixed_target="all"),
        lambda p: nkd_loss(p.logits, p.teacher_logits, p.target, temperature=3, mixed_target="all"),
        needs_teacher=True,
    ),
    "uskd": Method(
        lambda: USKDLoss(weak_weight=0.5),
        lambda p: uskd_loss(p.logits, p.weak_logits, p.target, weak_weight=0.5),
    ),
    "zipf_ls": Method(
        lambda: ZipfLSLoss(power=0.5),
        lambda p: zipf_ls_loss(p.logits, p.target, p.votes, power=0.5),
    ),
    "zipf_ls of logits": Method(
        lambda: ZipfLSLoss(rank_from="logits"), lambda p: zipf_ls_loss(p.logits, p.target)
    ),
}

every_method = pytest.mark.parametrize("name", METHOD_CASES)
every_target = pytest.mark.parametrize(
    "target", [hard_labels(), mixed_labels()], ids=["hard", "mixed"]
)


def distiller_of(
    name: str | None, student: nn.Module | None = None, **settings: object
) -> Distiller:
    """A distiller in float64, so that what is computed twice may be compared."""
    case = METHOD_CASES[name] if name is not None else None
    if case is not None and case.needs_teacher:
        settings.setdefault("teacher", Teacher(small_cnn(seed=1, dropout=0.5)))
    settings.setdefault("example_shape", IMAGE_SHAPE)
    student = small_cnn(norm="group") if student is None else student
    return Distiller(student, case.build() if case is not None else None, **settings).double()


def images64(batch_size: int = 4) -> Tensor:
    return images_of(batch_size).double()


def parts_by_hand(distiller: Distiller, images: Tensor, target: Tensor) -> Parts:
    """Each signal from the plain networks and from the weights in the state dict."""
    student, state = distiller.student, distiller.state_dict(keep_vars=True)
    maps = student.stem(images)
    middle = student.stage1(maps)
    last = student.stage2(middle)
    weak = [f"trainable.providers.weak_logits.fc.{name}" for name in ("weight", "bias")]
    logits = student.fc(last.mean((2, 3)))
    return Parts(
        logits=logits,
        teacher_logits=distiller.teacher.model(images) if distiller.teacher else logits,
        weak_logits=functional.linear(middle.mean((2, 3)), *(state[name] for name in weak))
        if weak[0] in state
        else logits,
        votes=student.fc(last.permute(0, 2, 3, 1)).argmax(3).flatten(1),
        target=target,
    )


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in module.named_parameters()
    }


# The loss


@every_target
@every_method
def test_the_loss_is_the_tasks_and_the_methods_each_with_its_weight(name, target):
    distiller = distiller_of(name, task_weight=TASK_WEIGHT, method_weight=METHOD_WEIGHT)
    images, labels = images64(), target.double() if target.dim() == 2 else target

    step = distiller(images, labels)
    step.loss.backward()
    gradients = gradients_of(distiller)
    distiller.zero_grad()
    parts = parts_by_hand(distiller, images, labels)
    task = functional.cross_entropy(parts.logits, labels)
    method = METHOD_CASES[name].by_hand(parts)
    (TASK_WEIGHT * task + METHOD_WEIGHT * method).backward()

    assert isinstance(step, StepOutput)
    torch.testing.assert_close(step.loss, TASK_WEIGHT * task + METHOD_WEIGHT * method)
    torch.testing.assert_close(step.logits, parts.logits)
    torch.testing.assert_close(step.terms["task"], TASK_WEIGHT * task)
    torch.testing.assert_close(step.terms["method"], METHOD_WEIGHT * method)
    for parameter, expected in gradients_of(distiller).items():
        torch.testing.assert_close(gradients[parameter], expected)


@every_target
def test_without_a_method_the_loss_is_the_tasks(target):
    distiller = distiller_of(None, task_weight=0.5)
    labels = target.double() if target.dim() == 2 else target

    step = distiller(images64(), labels)

    expected = functional.cross_entropy(distiller.student(images64()), labels)
    torch.testing.assert_close(step.loss, 0.5 * expected)
    assert step.terms.keys() == {"task"}


@every_method
def test_the_tasks_loss_alone_is_smoothed(name):
    smoothed = distiller_of(name, task_loss=LabelSmoothingLoss(smoothing=0.3))
    plain = distiller_of(name)

    step, unsmoothed = (d(images64(), mixed_labels().double()) for d in (smoothed, plain))

    expected = label_smoothing_loss(step.logits, mixed_labels().double(), smoothing=0.3)
    torch.testing.assert_close(step.terms["task"], expected)
    assert step.terms["task"] != unsmoothed.terms["task"]
    torch.testing.assert_close(step.terms["method"], unsmoothed.terms["method"], rtol=0, atol=0)


def test_a_task_loss_may_be_any_function():
    distiller = distiller_of("zipf_ls", task_loss=lambda logits, target: logits.square().sum())

    step = distiller(images64(), hard_labels())

    torch.testing.assert_close(step.terms["task"], step.logits.square().sum())


@pytest.mark.parametrize("target", [torch.tensor([0, 1, 2, 5]), torch.tensor([0, -1, 2, 3])])
def test_labels_out_of_range_are_an_error(target):
    with pytest.raises(ValueError, match=r"target must lie in \[0, 5\)"):
        distiller_of(None)(images64(), target)


def test_smoothed_labels_are_refused_by_the_method_that_needs_one_or_two():
    smoothed = 0.9 * mixed_labels().double() + 0.1 / NUM_CLASSES

    with pytest.raises(ValueError, match="pass unsmoothed labels"):
        distiller_of("uskd")(images64(), smoothed)


@pytest.mark.parametrize(
    "distiller",
    [
        lambda: Distiller(small_cnn(), ZipfLSLoss(reduction="none", rank_from="logits")),
        lambda: Distiller(small_cnn(), task_loss=LabelSmoothingLoss(reduction="none")),
    ],
)
def test_a_loss_for_each_sample_is_an_error(distiller):
    with pytest.raises(ValueError, match=r"must be a scalar, got \(4,\): use reduction='mean'"):
        distiller()(images_of(), hard_labels())


# Gradients


def test_the_weak_heads_loss_reaches_its_head_and_the_network_up_to_the_tap():
    method = USKDLoss(target_weight=0, non_target_weight=0, weak_weight=1)
    distiller = Distiller(small_cnn(norm="group"), method, task_weight=0, example_shape=IMAGE_SHAPE)

    distiller(images_of(), hard_labels()).loss.backward()

    gradients = {name: bool(g.any()) for name, g in gradients_of(distiller.trainable).items()}
    assert all(gradients[n] for n in gradients if n.startswith("providers.weak_logits.fc"))
    assert all(gradients[n] for n in gradients if n.startswith(("student.stem", "student.stage1")))
    above = [n for n in gradients if n.startswith(("student.stage2", "student.fc"))]
    assert len(above) == 6
    assert not any(gradients[n] for n in above)


def test_the_teacher_takes_no_gradient():
    distiller = distiller_of("nkd")

    distiller(images64(), hard_labels()).loss.backward()

    assert all(p.grad is None and not p.requires_grad for p in distiller.teacher.parameters())
    assert all(g.any() for g in gradients_of(distiller).values())


def test_a_student_without_trained_parts_still_trains_its_head():
    student = small_cnn(norm="group")
    student.stem.requires_grad_(False)
    distiller = distiller_of("uskd", student)

    distiller(images64(), hard_labels()).loss.backward()

    assert student.stem[0].weight.grad is None
    assert student.stage1[0].weight.grad.any()


# What is trained and stored


@every_method
def test_what_is_trained_is_the_student_and_the_heads_alone(name):
    distiller = distiller_of(name)
    of_student = {f"trainable.student.{n}": p for n, p in distiller.student.named_parameters()}
    heads = {"trainable.providers.weak_logits.fc.weight", "trainable.providers.weak_logits.fc.bias"}

    named = dict(distiller.named_parameters())

    assert set(named) - set(of_student) == (heads if name == "uskd" else set())
    assert all(named[n] is p for n, p in of_student.items())
    assert set(distiller.state_dict()) == set(named)  # group norm has no buffers
    trained = {id(p) for p in distiller.parameters()}
    if distiller.teacher is not None:
        assert not trained & {id(p) for p in distiller.teacher.parameters()}
        assert "teacher" not in dict(distiller.named_modules())


class Wrapper(nn.Module):
    """As DistributedDataParallel: the wrapped module lies under `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: object) -> object:
        return self.module(*args)


@pytest.mark.parametrize(
    "wrap",
    [
        Wrapper,
        torch.compile,
        lambda module: torch.compile(Wrapper(module)),
        lambda module: Wrapper(torch.compile(module)),
    ],
    ids=["wrapped", "compiled", "wrapped, compiled", "compiled, wrapped"],
)
def test_the_state_is_the_same_whether_the_trained_module_is_wrapped_or_not(wrap):
    distiller, plain = distiller_of("uskd", small_cnn()), distiller_of("uskd", small_cnn(seed=5))
    before = distiller.state_dict()

    distiller.trainable = wrap(distiller.trainable)
    after = distiller.state_dict()

    assert list(after) == list(before)
    for name, value in after.items():
        assert value is before[name] or torch.equal(value, before[name])
    plain.load_state_dict(after)
    distiller.load_state_dict(plain.state_dict())
    assert isinstance(distiller.student, type(plain.student))
    assert num_hooks(distiller.export()) == 0


def test_a_module_that_wraps_nothing_is_an_error():
    distiller = distiller_of("uskd")
    distiller.trainable = nn.Linear(2, 2)

    with pytest.raises(TypeError, match=r"distiller's own module or a wrapper.*got Linear"):
        distiller.state_dict()


@every_method
def test_a_state_comes_back(name):
    distiller = distiller_of(name, small_cnn())
    optimizer = torch.optim.SGD(distiller.parameters(), 0.1)
    distiller(images64(), hard_labels()).loss.backward()
    optimizer.step()
    file = io.BytesIO()
    torch.save(distiller.state_dict(), file)
    file.seek(0)

    other = distiller_of(name, small_cnn(seed=5))
    result = other.load_state_dict(torch.load(file, weights_only=True))

    assert not result.missing_keys
    assert not result.unexpected_keys
    torch.testing.assert_close(
        other.eval()(images64(), hard_labels()).loss,
        distiller.eval()(images64(), hard_labels()).loss,
    )


def test_a_state_without_the_head_is_an_error_unless_it_may_be():
    state = distiller_of("zipf_ls").state_dict()
    distiller = distiller_of("uskd")

    with pytest.raises(RuntimeError, match=r"weak_logits\.fc\.weight"):
        distiller.load_state_dict(state)
    result = distiller.load_state_dict(state, strict=False)

    assert result.missing_keys == [
        "providers.weak_logits.fc.weight",
        "providers.weak_logits.fc.bias",
    ]


def test_a_distiller_inside_another_module_is_stored_under_its_name():
    distiller = distiller_of("uskd")

    state = nn.ModuleDict({"part": distiller}).state_dict()

    assert list(state) == [f"part.{name}" for name in distiller.state_dict()]


@every_method
def test_to_moves_the_teacher_and_the_heads_too(name):
    distiller = distiller_of(name, task_loss=LabelSmoothingLoss())

    for dtype in (torch.float32, torch.float64):
        distiller.to(dtype)
        step = distiller(images_of().to(dtype), hard_labels())

        assert step.loss.dtype == dtype
        assert all(p.dtype == dtype for p in distiller.parameters())
        if distiller.teacher is not None:
            assert all(p.dtype == dtype for p in distiller.teacher.parameters())


def test_to_moves_the_buffers_of_method_and_task_loss():
    class Weighted(losses.Method):
        inputs: ClassVar = {"logits": Logits()}

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weights", torch.ones(NUM_CLASSES))

        def terms(self, logits: Tensor) -> dict[str, Tensor]:
            return {"mean": functional.linear(logits, self.weights)}

    distiller = Distiller(
        small_cnn(), Weighted(), task_loss=nn.CrossEntropyLoss(weight=torch.ones(NUM_CLASSES))
    ).double()

    assert distiller(images64(), hard_labels()).loss.dtype == torch.float64
    assert not any("weight" in n for n in distiller.state_dict() if "student" not in n)


def test_heads_follow_a_student_that_was_moved_before():
    distiller = Distiller(small_cnn().double(), USKDLoss(), example_shape=IMAGE_SHAPE)

    assert all(p.dtype == torch.float64 for p in distiller.parameters())
    assert distiller(images64(), hard_labels()).loss.dtype == torch.float64


# Exports and copies


@every_method
def test_the_export_is_the_plain_student(name):
    student = small_cnn()
    distiller = distiller_of(name, student)
    distiller(images64(), hard_labels()).loss.backward()

    exported = distiller.export()

    assert type(exported) is type(student)
    assert exported is not student
    assert num_hooks(exported) == 0
    assert all(p.grad is None for p in exported.parameters())
    assert all(p.grad is not None for p in student.parameters())
    state = exported.state_dict()
    for name_, value in student.state_dict().items():
        assert torch.equal(state[name_], value)
        assert state[name_].data_ptr() != value.data_ptr()
    fresh = small_cnn(seed=9).double()
    fresh.load_state_dict(state, strict=True)
    torch.testing.assert_close(fresh.eval()(images64()), student.eval()(images64()))
    step = distiller(images64(), hard_labels())  # the student itself is still tapped
    assert step.loss.isfinite()


def test_the_exports_file_holds_the_student_alone():
    plain, file = io.BytesIO(), io.BytesIO()
    torch.save(small_cnn().double(), plain)
    teacher = small_cnn(seed=1)
    teacher.ballast = nn.Linear(500, 500)
    distiller = distiller_of("nkd", small_cnn(), teacher=teacher)

    torch.save(distiller.export(), file)

    assert file.tell() < plain.tell() + 500


def test_saving_the_student_saves_neither_heads_nor_teacher():
    plain, file = io.BytesIO(), io.BytesIO()
    torch.save(small_cnn(), plain)
    student = small_cnn()
    big_teacher = small_cnn(seed=1)
    big_teacher.ballast = nn.Linear(500, 500)
    with_both = USKDLoss(rank_from="weak", target_from="teacher")
    distiller = Distiller(student, with_both, teacher=big_teacher, example_shape=IMAGE_SHAPE)
    distiller(images_of(64), hard_labels(64))

    torch.save(student, file)

    assert file.tell() < plain.tell() + 2_000
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for _ in range(2):
        torch.testing.assert_close(loaded.eval()(images_of()), student.eval()(images_of()))


@every_method
def test_a_deep_copy_works_on_its_own(name):
    distiller = distiller_of(name, small_cnn())
    distiller(images64(), hard_labels()).loss.backward()
    distiller.zero_grad()

    copied = copy.deepcopy(distiller)
    steps = [d(images64(), hard_labels()) for d in (copied, distiller, copied)]
    steps[0].loss.backward()

    torch.testing.assert_close(steps[0].loss, steps[1].loss)
    assert all(p.grad is not None for p in copied.parameters())
    assert all(p.grad is None for p in distiller.parameters())
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(1)
    again = distiller(images64(), hard_labels())
    torch.testing.assert_close(again.loss, steps[1].loss)
    assert not torch.isclose(copied(images64(), hard_labels()).loss, again.loss)


def test_a_copy_of_the_trained_module_records_its_own_features():
    """As an exponential moving average is made: the trained module alone is copied."""
    distiller = distiller_of("uskd")
    average = copy.deepcopy(distiller.trainable)
    with torch.no_grad():
        average.student.stem[0].weight.zero_()

    own, averaged = distiller.trainable(images64()), average(images64())

    assert not torch.allclose(own.read["weak_logits"], averaged.read["weak_logits"])
    torch.testing.assert_close(averaged.logits, average.student(images64()))


# Compiled


@pytest.mark.parametrize("name", [None, "nkd", "uskd", "zipf_ls"])
def test_one_full_graph_gives_what_eager_gives(name):
    eager, compiled = (distiller_of(name, small_cnn(norm="group")) for _ in range(2))
    compiled.trainable = torch.compile(compiled.trainable, fullgraph=True, backend="aot_eager")

    for labels in (hard_labels(), mixed_labels().double()):
        steps = [d(images64(), labels) for d in (eager, compiled)]
        for step in steps:
            step.loss.backward()

        torch.testing.assert_close(steps[1].loss, steps[0].loss)
    compiled_gradients = gradients_of(compiled.trainable._orig_mod)
    for parameter, expected in gradients_of(eager.trainable).items():
        torch.testing.assert_close(compiled_gradients[parameter], expected)


def test_votes_of_a_head_with_dropout_compile_in_training_mode():
    torch._dynamo.reset()
    distiller = distiller_of("zipf_ls", small_cnn(norm="group", dropout=0.9))
    expected = parts_by_hand(distiller, images64(), hard_labels()).votes

    compiled = torch.compile(distiller.trainable, fullgraph=True, backend="aot_eager")

    assert torch.equal(compiled(images64()).read["votes"], expected)
    assert distiller.student.dropout.training


# Half precision


@every_target
@pytest.mark.parametrize("name", [None, *METHOD_CASES])
def test_autocast_gives_a_finite_loss_in_float32(name, target):
    distiller = distiller_of(name).float()
    with torch.no_grad():
        distiller.student.fc.weight.mul_(1e4)  # confident to the last bit

    with torch.autocast("cpu", torch.bfloat16):
        step = distiller(images_of(), target)
    step.loss.backward()

    assert step.logits.dtype == torch.bfloat16
    assert step.loss.dtype == torch.float32
    assert step.loss.isfinite()
    assert all(g.isfinite().all() for g in gradients_of(distiller).values())


# What the constructor leaves alone


@every_method
def test_a_method_changes_neither_the_students_weights_nor_the_random_state(name):
    def run(method: str | None) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(7)
        student = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        student.extend([nn.Linear(8, NUM_CLASSES)])
        if method is None:
            Distiller(student)
        else:
            case = METHOD_CASES[method]
            teacher = small_cnn() if case.needs_teacher else None
            taps = {"middle": "0", "last": "0"}
            Distiller(student, case.build(), teacher=teacher, taps=taps, example_shape=IMAGE_SHAPE)
        return copy.deepcopy(student.state_dict()), torch.rand(3)

    (with_method, draw), (without, plain_draw) = run(name), run(None)

    assert torch.equal(draw, plain_draw)
    assert with_method.keys() == without.keys()
    for parameter, value in with_method.items():
        assert torch.equal(value, without[parameter])


def test_the_heads_draws_follow_the_callers_seed():
    def weight(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return distiller_of("uskd").state_dict()["trainable.providers.weak_logits.fc.weight"]

    assert torch.equal(weight(0), weight(0))
    assert not torch.equal(weight(0), weight(1))


@every_method
def test_building_a_distiller_leaves_the_student_as_it_was(name):
    student = small_cnn(dropout=0.5).train()
    student.stem.eval()  # frozen statistics
    modes = [module.training for module in student.modules()]
    state = copy.deepcopy(student.state_dict())

    distiller = distiller_of(name, student)

    assert distiller.student is student
    assert [module.training for module in student.modules()] == modes
    for key, value in student.state_dict().items():
        torch.testing.assert_close(value.double(), state[key].double(), rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_a_distiller_starts_in_its_students_mode(training):
    distiller = distiller_of("uskd", small_cnn().train(training))

    assert {module.training for module in distiller.modules()} == {training}
    assert {m.training for m in distiller.train(not training).modules()} == {not training}


def test_the_student_may_be_run_alone_as_often_as_one_likes():
    distiller = distiller_of("uskd")

    for _ in range(2):
        distiller.student(images64())
    distiller(images64(), hard_labels())
    for _ in range(2):
        distiller.student(images64())


def test_a_forward_that_failed_leaves_the_next_one_right():
    distiller = distiller_of("uskd")
    expected = distiller(images64(), hard_labels()).loss

    handle = distiller.student.stage2.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        distiller(images64(), hard_labels())
    handle.remove()

    torch.testing.assert_close(distiller(images64(), hard_labels()).loss, expected)


# Taps


@pytest.mark.parametrize(
    ("build", "shape", "width"),
    [
        (lambda: timm.create_model("resnet20", num_classes=NUM_CLASSES), (3, 32, 32), 32),
        (lambda: torchvision.models.resnet18(num_classes=NUM_CLASSES), (3, 64, 64), 256),
        (small_vit, (3, 16, 16), 24),
    ],
)
def test_a_network_of_another_house_trains_unedited(build, shape, width):
    student = build()
    names = set(student.state_dict())
    for method in (USKDLoss(), ZipfLSLoss()):
        distiller = Distiller(student, method, example_shape=shape)
        step = distiller(images_of(2, shape), hard_labels(2))
        step.loss.backward()

        assert step.loss.isfinite()
        assert set(distiller.export().state_dict()) == names
        if isinstance(method, USKDLoss):
            head = distiller.state_dict()["trainable.providers.weak_logits.fc.weight"]
            assert head.shape == (NUM_CLASSES, width)


def test_taps_name_another_middle():
    distiller = distiller_of("uskd", taps={"middle": "stem"})

    assert distiller.state_dict()["trainable.providers.weak_logits.fc.weight"].shape == (5, 8)


def test_taps_name_another_last_for_the_votes():
    student = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.Conv2d(8, 8, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, NUM_CLASSES),
    )
    distiller = Distiller(student, ZipfLSLoss(), taps={"last": "0"}, example_shape=IMAGE_SHAPE)

    votes = distiller.trainable(images_of()).read["votes"]

    maps = student[1](student[0](images_of())).permute(0, 2, 3, 1)
    assert torch.equal(votes, student[4](maps).argmax(3).flatten(1))


@pytest.mark.parametrize("name", [None, *METHOD_CASES])
def test_a_wrong_tap_is_an_error_whatever_the_method_reads(name):
    with pytest.raises(ValueError, match=r"SmallCNN has no module 'stagel'; near names: .*stage1"):
        distiller_of(name, taps={"middle": "stagel"})
    with pytest.raises(ValueError, match="must name 'middle' or 'last', got 'first'"):
        distiller_of(name, taps={"first": "stage1"})


def test_a_wrong_tap_of_the_teacher_is_an_error():
    with pytest.raises(ValueError, match=r"no module 'stagel'; near names: .*stage1"):
        distiller_of("nkd", taps={"teacher.middle": "stagel"})
    with pytest.raises(ValueError, match=r"taps names \['teacher.middle'\].*there is no teacher"):
        distiller_of("uskd", taps={"teacher.middle": "stage1"})


def test_a_classifier_of_the_whole_map_cannot_vote():
    student = torchvision.models.vgg11_bn(num_classes=NUM_CLASSES, init_weights=False)

    with pytest.raises(ValueError, match="votes need a classifier that works at a single position"):
        Distiller(student, ZipfLSLoss(), example_shape=(3, 32, 32))
    Distiller(student, ZipfLSLoss(rank_from="logits"), example_shape=(3, 32, 32))


# Errors of the constructor


@pytest.mark.parametrize("name", ["kd", "nkd"])
def test_a_method_that_reads_a_teacher_needs_one(name):
    with pytest.raises(ValueError, match=r"reads from a teacher: pass teacher=Teacher\(model\)"):
        Distiller(small_cnn(), METHOD_CASES[name].build())


def test_a_plain_module_becomes_a_teacher():
    model = small_cnn(seed=1)
    distiller = Distiller(small_cnn(), NKDLoss(), teacher=model)

    assert isinstance(distiller.teacher, Teacher)
    assert distiller.teacher.model is model


@pytest.mark.parametrize("share", ["all", "a part", "a teacher's model"])
def test_a_teacher_that_shares_parameters_with_the_student_is_an_error(share):
    student = small_cnn()
    teacher = small_cnn(seed=1)
    if share == "a part":
        teacher.stem = student.stem
    elif share == "all":
        teacher = student
    else:
        teacher = Teacher(student)

    with pytest.raises(ValueError, match="share parameters: pass a copy as teacher"):
        Distiller(student, NKDLoss(), teacher=teacher)


def test_a_teacher_of_other_class_counts_is_an_error_where_images_are_known():
    with pytest.raises(ValueError, match=r"teacher has 7 classes, the student 5: .*class_map="):
        Distiller(small_cnn(), NKDLoss(), teacher=small_cnn(7), example_shape=IMAGE_SHAPE)


@every_method
def test_a_student_or_a_method_that_is_no_module_is_an_error(name):
    with pytest.raises(TypeError, match=r"student must be an nn\.Module, got str"):
        Distiller("resnet18", METHOD_CASES[name].build(), teacher=small_cnn())
    with pytest.raises(
        TypeError, match=r"method must be a softlabels\.losses\.Method or None, got str"
    ):
        Distiller(small_cnn(), name)
    with pytest.raises(
        TypeError, match=r"method must be a softlabels\.losses\.Method or None, got type"
    ):
        Distiller(small_cnn(), type(METHOD_CASES[name].build()))


class Reading(Recording):
    def terms(self, logits: Tensor, target: Tensor, index: Tensor | None = None):
        return {"logits": logits.sum()}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"logits": Logits(), "target": Target(), "labels": Target()},
            "Reading.inputs names labels, which its terms do not take: they take logits, target, i",
        ),
        ({"logits": "logits", "target": Target()}, "inputs must map names to inputs"),
        ({"logits": Logits, "target": Target}, "inputs must map names to inputs"),
    ],
)
def test_inputs_that_do_not_fit_terms_are_an_error(inputs, message):
    with pytest.raises(ValueError, match=message):
        Distiller(small_cnn(), Reading(**inputs))


def test_an_argument_that_nothing_gives_is_named():
    distiller = Distiller(small_cnn(), Reading(logits=Logits()))

    with pytest.raises(
        TypeError, match="target is missing: it comes from the module that build_ad"
    ):
        distiller(images_of(), hard_labels())


@pytest.mark.parametrize("inputs", [None, ["logits"], "logits"])
def test_a_method_that_does_not_say_what_it_reads_is_an_error(inputs):
    method = Reading()
    method.read = inputs

    with pytest.raises(ValueError, match=r"Reading.inputs must map names to inputs"):
        Distiller(small_cnn(), method)
    with pytest.raises(TypeError, match=r"Method or None, got CrossEntropyLoss"):
        Distiller(small_cnn(), nn.CrossEntropyLoss())


def test_parameters_that_nothing_would_train_are_an_error():
    method = Reading(logits=Logits())
    method.scale = nn.Parameter(torch.ones(()))

    with pytest.raises(ValueError, match=r"parameter 'scale', .* build learned parts in"):
        Distiller(small_cnn(), method)


def test_an_argument_with_a_default_need_not_be_read():
    inputs = {"logits": Logits(), "target": Target()}

    Distiller(small_cnn(), Reading(**inputs))(images_of(), hard_labels())
    with_index = Distiller(small_cnn(), Reading(**inputs, index=FromBatch("index")))
    with pytest.raises(ValueError, match=r"index=\.\.\."):
        with_index(images_of(), hard_labels())


# Soft labels


@every_target
@every_method
def test_soft_labels_are_those_of_the_method(name, target):
    distiller = distiller_of(name)
    labels = target.double() if target.dim() == 2 else target

    soft = distiller.soft_labels(images64(), labels)

    parts = parts_by_hand(distiller, images64(), labels)
    logits = parts.logits
    one_hot = labels if labels.dim() == 2 else functional.one_hot(labels, NUM_CLASSES).double()
    largest = functional.one_hot(one_hot.argmax(1), NUM_CLASSES).double()
    expected = {
        "uskd": lambda: uskd_targets(logits, parts.weak_logits, labels),
        "zipf_ls": lambda: SoftLabels(
            largest, zipf_ls_targets(logits, labels, parts.votes, power=0.5)
        ),
        "zipf_ls of logits": lambda: SoftLabels(largest, zipf_ls_targets(logits, labels)),
        "nkd": lambda: teachers(parts.teacher_logits, parts.teacher_logits / 3, one_hot > 0),
        "kd": lambda: teachers(parts.teacher_logits / 2, parts.teacher_logits / 2, one_hot > 0),
    }[name]()
    for part, wanted in zip(soft, expected, strict=True):
        torch.testing.assert_close(part, wanted)
        assert not part.requires_grad


def teachers(target_logits: Tensor, other_logits: Tensor, labeled: Tensor) -> SoftLabels:
    """The softmax at labeled classes, and the softmax over all others."""
    others = other_logits.exp() * ~labeled
    return SoftLabels(
        target_logits.softmax(1) * labeled, (others / others.sum(1, keepdim=True)).detach()
    )


@every_target
def test_soft_labels_without_a_method_are_the_labels(target):
    soft = distiller_of(None).soft_labels(images64(), target)

    one_hot = target if target.dim() == 2 else functional.one_hot(target, NUM_CLASSES)
    assert torch.equal(soft.target, one_hot.double())
    assert not soft.non_target.any()


def test_soft_labels_of_label_smoothing_are_its_own():
    distiller = distiller_of(None, task_loss=LabelSmoothingLoss(smoothing=0.2))

    soft = distiller.soft_labels(images64(), hard_labels())

    rows = torch.arange(4)
    torch.testing.assert_close(
        soft.target[rows, hard_labels()], torch.full((4,), 0.8 + 0.2 / NUM_CLASSES).double()
    )
    assert soft.target.count_nonzero() == 4
    torch.testing.assert_close(soft.non_target.sum(1), torch.ones(4).double())
    assert soft.non_target.unique().numel() == 2  # 0 at the label, even elsewhere


def test_soft_labels_may_be_asked_for_between_steps():
    distiller = distiller_of("uskd")
    expected = distiller(images64(), hard_labels()).loss

    distiller.soft_labels(images64(), hard_labels())

    torch.testing.assert_close(distiller(images64(), hard_labels()).loss, expected)


def test_other_taps_on_the_student_go_on_working():
    distiller = distiller_of("uskd")
    with FeatureTap(distiller.student, ["stage1"]) as tap:
        distiller(images64(), hard_labels())

        assert tap.pop()["stage1"].shape == (4, 12, 8, 8)


def test_the_teacher_goes_to_the_students_device():
    # The meta device stands for an accelerator: it holds shapes alone.
    student = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).to("meta")
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))

    distiller = Distiller(student, NKDLoss(), teacher=teacher)

    assert {p.device.type for p in distiller.teacher.parameters()} == {"meta"}
