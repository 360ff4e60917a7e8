"""Several methods at once: each gives what it gives alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from shared.small_networks import IMAGE_SHAPE, hard_labels, images_of, small_cnn
from shared.toy_method import ToyLoss
from softlabels import Distiller
from softlabels.inputs import (
    Classifier,
    Features,
    FromBatch,
    Logits,
    NormParameters,
    Target,
    TeacherLogits,
)
from softlabels.losses import (
    ATLoss,
    FitNetLoss,
    KDLoss,
    MemoryBank,
    Method,
    NKDLoss,
    OLSLoss,
    PSKDLoss,
    USKDLoss,
    WeightedSum,
    ZipfLSLoss,
)
from softlabels.losses.weighted_sum import of_teacher

NUM_SAMPLES = 8
INDEX = torch.arange(4)

METHODS = {
    "nkd": lambda: NKDLoss(temperature=2.0),
    "uskd": lambda: USKDLoss(weak_weight=1.0),
    "fitnet": lambda: FitNetLoss(stages=("stage1",)),
    "at": lambda: ATLoss(stages=("stage1", "last")),
    "ps_kd": lambda: PSKDLoss(num_samples=NUM_SAMPLES),
    "toy": lambda: ToyLoss(num_samples=NUM_SAMPLES),
}
WITH_TEACHER = ("nkd", "fitnet", "at")
WEIGHTS = {"nkd": 0.5, "uskd": 2.0, "fitnet": 3.0, "at": 10.0, "ps_kd": 0.0, "toy": 0.25}


def distiller_of(method: nn.Module, *, teacher: bool, **settings: object) -> Distiller:
    network = small_cnn(seed=1) if teacher else None
    # Group norm: a forward changes nothing.
    return Distiller(
        small_cnn(norm="group"), method, teacher=network, example_shape=IMAGE_SHAPE, **settings
    ).double()


def step_of(distiller: Distiller, index: Tensor = INDEX) -> object:
    return distiller(images_of().double(), hard_labels(), index=index)


def gradients(loss: Tensor, module: nn.Module) -> dict[str, Tensor]:
    named = dict(module.named_parameters())
    found = torch.autograd.grad(loss, [*named.values()], allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(named.items(), found, strict=True)
    }


def as_alone(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state that a method has alone, out of that of a sum."""
    own = {}
    for key, value in state.items():
        for start, alone in (
            ("trainable.student.", "trainable.student."),
            (f"trainable.adapters.adapters.{name}.", "trainable.adapters."),
            (f"trainable.providers.{name}__", "trainable.providers."),
        ):
            if key.startswith(start):
                own[alone + key.removeprefix(start)] = value
    return own


def test_a_sum_is_the_weighted_sum_of_its_methods_and_so_are_its_gradients():
    together = distiller_of(
        WeightedSum({k: m() for k, m in METHODS.items()}, WEIGHTS), teacher=True
    )
    state = together.state_dict()
    step_of(together)
    together.after_step()  # PS-KD and the toy remember something now
    state = {name: value.clone() for name, value in together.state_dict().items()}
    step = step_of(together, INDEX.flip(0))

    total = 0.0
    of_student: dict[str, Tensor] = {}
    of_all = gradients(step.terms["method"], together.trainable)
    for name, make in METHODS.items():
        alone = distiller_of(make(), teacher=name in WITH_TEACHER)
        alone.load_state_dict(as_alone(name, state))
        method = step_of(alone, INDEX.flip(0)).terms["method"]
        total += WEIGHTS[name] * method
        for key, value in gradients(WEIGHTS[name] * method, alone.trainable).items():
            if key.startswith("student."):
                of_student[key] = of_student.get(key, 0) + value
            else:
                in_sum = key.replace("adapters.", f"adapters.adapters.{name}.").replace(
                    "providers.", f"providers.{name}__"
                )
                torch.testing.assert_close(of_all.pop(in_sum), value, msg=in_sum)

    torch.testing.assert_close(step.terms["method"], total)
    assert of_all.keys() == of_student.keys()
    for key, value in of_student.items():
        torch.testing.assert_close(of_all[key], value)


