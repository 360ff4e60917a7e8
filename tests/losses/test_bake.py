"""BAKE against the reference's numbers, and against spreading step by step."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from shared.golden_vectors import assert_close, cases_of
from softlabels.losses.bake import BAKELoss, bake_targets


def settings_of(case):
    return {name: float(case[name]) for name in ("temperature", "omega")}


@pytest.mark.parametrize("case", cases_of("bake"))
def test_the_reference(case):
    logits, features = case["logits"].requires_grad_(), case["features"].requires_grad_()

    divergence = BAKELoss(**settings_of(case))(logits, [features])
    loss = float(case["weight"]) * divergence
    loss.backward(retain_graph=True)

    targets = bake_targets(logits, features, **settings_of(case))
    assert_close(targets, case["ensembled_target"])
    assert not targets.requires_grad
    assert_close(divergence.detach(), case["kd"])
    assert_close(loss.detach(), case["loss"])
    assert_close(logits.grad, case["grad_logits"])
    assert features.grad is None
    total = loss + functional.cross_entropy(logits, case["target"])
    assert_close(torch.autograd.grad(total, logits)[0], case["grad_total_logits"])


def test_spreading_step_by_step():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 3, generator=generator).double()
    features = torch.randn(5, 4, generator=generator).double()
    affinity = torch.zeros(5, 5).double()
    for i in range(5):
        for j in range(5):
            if i != j:
                lengths = features[i].norm() * features[j].norm()
                affinity[i, j] = (features[i].dot(features[j]) / lengths).exp()
        affinity[i] /= affinity[i].sum()
    predicted = (logits / 2).softmax(1)
    spread = predicted
    for _ in range(200):
        spread = 0.7 * affinity @ spread + (1 - 0.7) * predicted

    assert_close(bake_targets(logits, features, temperature=2.0, omega=0.7), spread)
    divergence = 4 * (spread * (spread / predicted).log()).sum(1)
    module = BAKELoss(temperature=2.0, omega=0.7, reduction="none")
    assert_close(module(logits, [features]), divergence)


@pytest.mark.parametrize(("logits", "omega"), [(torch.randn(1, 4), 0.9), (torch.randn(3, 4), 0.0)])
def test_without_neighbors_each_keeps_its_own(logits, omega):
    features = torch.randn(len(logits), 6)

    targets = bake_targets(logits, features, temperature=1.0, omega=omega)

    torch.testing.assert_close(targets, logits.softmax(1))
    assert float(BAKELoss(omega=omega)(logits, [features])) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1.0, 6e4])
def test_hazards_stay_finite(scale):
    # Rows of zeros and equal rows; certain predictions.
    logits = (torch.eye(3) * 6e4).half().requires_grad_()
    features = (torch.tensor([[0.0, 0], [1, 1], [1, 1]]) * scale).half()

    loss = BAKELoss(omega=0.99)(logits, [features])
    loss.backward()

    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_rows_of_zeros_are_as_near_to_all_others():
    logits = torch.tensor([[0.0, 0], [3, 0], [0, 3], [0, 0]])

    targets = bake_targets(logits, torch.zeros(4, 2), temperature=1.0)

    # The others' evidence cancels out for the first.
    torch.testing.assert_close(targets[0], torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(targets.sum(1), torch.ones(4))


def test_soft_labels_are_the_ensembled_predictions():
    logits, features = torch.randn(4, 5), torch.randn(4, 6)
    target = torch.tensor([0, 4, 2, 2])

    soft = BAKELoss(omega=0.3).soft_labels(logits, [features], target)

    targets = bake_targets(logits, features, omega=0.3)
    own = targets.gather(1, target[:, None])
    torch.testing.assert_close(soft.target.sum(1, keepdim=True), own)
    torch.testing.assert_close(soft.target + soft.non_target * (1 - own), targets)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "features and logits must be of one batch", lambda x: BAKELoss()(x, [x[:1]])),
        (ValueError, "features must be", lambda x: bake_targets(x, x[0])),
        (TypeError, "features must be a float", lambda x: BAKELoss()(x, [x.long()])),
        (ValueError, "omega must be below 1, got 1.0", lambda x: bake_targets(x, x, omega=1.0)),
        (ValueError, "omega must be below 1, got 1.0", lambda x: BAKELoss(omega=1.0)),
        (ValueError, "temperature", lambda x: bake_targets(x, x, temperature=0.0)),
        (ValueError, "features must be a list of one", lambda x: BAKELoss()(x, [x, x])),
    ],
)
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 4))
