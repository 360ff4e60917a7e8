"""What every loss has in common; the losses are listed in loss_cases.py."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shared.loss_cases import (
    CASES,
    CASES_AND_INDICES,
    CASES_AND_KINDS,
    DENSE,
    INDICES,
    MIXED,
    ONE_HOT,
    LossCase,
    case_id,
    deterministic,
    gradients,
)

HALF_PRECISION = (torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)

every_case_and_kind = pytest.mark.parametrize(("case", "kind"), CASES_AND_KINDS, ids=case_id)
every_case_once = pytest.mark.parametrize(("case", "kind"), CASES_AND_INDICES, ids=case_id)


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# Values and reductions


@every_case_and_kind
def test_the_loss_is_a_finite_scalar_with_gradients(case, kind):
    loss, found = gradients(case, case.make(kind))

    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert bool(torch.isfinite(loss))
    assert all(bool(gradient.abs().sum() > 0) for gradient in found.values())


@pytest.mark.parametrize(("batch_size", "num_classes"), [(1, 2), (1, 5), (6, 2), (3, 3), (5, 40)])
@every_case_and_kind
def test_reductions_agree_at_every_shape(case, kind, batch_size, num_classes):
    inputs = case.make(kind, batch_size, num_classes, torch.float64)

    none = case(inputs, reduction="none")

    assert none.shape == (batch_size,)
    assert none.dtype == torch.float64
    assert bool(torch.isfinite(none).all())
    kept = case.kept(inputs)
    torch.testing.assert_close(case(inputs, reduction="mean"), none.sum() / kept.sum().clamp(min=1))
    assert not none[~kept].any()
    torch.testing.assert_close(case(inputs, reduction="sum"), none.sum())
    assert_equal(case(inputs), case(inputs, reduction="mean"))


@every_case_once
def test_a_sum_has_the_gradient_of_a_mean_times_the_samples_that_count(case, kind):
    inputs = case.make(kind, batch_size=5, dtype=torch.float64)

    _, of_mean = gradients(case, inputs)
    _, of_sum = gradients(case, inputs, reduction="sum")

    for name, gradient in of_mean.items():
        torch.testing.assert_close(of_sum[name], case.kept(inputs).sum() * gradient)


@pytest.mark.parametrize(
    ("case", "kind"),
    [pair for pair in deterministic(CASES_AND_KINDS) if not pair[0].name.startswith("uskd")],
    ids=case_id,
)
def test_samples_do_not_see_each_other(case, kind):
    inputs = case.make(kind, batch_size=3, dtype=torch.float64)

    together = case(inputs, reduction="none")

    for row in range(3):
        alone = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        torch.testing.assert_close(case(alone, reduction="none"), together[row : row + 1])


@every_case_and_kind
def test_inputs_are_left_as_they_were(case, kind):
    inputs = case.make(kind)
    before = {name: tensor.clone() for name, tensor in inputs.items()}

    gradients(case, inputs)

    for name, tensor in inputs.items():
        assert_equal(tensor, before[name])


@pytest.mark.parametrize(
    "case", [c for c in CASES if {ONE_HOT, MIXED} & set(c.target_kinds)], ids=case_id
)
def test_one_hot_probabilities_give_what_class_indices_give(case):
    inputs = case.make(INDICES, dtype=torch.float64)
    one_hot = torch.nn.functional.one_hot(inputs["target"], 6).double()

    from_indices, index_gradients = gradients(case, inputs)
    from_one_hot, one_hot_gradients = gradients(case, {**inputs, "target": one_hot})

    torch.testing.assert_close(from_one_hot, from_indices)
    for name, gradient in index_gradients.items():
        torch.testing.assert_close(one_hot_gradients[name], gradient)


# The module around the function


@every_case_and_kind
def test_the_module_computes_the_function(case, kind):
    inputs = case.make(kind)
    for reduction in ("mean", "sum", "none"):
        module = case.module(**case.module_settings, reduction=reduction)

        torch.manual_seed(0)
        value = module(*case.module_arguments(inputs))

        assert_equal(value, case(inputs, reduction=reduction))


@every_case_and_kind
def test_the_terms_sum_to_the_loss_in_every_reduction(case, kind):
    inputs = case.make(kind)
    for reduction in ("mean", "sum", "none"):
        loss = case(inputs, reduction=reduction)
        terms = case.terms(inputs, reduction=reduction)

        torch.testing.assert_close(sum(terms.values()), loss)
        assert all(term.shape == loss.shape for term in terms.values())


@every_case_and_kind
def test_the_gradients_of_the_terms_sum_to_that_of_the_loss(case, kind):
    inputs = case.make(kind, dtype=torch.float64)
    _, expected = gradients(case, inputs)
    leaves = [inputs[name].requires_grad_() for name in case.trained]

    terms = case.terms(inputs)

    total = dict.fromkeys(case.trained, 0.0)
    for part in terms.values():
        if part.requires_grad:
            found = torch.autograd.grad(part, leaves, allow_unused=True, retain_graph=True)
            for name, gradient in zip(case.trained, found, strict=True):
                total[name] = total[name] + (0.0 if gradient is None else gradient)
    for name, gradient in expected.items():
        torch.testing.assert_close(total[name], gradient)


@every_case_once
def test_the_module_holds_no_state_and_can_be_copied(case, kind):
    inputs = case.make(kind)
    module = case.module(**case.module_settings)
    arguments = case.module_arguments(inputs)

    def value(called) -> Tensor:
        torch.manual_seed(0)
        return called(*arguments)

    assert list(module.parameters()) == []
    assert module.state_dict() == {}
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_equal(value(twin), value(module))


# Precision


@pytest.mark.parametrize("dtype", HALF_PRECISION)
@every_case_and_kind
def test_half_precision_is_computed_in_float32(case, kind, dtype):
    half = case.make(kind, dtype=dtype)
    widened = {
        name: tensor.float() if tensor.dtype == dtype else tensor for name, tensor in half.items()
    }

    loss, found = gradients(case, half)
    expected, _ = gradients(case, widened)

    assert loss.dtype == torch.float32
    assert_equal(loss, expected)
    for gradient in found.values():
        assert gradient.dtype == dtype
        assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_case_and_kind
def test_autocast_changes_nothing(case, kind, dtype):
    inputs = case.make(kind, dtype=dtype)

    expected, expected_gradients = gradients(case, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, found = gradients(case, inputs)

    assert loss.dtype == torch.float32
    assert_equal(loss, expected)
    for name, gradient in found.items():
        assert_equal(gradient, expected_gradients[name])


@pytest.mark.parametrize("num_classes", [2, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF_PRECISION])
@every_case_and_kind
def test_extreme_logits_give_finite_values_and_gradients(case, kind, dtype, num_classes):
    inputs = case.make(kind, 8, num_classes, dtype)
    for number, name in enumerate(name for name in case.inputs if "logits" in name):
        # Signs differ between the inputs, so that sure and wrong predictions meet.
        signs = torch.randn(8, num_classes, generator=torch.Generator().manual_seed(number)).sign()
        inputs[name] = (1e4 * signs).to(dtype)

    loss, found = gradients(case, inputs)

    assert bool(torch.isfinite(loss))
    assert all(bool(torch.isfinite(gradient).all()) for gradient in found.values())


@pytest.mark.parametrize("extreme", [1e4, -1e4])
@every_case_and_kind
def test_one_sample_with_an_extreme_class_gives_finite_values_and_gradients(case, kind, extreme):
    for column in range(3):
        inputs = case.make(kind, 1, 3)
        for name in case.inputs:
            if "logits" in name:
                inputs[name][0, column] = extreme

        loss, found = gradients(case, inputs)

        assert bool(torch.isfinite(loss))
        assert all(bool(torch.isfinite(gradient).all()) for gradient in found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("case", "kind"), deterministic(CASES_AND_INDICES), ids=case_id)
def test_the_other_logits_follow_the_precision_of_the_first(case, kind, dtype):
    others = [name for name in case.inputs if "logits" in name and name != "logits"]
    inputs = case.make(kind, dtype=torch.float64)
    expected = case(inputs)
    inputs = {**inputs, "logits": inputs["logits"].to(dtype)}
    for name in others:
        inputs[name] = inputs[name].half()

    value = case(inputs)

    assert value.dtype == dtype
    tolerance = 2e-2 if others else 1e-5
    torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("case", "kind"),
    [pair for pair in CASES_AND_INDICES if pair[0].teacher],
    ids=case_id,
)
def test_a_teacher_of_higher_precision_does_not_widen_the_loss(case, kind):
    inputs = case.make(kind)

    value = case({**inputs, "teacher_logits": inputs["teacher_logits"].double()})

    assert value.dtype == torch.float32
    assert_equal(value, case(inputs))


# Kinds of labels, layouts in memory


@pytest.mark.parametrize("dtype", INTEGERS)
@every_case_once
def test_labels_and_votes_of_every_integer_dtype_give_the_same(case, kind, dtype):
    inputs = case.make(kind)
    narrow = {
        name: tensor.to(dtype) if name in ("target", "votes") else tensor
        for name, tensor in inputs.items()
    }

    assert_equal(case(narrow), case(inputs))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, 2e-2)],
)
@pytest.mark.parametrize(
    ("case", "kind"), [pair for pair in CASES_AND_KINDS if pair[1] in (MIXED, DENSE)], ids=case_id
)
def test_probabilities_of_lower_precision_are_close(case, kind, dtype, tolerance):
    inputs = case.make(kind, dtype=torch.float64)

    value = case({**inputs, "target": inputs["target"].to(dtype)})

    assert value.dtype == torch.float64
    torch.testing.assert_close(value, case(inputs), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("case", "kind"), deterministic(CASES_AND_KINDS), ids=case_id)
def test_tensors_that_are_not_contiguous_give_the_same(case, kind):
    def spread(tensor: Tensor) -> Tensor:
        if tensor.dim() == 1:
            return torch.stack((tensor, tensor), 1)[:, 0]
        return tensor.t().contiguous().t()

    inputs = case.make(kind)
    spread_out = {name: spread(tensor) for name, tensor in inputs.items()}
    assert not any(tensor.is_contiguous() for tensor in spread_out.values())

    expected, expected_gradients = gradients(case, inputs)
    torch.set_warn_always(True)  # else torch warns once a program, and a later case hides it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss, found = gradients(case, spread_out)
    finally:
        torch.set_warn_always(False)

    torch.testing.assert_close(loss, expected)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected_gradients[name])


@pytest.mark.parametrize(("case", "kind"), deterministic(CASES_AND_INDICES), ids=case_id)
def test_an_expanded_row_of_logits_gives_the_same(case, kind):
    inputs = case.make(kind, batch_size=3)
    row = inputs["logits"][:1]

    expanded = case({**inputs, "logits": row.expand(3, -1)})

    torch.testing.assert_close(expanded, case({**inputs, "logits": row.repeat(3, 1)}))


def test_every_loss_of_the_package_is_in_the_table_of_cases_or_has_tests_of_its_own():
    from softlabels import losses

    public = {name for name in losses.__all__ if name.endswith(("_loss", "Loss"))}
    in_table = {c.function.__name__ for c in CASES} | {c.module.__name__ for c in CASES}

    assert all(isinstance(case, LossCase) for case in CASES)
    assert in_table <= public
    for name in public - in_table:
        kind = getattr(losses, name).__module__.rpartition(".")[2]
        own = Path(__file__).with_name(f"test_{kind}.py")
        assert re.search(rf"\b{name}\b", own.read_text(encoding="utf-8")), name