def test_weights_are_1_unless_given_and_may_change_between_steps():
    method = WeightedSum({"at": ATLoss(), "kd": KDLoss()}, {"kd": 0.5})
    distiller = distiller_of(method, teacher=True, method_weight=2.0)
    distiller.detailed = True
    assert method.weights == {"at": 1.0, "kd": 0.5}
    first = step_of(distiller)

    method.weights = {"at": 0.0, "kd": 1.5}
    second = step_of(distiller)

    kd = sum(value for name, value in first.terms.items() if name.startswith("method/kd"))
    of_second = sum(value for name, value in second.terms.items() if name != "task")
    assert first.loss > first.terms["task"]
    torch.testing.assert_close(of_second, 3.0 * kd)
    torch.testing.assert_close(second.loss, second.terms["task"] + of_second)


def test_parts_are_weighted_and_add_up():
    method = WeightedSum({"nkd": NKDLoss(), "ols": OLSLoss()}, {"nkd": 0.5, "ols": 3.0})
    generator = torch.Generator().manual_seed(2)
    logits, teacher, soft = (torch.randn(4, 5, generator=generator) for _ in range(3))
    values = {
        "nkd__logits": logits, "nkd__teacher_logits": teacher, "nkd__target": hard_labels(),
        "ols__logits": logits, "ols__soft_target": soft.softmax(1),
    }  # fmt: skip

    loss, parts = method(**values), method.reduced(**values)

    alone = NKDLoss().reduced(logits, teacher, hard_labels())
    assert parts.keys() == {*(f"nkd/{name}" for name in alone), "ols/soft"}
    for name, part in alone.items():
        torch.testing.assert_close(parts[f"nkd/{name}"], 0.5 * part)
    torch.testing.assert_close(parts["ols/soft"], 3 * OLSLoss()(logits, soft.softmax(1)))
    torch.testing.assert_close(sum(parts.values()), loss)
    torch.testing.assert_close(method(**values), loss)


def test_a_detailed_step_takes_a_sum_apart_down_to_the_methods_parts():
    method = WeightedSum({"nkd": NKDLoss(), "toy": ToyLoss(num_samples=NUM_SAMPLES)}, {"toy": 3.0})
    distiller = distiller_of(method, teacher=True, method_weight=0.5)
    plain = step_of(distiller)

    distiller.detailed = True
    step = step_of(distiller)

    assert step.terms.keys() == {
        "task", "method/nkd/target", "method/nkd/non_target", "method/toy/distance",
    }  # fmt: skip
    torch.testing.assert_close(sum(step.terms.values()), step.loss)
    assert torch.equal(step.loss, plain.loss)
    shares = step.gradient_shares()
    torch.testing.assert_close(sum(shares.values()), torch.ones((), dtype=torch.float64))


# Learned parts and memory


def test_each_method_has_heads_of_its_own():
    stages = ("stage1",)
    method = WeightedSum({"a": FitNetLoss(stages=stages), "b": FitNetLoss(stages=stages)})
    distiller = distiller_of(method, teacher=True)

    weights = [
        value for name, value in distiller.state_dict().items() if name.endswith("s.0.0.weight")
    ]
    assert len(weights) == 2
    assert not torch.equal(*weights)
    assert {
        name.split(".")[3] for name in distiller.state_dict() if ".adapters.adapters." in name
    } == {
        "a",
        "b",
    }


def test_a_sum_without_learned_parts_has_none():
    distiller = distiller_of(WeightedSum({"kd": KDLoss(), "nkd": NKDLoss()}), teacher=True)

    assert distiller.trainable.adapters is None
    distiller.after_step()
    distiller.after_epoch()
    assert step_of(distiller).loss.isfinite()


class Counting(MemoryBank):
    """Remembers how often a step and an epoch ended, and what it was given."""

    memory_inputs = ("logits",)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("epochs", torch.zeros(()))
        self.given: object = None

    def forward(self, values: Mapping[str, object]) -> dict[str, object]:
        return {}

    def after_step(self, values: Mapping[str, object]) -> None:
        self.steps += 1
        self.given = values

    def after_epoch(self) -> None:
        self.epochs += 1


class CountingLoss(Method):
    inputs: ClassVar = {"logits": Logits()}
    adapter_inputs: ClassVar = {"features": Features(), "index": FromBatch()}

    def build_adapters(self, shapes: Mapping[str, object]) -> nn.Module:
        self.shapes = shapes
        return Counting()

    def terms(self, logits: Tensor) -> dict[str, Tensor]:
        return {"mean": logits.mean(1)}


