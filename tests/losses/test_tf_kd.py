"""Tf-KD with a virtual teacher: the vectors of the published code, by hand, corner cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from shared.by_hand import rows
from shared.golden_vectors import assert_close, cases_of
from softlabels.losses.tf_kd import TfKDLoss


def test_values_and_gradients_of_the_published_code():
    cases = cases_of("tf_kd")
    assert len(cases) == 4
    for case in cases:
        logits = case["logits"].requires_grad_()
        target, alpha = case["target"], case["alpha"]
        method = TfKDLoss(
            temperature=float(case["temperature"]),
            multiplier=float(case["multiplier"]),
            correct_probability=float(case["correct_probability"]),
        )
        term = method(logits, target)
        task = functional.cross_entropy(logits, target)
        whole = (1 - alpha) * task + alpha * term
        weight_one = task + alpha * term

        assert_close(term, case["multiplier"] * case["kl_element_mean"])
        assert_close(whole, case["loss"])
        assert_close(weight_one, case["loss_ce_weight_one"])
        (gradient,) = torch.autograd.grad(whole, logits, retain_graph=True)
        assert_close(gradient, case["grad_logits"])
        (gradient,) = torch.autograd.grad(weight_one, logits)
        assert_close(gradient, case["grad_ce_weight_one_logits"])
        soft = method.soft_labels(logits, target)
        at_label = target.unsqueeze(1)
        assert_close(
            soft.target.gather(1, at_label), case["virtual_teacher_soft"].gather(1, at_label)
        )


def test_the_recommended_weights_are_the_published_ones():
    alphas = {float(case["alpha"]) for case in cases_of("tf_kd")}
    assert TfKDLoss.defaults.weight in alphas
    assert TfKDLoss.defaults.task_weight == 1 - TfKDLoss.defaults.weight


def test_one_sample_by_hand():
    # Temperature 0.5, a = 0.75: u / tau = (1.5, 0.25, 0.25); S is uniform over 3 classes.
    # KL = ln 3 - entropy of softmax(1.5, 0.25, 0.25); times 6 / 3.
    powers = [math.exp(1.5), math.exp(0.25), math.exp(0.25)]
    shares = [power / sum(powers) for power in powers]
    expected = 2 * (math.log(3) + sum(share * math.log(share) for share in shares))

    method = TfKDLoss(temperature=0.5, multiplier=6.0, correct_probability=0.75)
    value = method(torch.zeros(1, 3).double(), torch.tensor([0]))

    assert float(value) == pytest.approx(expected, rel=1e-12)


def test_mixed_labels_mix_the_virtual_teachers():
    logits = torch.randn(1, 4, generator=torch.Generator().manual_seed(0)).double()
    label = rows([0, 0.7, 0.3, 0])
    # u = 0.7 (1/3 0.1, 0.9, ...) + 0.3 (..., 0.9, 1/3 0.1), with a = 0.9.
    low = 0.1 / 3
    virtual = rows([low, 0.63 + 0.3 * low, 0.27 + 0.7 * low, low])
    believed = (virtual / 2).softmax(1)
    expected = (believed * (believed.log() - logits.log_softmax(1))).sum() / 4

    method = TfKDLoss(temperature=2.0, multiplier=1.0, correct_probability=0.9)
    value = method(logits, label)

    assert_close(value, expected)


def test_a_student_that_is_the_virtual_teacher_has_no_loss():
    target = torch.tensor([2, 0])
    virtual = torch.full((2, 5), 0.01 / 4, dtype=torch.float64)
    virtual[[0, 1], target] = 0.99
    student = (virtual / 20).requires_grad_()

    loss = TfKDLoss()(student, target)
    loss.backward()

    assert abs(float(loss.detach())) < 1e-12
    assert float(student.grad.abs().max()) < 1e-12


def test_reductions_and_ignored_samples():
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).double()
    target = torch.tensor([1, -1, 3])
    kept = target >= 0

    none = TfKDLoss(ignore_index=-1, reduction="none")(logits, target)
    alone = TfKDLoss(reduction="none")(logits[kept], target[kept])

    assert_close(none[kept], alone)
    assert float(none[1]) == 0
    assert_close(TfKDLoss(ignore_index=-1)(logits, target), alone.mean())
    assert_close(TfKDLoss(ignore_index=-1, reduction="sum")(logits, target), alone.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extreme_logits_are_finite(dtype):
    largest = 1e4 if dtype == torch.float16 else 1e30
    logits = (largest * torch.tensor([[1.0, 0.0, -1.0]])).to(dtype).requires_grad_()

    loss = TfKDLoss()(logits, torch.tensor([2]))
    loss.backward()

    assert loss.dtype == torch.float32
    assert bool(torch.isfinite(loss))
    assert bool(torch.isfinite(logits.grad).all())


def test_soft_labels_spread_the_rest_evenly():
    logits = torch.zeros(2, 4, dtype=torch.float16)
    soft = TfKDLoss(temperature=1.0).soft_labels(logits, torch.tensor([1, 3]))

    power = math.exp(0.99 - 0.01 / 3)
    at_label = power / (power + 3)
    assert soft.target.dtype == torch.float32
    torch.testing.assert_close(soft.target[0], torch.tensor([0, at_label, 0, 0]))
    torch.testing.assert_close(soft.non_target[1], torch.tensor([1, 1, 1, 0]) / 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"multiplier": -1.0}, ValueError, "multiplier must be finite, 0 or more"),
        ({"correct_probability": 1.5}, ValueError, "correct_probability must be .* at most 1"),
    ],
)
def test_wrong_settings_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        TfKDLoss(**change)


def test_wrong_inputs_are_refused():
    with pytest.raises(ValueError, match="target must lie in"):
        TfKDLoss()(torch.zeros(1, 3), torch.tensor([3]))
    with pytest.raises(ValueError, match=r"logits must be \[B, C\]"):
        TfKDLoss()(torch.zeros(3), torch.tensor([0]))
