"""CS-KD against the reference's numbers, and against plain sums."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from shared.golden_vectors import assert_close, cases_of
from softlabels.losses.cs_kd import CSKDLoss


@pytest.mark.parametrize("case", cases_of("cs_kd"))
def test_the_reference(case):
    logits = case["logits"].requires_grad_()
    partner_logits = case["partner_logits"].requires_grad_()

    divergence = CSKDLoss(temperature=float(case["temperature"]))(logits, partner_logits)
    loss = float(case["weight"]) * divergence
    loss.backward(retain_graph=True)

    assert_close(divergence.detach(), case["kd"])
    assert_close(loss.detach(), case["loss"])
    assert_close(logits.grad, case["grad_logits"])
    assert partner_logits.grad is None
    total = loss + functional.cross_entropy(logits, case["target"])
    assert_close(torch.autograd.grad(total, logits)[0], case["grad_total_logits"])


def test_plain_sums():
    generator = torch.Generator().manual_seed(1)
    logits, partner_logits = torch.randn(2, 3, 6, generator=generator).double()
    module = CSKDLoss(temperature=2.5, reduction="none")

    values = module(logits, partner_logits)

    for row, partner, value in zip(logits.tolist(), partner_logits.tolist(), values, strict=True):
        p = [math.exp(z / 2.5) for z in row]
        q = [math.exp(z / 2.5) for z in partner]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        by_hand = 2.5**2 * sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
        assert float(value) == pytest.approx(by_hand, rel=1e-12)


def test_equal_predictions_cost_nothing():
    logits = torch.randn(3, 5, requires_grad=True)

    loss = CSKDLoss()(logits, logits.detach() + 7.0)
    loss.backward()

    assert float(loss.detach()) == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(logits.grad, torch.zeros(3, 5), atol=1e-6, rtol=0)


def test_half_precision_is_widened_and_large_logits_stay_finite():
    logits = (torch.randn(2, 5) * 1e4).half().requires_grad_()

    loss = CSKDLoss()(logits, logits.detach().flip(1))
    loss.backward()

    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_soft_labels_are_the_partner_softened():
    partner_logits = torch.tensor([[16.0, 4, 1, 1]]).log()

    soft = CSKDLoss(temperature=2.0).soft_labels(
        torch.zeros(1, 4), partner_logits, torch.tensor([1])
    )

    # Square roots 4 : 2 : 1 : 1.
    torch.testing.assert_close(soft.target, torch.tensor([[0, 0.25, 0, 0]]))
    torch.testing.assert_close(soft.non_target, torch.tensor([[4 / 6, 0, 1 / 6, 1 / 6]]))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "partner_logits must have", lambda x: CSKDLoss()(x, x[:, :3])),
        (ValueError, "logits must be", lambda x: CSKDLoss()(x[0], x[0])),
        (TypeError, "partner_logits must be a float", lambda x: CSKDLoss()(x, x.long())),
    ],
)
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 4))