def test_members_remember_what_they_name_and_nothing_else():
    methods = {
        "fitnet": FitNetLoss(stages=("stage1",)), "one": CountingLoss(), "two": CountingLoss(),
    }  # fmt: skip
    distiller = distiller_of(WeightedSum(methods), teacher=True)
    heads = distiller.trainable.adapters

    step = step_of(distiller)
    assert heads.memory_inputs == ("one__logits", "two__logits")
    distiller.after_step()
    distiller.after_epoch()

    for name in ("one", "two"):
        memory = heads.adapters[name]
        assert (float(memory.steps), float(memory.epochs)) == (1, 1)
        assert memory.given.keys() == {"logits"}
        torch.testing.assert_close(memory.given["logits"], step.logits.detach())
    assert methods["one"].shapes == {"logits": (2, 5), "features": [(2, 16, 4, 4)]}
    assert distiller.memories() == [heads.adapters["one"], heads.adapters["two"]]


def test_a_step_that_is_forgotten_reaches_no_member():
    distiller = distiller_of(WeightedSum({"one": CountingLoss()}), teacher=False)

    step_of(distiller)
    distiller.forget_step()
    distiller.after_step()

    assert float(distiller.trainable.adapters.adapters["one"].steps) == 0


def test_a_head_that_names_nothing_is_given_all():
    """As heads of a method of one's own may, beside others that remember."""
    method = WeightedSum({"toy": ToyLoss(num_samples=NUM_SAMPLES), "one": CountingLoss()})
    distiller = distiller_of(method, teacher=False)

    step_of(distiller)
    distiller.after_step()

    toy = distiller.trainable.adapters.adapters["toy"]
    assert toy.memory.any(1).nonzero().flatten().tolist() == INDEX.tolist()


def test_extras_of_all_methods_are_asked_for_once():
    method = WeightedSum({"toy": ToyLoss(), "ps_kd": PSKDLoss(num_samples=NUM_SAMPLES)})
    distiller = distiller_of(method, teacher=False)

    assert distiller.extras == ("index",)
    with pytest.raises(ValueError, match="reads 'index' from the batch, got no extras"):
        distiller(images_of().double(), hard_labels())


# Soft labels


def test_soft_labels_are_those_of_the_first_method_that_has_any():
    method = WeightedSum({"at": ATLoss(), "zipf_ls": ZipfLSLoss(), "nkd": NKDLoss()})
    distiller = distiller_of(method, teacher=True)

    soft = distiller.soft_labels(images_of().double(), hard_labels())

    alone = distiller_of(ZipfLSLoss(), teacher=False)
    expected = alone.soft_labels(images_of().double(), hard_labels())
    torch.testing.assert_close(soft.target, expected.target)
    torch.testing.assert_close(soft.non_target, expected.non_target)


def test_soft_labels_of_methods_without_any_are_the_labels():
    for method in (
        WeightedSum({"at": ATLoss(), "fitnet": FitNetLoss(stages=("stage1",))}),
        WeightedSum({"both": WeightedSum({"at": ATLoss()})}),
    ):
        distiller = distiller_of(method, teacher=True)
        soft = distiller.soft_labels(images_of().double(), hard_labels())

        assert torch.equal(soft.target, nn.functional.one_hot(hard_labels(), 5).double())
        assert not soft.non_target.any()


# Sums of sums


def test_a_sum_of_sums_is_their_weighted_sum():
    inner = WeightedSum({"nkd": NKDLoss(), "fitnet": FitNetLoss(stages=("stage1",))}, {"nkd": 3.0})
    outer = WeightedSum({"both": inner, "ps_kd": PSKDLoss(num_samples=NUM_SAMPLES)}, {"both": 0.5})
    distiller = distiller_of(outer, teacher=True)
    distiller.detailed = True

    step = step_of(distiller)

    assert {name.rpartition("/")[0] for name in step.terms} == {
        "", "method/ps_kd", "method/both/nkd", "method/both/fitnet",
    }  # fmt: skip
    torch.testing.assert_close(sum(step.terms.values()), step.loss)
    nkd = step_of(distiller_of(NKDLoss(), teacher=True))
    found = step.terms["method/both/nkd/target"] + step.terms["method/both/nkd/non_target"]
    torch.testing.assert_close(found, 1.5 * nkd.terms["method"])
    assert "both__nkd__logits" in outer.inputs
    distiller.after_step()
    memory = distiller.trainable.adapters.adapters["ps_kd"]
    assert memory.seen.nonzero().flatten().tolist() == INDEX.tolist()


# Samples without a label


