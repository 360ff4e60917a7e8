"""Compiled code, torch.func transforms, meta tensors, and where label values are checked."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from shared.loss_cases import (
    CASES_AND_INDICES,
    CASES_AND_MAIN_KINDS,
    MIXED,
    PLAIN_CASES,
    case_id,
    deterministic,
    gradients,
)
from softlabels.losses import check_values, label_smoothing_loss, uskd_loss, zipf_ls_loss
from softlabels.losses._checks import check_target, check_two_labels, check_votes

every_case_once = pytest.mark.parametrize(("case", "kind"), CASES_AND_INDICES, ids=case_id)
every_case_and_main_kind = pytest.mark.parametrize(
    ("case", "kind"), CASES_AND_MAIN_KINDS, ids=case_id
)

# Compiling takes long: mixed labels only where they take another path, the plain cases with class
# indices are in test_recompilation.py, and the other cases in the slow tests.
COMPILED = [
    pytest.param(case, kind, marks=() if case in PLAIN_CASES else pytest.mark.slow)
    for case, kind in CASES_AND_MAIN_KINDS
    if (case not in PLAIN_CASES if kind != MIXED else case in PLAIN_CASES)
    or case.name == "uskd_teacher"
    or case.settings.get("mixed_target") == "all"
]


@pytest.fixture(autouse=True)
def default_value_checks() -> Iterator[None]:
    yield
    check_values(False)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Elsewhere(Tensor):
    """A CPU tensor that says it lies on an accelerator."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda")


# torch.compile


@pytest.mark.parametrize(("case", "kind"), COMPILED, ids=case_id)
def test_compiled_without_graph_breaks_equals_eager(case, kind, fresh_compiler):
    inputs = case.make(kind)
    compiled = torch.compile(case, fullgraph=True, backend="aot_eager")
    leaves = {
        name: tensor.clone().requires_grad_() if name in case.trained else tensor
        for name, tensor in inputs.items()
    }

    expected, expected_gradients = gradients(case, inputs)
    torch.manual_seed(0)
    loss = compiled(leaves)
    loss.backward()

    torch.testing.assert_close(loss, expected)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(leaves[name].grad, gradient)


def test_values_are_not_checked_in_compiled_code_even_when_forced(fresh_compiler):
    check_values(True)
    compiled = torch.compile(label_smoothing_loss, fullgraph=True, backend="aot_eager")
    target = torch.tensor([[0.5, 0.2]])

    assert bool(torch.isfinite(compiled(torch.zeros(1, 2), target)))
    with pytest.raises(ValueError, match=r"row 0 sums to 0\.7"):
        label_smoothing_loss(torch.zeros(1, 2), target)


# torch.func


@pytest.mark.parametrize(("case", "kind"), deterministic(CASES_AND_MAIN_KINDS), ids=case_id)
def test_vmap_over_several_students_equals_a_loop(case, kind):
    members = [case.make(kind, dtype=torch.float64, seed=seed) for seed in range(3)]
    stacked = [torch.stack([member[name] for member in members]) for name in case.inputs]

    together = vmap(lambda *arguments: case(dict(zip(case.inputs, arguments, strict=True))))(
        *stacked
    )

    torch.testing.assert_close(together, torch.stack([case(member) for member in members]))


@every_case_and_main_kind
def test_functional_gradient_equals_the_backward_pass(case, kind):
    inputs = case.make(kind, dtype=torch.float64)

    found = grad(lambda logits: case({**inputs, "logits": logits}))(inputs["logits"])

    torch.testing.assert_close(found, gradients(case, inputs)[1]["logits"])


@pytest.mark.parametrize(("case", "kind"), deterministic(CASES_AND_INDICES), ids=case_id)
def test_per_sample_gradients_by_vmap_equal_single_backward_passes(case, kind):
    inputs = case.make(kind, dtype=torch.float64)
    rows = [inputs[name].unsqueeze(1) for name in case.inputs]

    found = vmap(grad(lambda *arguments: case(dict(zip(case.inputs, arguments, strict=True)))))(
        *rows
    )

    for row in range(4):
        single = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        torch.testing.assert_close(found[row], gradients(case, single)[1]["logits"])


# Where values are checked


@every_case_and_main_kind
def test_meta_tensors_give_shapes_even_when_values_are_forced(case, kind):
    inputs = {name: tensor.to("meta") for name, tensor in case.make(kind).items()}

    for always in (False, True):
        check_values(always)
        assert case(inputs).device.type == "meta"
        assert case(inputs, reduction="none").shape == (4,)
        with pytest.raises(ValueError, match="reduction must be one of"):
            case(inputs, reduction="all")


def test_values_off_the_cpu_are_checked_only_when_forced():
    logits = torch.zeros(2, 3)
    wrong_class = torch.tensor([0, 3]).as_subclass(Elsewhere)
    wrong_sum = torch.tensor([[1.0, 0, 0], [0.5, 0, 0]]).as_subclass(Elsewhere)
    three_labels = torch.full((2, 3), 1 / 3).as_subclass(Elsewhere)
    wrong_vote = torch.tensor([[0], [-1]]).as_subclass(Elsewhere)

    def check_all() -> list[str]:
        messages = []
        for check in (
            lambda: check_target(wrong_class, logits),
            lambda: check_target(wrong_sum, logits),
            lambda: check_two_labels(three_labels),
            lambda: check_votes(wrong_vote, logits),
        ):
            try:
                check()
            except ValueError as error:
                messages.append(str(error))
        return messages

    assert check_all() == []
    check_values(True)
    assert len(check_all()) == 4
    check_values(False)
    assert check_all() == []


def test_shapes_and_dtypes_are_checked_off_the_cpu_too():
    logits = torch.zeros(2, 3, device="meta")

    with pytest.raises(ValueError, match="must hold 2 labels, got 3"):
        zipf_ls_loss(logits, torch.zeros(3, dtype=torch.int64, device="meta"))
    with pytest.raises(TypeError, match=r"integer class indices, got torch\.float32"):
        zipf_ls_loss(logits, torch.zeros(2, device="meta"))
    with pytest.raises(ValueError, match=r"weak_logits must have the shape .* got \(2, 4\)"):
        uskd_loss(logits, torch.zeros(2, 4, device="meta"), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("always", [False, True])
def test_transforms_never_read_values(always):
    check_values(always)
    logits = torch.zeros(2, 1, 3)
    wrong = torch.tensor([[[1.0, 0, 0]], [[0.5, 0, 0]]])

    value = vmap(lambda logits, target: label_smoothing_loss(logits, target))(logits, wrong)

    assert value.shape == (2,)
