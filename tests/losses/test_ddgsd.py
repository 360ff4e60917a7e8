"""DDGSD against the reference's numbers, and against plain sums."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from shared.golden_vectors import assert_close, cases_of
from softlabels.losses.ddgsd import DDGSDLoss

NAMES = ("logits_0", "features_0", "logits_1", "features_1")


def listed(logits, features, second_logits, second_features, target):
    """The arguments of a call, where features come as a list of one stage."""
    return logits, [features], second_logits, [second_features], target


@pytest.mark.parametrize("case", cases_of("ddgsd"))
def test_the_reference(case):
    inputs = [case[name].requires_grad_() for name in NAMES]
    arguments = listed(*inputs, case["target"])
    settings = {name: float(case[name]) for name in ("temperature", "feature_weight")}

    method = DDGSDLoss(**settings, second_view_weight=0.0)
    loss, terms = method(*arguments), method.reduced(*arguments)

    assert_close(loss.detach(), case["loss"])
    assert_close(terms["first_divergence"].detach(), case["kl_0"])
    assert_close(terms["second_divergence"].detach(), case["kl_1"])
    gap = settings["feature_weight"] * case["feature_gap_squared"]
    assert_close(terms["feature_gap"].detach(), gap)
    for name, gradient in zip(NAMES, torch.autograd.grad(loss, inputs), strict=True):
        assert_close(gradient, case[f"grad_{name}"])


@pytest.mark.parametrize("case", cases_of("ddgsd"))
def test_the_published_objective(case):
    # The cross-entropy is halved twice there: 0.25 of each view's mean.
    inputs = [case[name].requires_grad_() for name in NAMES]
    arguments = listed(*inputs, case["target"])
    settings = {name: float(case[name]) for name in ("temperature", "feature_weight")}

    loss = DDGSDLoss(**settings, second_view_weight=0.25)(*arguments)
    total = 0.25 * functional.cross_entropy(inputs[0], case["target"]) + loss

    assert_close(total.detach(), case["total"])
    for name, gradient in zip(NAMES, torch.autograd.grad(total, inputs), strict=True):
        assert_close(gradient, case[f"grad_total_{name}"])


def drawn():
    generator = torch.Generator().manual_seed(2)
    logits, second_logits = torch.randn(2, 3, 4, generator=generator).double()
    features, second_features = torch.randn(2, 3, 5, generator=generator).double()
    return listed(logits, features, second_logits, second_features, torch.tensor([3, 0, 1]))


def test_plain_sums():
    logits, (features,), second_logits, (second_features,), target = drawn()

    method = DDGSDLoss(temperature=3.0, feature_weight=0.7, second_view_weight=0.3)
    loss = method(*drawn())

    def softmax(row, temperature):
        powers = [math.exp(z / temperature) for z in row]
        return [power / sum(powers) for power in powers]

    by_hand = 0.0
    for a, b, label in zip(logits.tolist(), second_logits.tolist(), target.tolist(), strict=True):
        p, q = softmax(a, 3.0), softmax(b, 3.0)
        by_hand += 9 / 3 * sum(y * math.log(y / x) for x, y in zip(p, q, strict=True))
        by_hand += 9 / 3 * sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
        by_hand -= 0.3 / 3 * math.log(softmax(b, 1.0)[label])
    means = [sum(sum(row) for row in x.tolist()) / 15 for x in (features, second_features)]
    by_hand += 0.7 * (means[0] - means[1]) ** 2
    assert float(loss) == pytest.approx(by_hand, rel=1e-12)


def test_equal_views_leave_the_cross_entropy_alone():
    logits, features, *_, target = drawn()

    loss = DDGSDLoss()(logits, features, logits, features, target)

    assert_close(loss, 0.5 * functional.cross_entropy(logits, target))


def test_labels_may_be_probabilities():
    logits, features, second_logits, second_features, target = drawn()
    one_hot = functional.one_hot(target, 4).float()

    loss = DDGSDLoss()(logits, features, second_logits, second_features, one_hot)

    assert_close(loss, DDGSDLoss()(*drawn()))


def test_half_precision_is_widened_and_one_large_sample_stays_finite():
    logits = torch.tensor([[6e4, -6e4, 0.0]]).half().requires_grad_()
    features = torch.full((1, 8), 6e4).half().requires_grad_()

    loss = DDGSDLoss()(logits, [features], logits.flip(1), [-features], torch.tensor([1]))
    loss.backward()

    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "second_logits must have", {"second_logits": torch.zeros(3, 5)}),
        (ValueError, "features and logits must be of one batch", {"features": [torch.zeros(2, 5)]}),
        (ValueError, "must have one shape", {"second_features": [torch.zeros(3, 4)]}),
        (TypeError, "features must be a float", {"features": [torch.zeros(3, 5).long()]}),
        (ValueError, "target must", {"target": torch.tensor([0, 1, 4])}),
        (ValueError, "features must be a list of one", {"features": torch.zeros(3, 5)}),
    ],
)
def test_errors(error, message, change):
    names = ("logits", "features", "second_logits", "second_features", "target")
    arguments = {**dict(zip(names, drawn(), strict=True)), **change}

    with pytest.raises(error, match=message):
        DDGSDLoss()(**arguments)