def test_samples_that_one_method_leaves_out_the_task_leaves_out_too():
    methods = {"nkd": NKDLoss(ignore_index=-100), "at": ATLoss(), "kd": KDLoss()}
    method = WeightedSum(methods)
    distiller = distiller_of(method, teacher=True)
    target = hard_labels().clone()
    target[1] = -100

    step = distiller(images_of().double(), target)

    kept = torch.tensor([0, 2, 3])
    expected = nn.functional.cross_entropy(step.logits[kept], target[kept])
    assert method.ignore_index == -100
    assert WeightedSum({"sum": method}).ignore_index == -100
    torch.testing.assert_close(step.terms["task"], expected)


def test_methods_that_differ_in_what_they_leave_out():
    with pytest.raises(ValueError, match=r"the methods differ in ignore_index: \[-100, -1\]"):
        WeightedSum({"a": NKDLoss(ignore_index=-100), "b": NKDLoss(ignore_index=-1)})
    assert WeightedSum({"kd": KDLoss()}).ignore_index is None


# Which teacher


def test_a_signal_of_a_teacher_may_be_that_of_another():
    for kind in (TeacherLogits(), NormParameters(), Classifier(), Features(of="teacher")):
        assert of_teacher(kind, 2).teacher == 2
        assert of_teacher(kind, None) is kind
    for kind in (Logits(), Target(), Features(of="student"), FromBatch("index")):
        assert of_teacher(kind, 2) is kind
    kept = of_teacher(Features("teacher", ("a", "b"), "map", True), 1)
    assert kept == Features("teacher", ("a", "b"), "map", True, 1)


def test_teachers_by_name_of_the_method():
    method = WeightedSum({"a": NKDLoss(), "b": NKDLoss(), "at": ATLoss()}, teachers={"b": 1})

    assert method.inputs["a__teacher_logits"] == TeacherLogits()
    assert method.inputs["b__teacher_logits"] == TeacherLogits(1)
    assert method.inputs["at__teacher_maps"].teacher == 0
    assert method.inputs["b__logits"] == Logits()


# Errors


@pytest.mark.parametrize(
    ("methods", "settings", "error", "message"),
    [
        ({}, {}, ValueError, "a sum needs one method or more, got none"),
        ({"a b": KDLoss()}, {}, ValueError, "must be an identifier without '__', .* got 'a b'"),
        ({"a__b": KDLoss()}, {}, ValueError, "must be an identifier .* got 'a__b'"),
        ({"1": KDLoss()}, {}, ValueError, "must be an identifier"),
        ({"": KDLoss()}, {}, ValueError, "must be an identifier"),
        ({"a": KDLoss(), "a_": KDLoss()}, {}, ValueError, "got 'a_'"),
        ({"type": KDLoss()}, {}, ValueError, "got 'type'"),
        ({"a": nn.ReLU()}, {}, TypeError, "a must be a softlabels.losses.Method, got ReLU"),
        ({"a": KDLoss}, {}, TypeError, "a must be a softlabels.losses.Method, got type"),
        ({"a": KDLoss()}, {"weights": {"b": 1.0}}, ValueError, r"weights names \['b'\], exp"),
        ({"a": KDLoss()}, {"teachers": {"b": 1}}, ValueError, r"teachers names \['b'\], expected"),
        ({"a": KDLoss()}, {"weights": {"a": -1.0}}, ValueError, "the weight of a must be"),
        ({"a": KDLoss()}, {"weights": {"a": float("nan")}}, ValueError, "the weight of a"),
    ],
)  # fmt: skip
def test_a_sum_that_makes_no_sense(methods, settings, error, message):
    with pytest.raises(error, match=message):
        WeightedSum(methods, **settings)


def test_an_error_of_a_member_comes_through():
    with pytest.raises(ValueError, match="set num_samples"):
        distiller_of(WeightedSum({"kd": KDLoss(), "ps_kd": PSKDLoss()}), teacher=True)
    with pytest.raises(ValueError, match="WeightedSum reads from a teacher"):
        distiller_of(WeightedSum({"kd": KDLoss()}), teacher=False)
    with pytest.raises(ValueError, match="WeightedSum reads from no teacher"):
        distiller_of(WeightedSum({"zipf_ls": ZipfLSLoss()}), teacher=True)
    with pytest.raises(ValueError, match="reads teacher 1, counted from 0, got 1 teachers"):
        distiller_of(WeightedSum({"kd": KDLoss()}, teachers={"kd": 1}), teacher=True)
