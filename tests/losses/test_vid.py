"""VID against the published numbers and the normal law's density."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal

from shared.golden_vectors import assert_close, cases_of
from shared.map_draws import drawn, heads_of
from softlabels.losses.vid import VIDLoss

CASES = cases_of("vid")


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_published_ones(case) -> None:
    student = case["student_map"].clone().requires_grad_()
    values = {"student_maps": [student], "teacher_maps": [case["teacher_map"]]}
    method = VIDLoss(initial_variance=float(case["init_pred_var"]), min_variance=float(case["eps"]))
    heads = heads_of(method, values)
    regressor, scale = heads.regressors[0], heads.scales[0]
    with torch.no_grad():
        for number in range(3):
            regressor[2 * number].weight.copy_(case[f"regressor_weight_{number}"])
        scale.copy_(case["log_scale"])
    given = heads(values)
    # The larger student map is pooled in the heads; the larger teacher map in the loss.
    assert_close(given["student_maps"][0], case["mean"])
    assert_close(given["variances"][0], case["variance"])
    loss = method(**{**values, **given})
    assert_close(loss, case["unweighted"])
    (case["weight"] * loss).backward()
    assert_close(case["weight"] * loss, case["loss"])
    assert_close(student.grad, case["grad_student_map"])
    assert_close(scale.grad, case["grad_log_scale"])
    for number in range(3):
        assert_close(regressor[2 * number].weight.grad, case[f"grad_regressor_weight_{number}"])


def test_it_is_minus_the_log_density_without_its_constant() -> None:
    mean, teacher = drawn((2, 3, 4, 4), (2, 5, 2, 2)), drawn((2, 3, 4, 4), (2, 5, 2, 2), seed=1)
    variances = [tensor.exp() for tensor in drawn((3,), (5,), seed=2)]
    expected = 0.0
    for ours, theirs, variance in zip(mean, teacher, variances, strict=True):
        law = Normal(ours, variance.sqrt()[:, None, None])
        constant = Normal(0.0, 1.0).log_prob(torch.zeros((), dtype=torch.float64))
        expected += (constant - law.log_prob(theirs)).mean()
    assert_close(VIDLoss()(mean, teacher, variances), expected)


def test_the_best_variance_is_the_mean_squared_gap() -> None:
    (mean,), (teacher,) = drawn((4, 3, 5, 5)), drawn((4, 3, 5, 5), seed=1)
    variance = (mean - teacher).square().mean((0, 2, 3)).requires_grad_()
    VIDLoss()([mean], [teacher], [variance]).backward()
    assert_close(variance.grad, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("initial", [1e-3, 0.05, 5.0, 100.0, 1e4])
def test_variances_begin_where_they_are_asked_to(initial) -> None:
    # log(exp(1e4) - 1) overflows if it is written so.
    values = {"student_maps": drawn((2, 3, 4, 4)), "teacher_maps": drawn((2, 5, 4, 4))}
    heads = heads_of(VIDLoss(initial_variance=initial), values)
    (variance,) = heads(values)["variances"]
    torch.testing.assert_close(variance, torch.full_like(variance, initial), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [-1e4, -100.0, 100.0, 1e4])
def test_variances_are_finite_and_positive_at_any_scale(scale) -> None:
    values = {"student_maps": drawn((2, 3, 4, 4)), "teacher_maps": drawn((2, 5, 4, 4))}
    heads = heads_of(VIDLoss(), values)
    with torch.no_grad():
        heads.scales[0].fill_(scale)
    given = heads(values)
    loss = VIDLoss()(**{**values, **given})
    loss.backward()
    torch.testing.assert_close(
        given["variances"][0], torch.full((5,), max(scale, 0) + 1e-5, dtype=torch.float64)
    )
    assert loss.isfinite()
    assert heads.scales[0].grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in heads.parameters())


def test_half_precision_heads_have_float32_variances() -> None:
    values = {"student_maps": drawn((2, 3, 4, 4)), "teacher_maps": drawn((2, 5, 4, 4))}
    heads = heads_of(VIDLoss(), values, torch.bfloat16)
    half = {name: [map.bfloat16() for map in maps] for name, maps in values.items()}
    assert heads(half)["variances"][0].dtype == torch.float32


def test_variances_of_the_deepest_levels_are_used_and_one_sample_will_do() -> None:
    (mean,), (teacher,) = drawn((1, 3, 2, 2)), drawn((1, 3, 2, 2), seed=1)
    variances = [torch.ones(7), torch.full((3,), 2.0, dtype=torch.float64)]
    assert_close(
        VIDLoss()([mean], [teacher], variances), VIDLoss()([mean], [teacher], variances[1:])
    )


@pytest.mark.parametrize(
    ("variances", "error", "message"),
    [
        (torch.ones(3), TypeError, "variances must be a list of tensors, got Tensor"),
        ([], ValueError, "one tensor for each of 1 levels, got 0"),
        ([torch.ones(4)], ValueError, r"of 3 channels must be \[3\], got \(4,\)"),
        ([torch.ones(3).int()], TypeError, "each of variances must be a floating-point tensor"),
    ],
)
def test_variances_that_do_not_fit_are_told(variances, error, message) -> None:
    map = torch.ones(1, 3, 2, 2)
    with pytest.raises(error, match=message):
        VIDLoss()([map], [map], variances)


def test_wrong_settings_are_told() -> None:
    with pytest.raises(ValueError, match="initial_variance must be above min_variance"):
        VIDLoss(initial_variance=0.1, min_variance=0.1)
    with pytest.raises(ValueError, match="min_variance must be finite, above 0, got 0"):
        VIDLoss(min_variance=0.0)
    with pytest.raises(TypeError, match="variances is missing: it comes from the module"):
        VIDLoss()([torch.ones(1, 3, 2, 2)], [torch.ones(1, 3, 2, 2)])
