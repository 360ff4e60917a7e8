"""KDCL by hand with each ensemble."""

from __future__ import annotations

import math

import pytest
import torch

from shared.by_hand import assert_six_digits, logits_of, rows
from softlabels.losses.kd import kd_loss
from softlabels.losses.kdcl import KDCLLoss

ENSEMBLES = ("min_logit", "naive", "linear", "average")
TARGET = torch.tensor([0])


def logits(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def soft(student, peer, target, ensemble, temperature=1.0):
    module = KDCLLoss(ensemble=ensemble, temperature=temperature)
    label = module.soft_labels(student, peer, target)
    return label.target + label.non_target * (1 - label.target.sum(1, keepdim=True))


def test_all_parts_by_hand():
    # S = (2, 1, 1) / 4 and P = (1, 2, 1) / 4. Lowered by the logit of class 0 they are, as
    # factors, (1, 1/2, 1/2) and (1, 2, 1), the smaller ones (1, 1/2, 1/2): the student.
    # It learns nothing; the peer 1/2 ln 2 + 1/4 ln(1/2) = 1/4 ln 2 = 0.173287 at temperature 1.
    # The peer's own cross-entropy is ln 4 = 1.386294.
    student, peer = logits_of([2, 1, 1]), logits_of([1, 2, 1])

    method = KDCLLoss(temperature=1.0)
    loss, terms = method(student, peer, TARGET), method.reduced(student, peer, TARGET)

    assert_six_digits(terms["student"], 0.0)
    assert_six_digits(terms["peer"], 0.173287)
    assert_six_digits(terms["peer_cross_entropy"], 1.386294)
    assert_six_digits(loss, 1.559582)
    weighted = KDCLLoss(temperature=1.0, distillation_weight=3.0)(student, peer, TARGET)
    assert_six_digits(weighted, 1.386294 + 3 * 0.173287)


def test_temperature_two_with_its_square():
    # Square roots: the ensemble (4, 1, 1) / 6 (the student), the peer (1, 4, 1) / 6.
    # (4 ln 4 + 1 ln(1/4)) / 6 = ln 2; times 2^2 = 2.772589.
    terms = KDCLLoss().reduced(logits_of([16, 1, 1]), logits_of([1, 16, 1]), TARGET)

    assert_six_digits(terms["student"], 0.0)
    assert_six_digits(terms["peer"], 2.772589)


def test_each_ensemble_by_hand():
    student, peer = logits_of([4, 4, 1, 1]), logits_of([2, 1, 2, 1])

    # Lowered by class 0: (1, 1, 1/4, 1/4) and (1, 1/2, 1, 1/2), the smaller (1, 1/2, 1/4, 1/4).
    assert_six_digits(soft(student, peer, TARGET, "min_logit")[0], [4 / 8, 2 / 8, 1 / 8, 1 / 8])
    # Class 0 has 4/10 of the student and 2/6 of the peer; class 2 has 1/10 and 2/6.
    assert_six_digits(soft(student, peer, TARGET, "naive")[0], [0.4, 0.4, 0.1, 0.1])
    in_peer = soft(student, peer, torch.tensor([2]), "naive")
    assert_six_digits(in_peer[0], [1 / 3, 1 / 6, 1 / 3, 1 / 6])
    # Means of logarithms: square roots of (8, 4, 2, 1).
    roots = [math.sqrt(value) for value in (8, 4, 2, 1)]
    assert_six_digits(
        soft(student, peer, TARGET, "average")[0], [value / sum(roots) for value in roots]
    )


def test_linear_has_the_least_cross_entropy_of_all_shares():
    student, peer = 3 * logits(6, 4), 3 * logits(6, 4, seed=1)
    target = torch.tensor([[0.7, 0.0, 0.3, 0.0], [0.0, 0.5, 0.0, 0.5]] * 3, dtype=torch.float64)

    log_found = soft(student, peer, target, "linear").log()
    found = -(target * log_found).sum(1)

    shares = torch.linspace(0, 1, 2001, dtype=torch.float64).reshape(-1, 1, 1)
    all_logs = ((1 - shares) * student + shares * peer).log_softmax(2)
    least, where = (-(target * all_logs).sum(2)).min(0)
    torch.testing.assert_close(found, least, rtol=0, atol=1e-5)
    assert (found <= least + 1e-6).all()
    # Some of the six lie between both networks, where a choice would not do.
    assert ((where > 0) & (where < 2000)).any()


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_both_networks_learn_and_the_ensemble_does_not(ensemble):
    student, peer = logits(3, 4).requires_grad_(), logits(3, 4, seed=1).requires_grad_()
    target = torch.tensor([0, 3, 2])

    KDCLLoss(ensemble=ensemble)(student, peer, target).backward()

    # T^2 KL has the gradient T (q - e) / B.
    label = soft(student.detach(), peer.detach(), target, ensemble, 2.0)
    one_hot = torch.nn.functional.one_hot(target, 4)
    expected = 2 * ((student / 2).softmax(1) - label) / 3
    of_peer = 2 * ((peer / 2).softmax(1) - label) / 3 + (peer.softmax(1) - one_hot) / 3
    torch.testing.assert_close(student.grad, expected.detach())
    torch.testing.assert_close(peer.grad, of_peer.detach())


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_extremes_stay_finite(ensemble):
    student = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]]).half().requires_grad_()
    peer = torch.tensor([[-1e4, 1e4, 0.0], [0.0, 0.0, 0.0]]).half().requires_grad_()

    loss = KDCLLoss(ensemble=ensemble)(student, peer, torch.tensor([0, 1]))
    loss.backward()

    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    assert peer.grad.isfinite().all()


def test_equal_networks_learn_from_the_labels_alone():
    same, target = logits(3, 4), torch.tensor([0, 3, 2])

    for ensemble in ENSEMBLES:
        loss = KDCLLoss(ensemble=ensemble)(same, same, target)
        torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(same, target))


def test_mixed_labels_count_by_their_largest_in_min_logit():
    student, peer = logits(1, 4), logits(1, 4, seed=1)
    mixed = rows([0.3, 0.0, 0.7, 0.0])

    of_mixed = KDCLLoss().reduced(student, peer, mixed)
    of_largest = KDCLLoss().reduced(student, peer, torch.tensor([2]))

    assert of_mixed["student"] == of_largest["student"]
    expected = -(mixed * peer.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(of_mixed["peer_cross_entropy"], expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_divergence_is_weighted_kd_from_the_ensemble(reduction):
    student, peer, target = logits(2, 4), logits(2, 4, seed=1), torch.tensor([0, 3])
    settings = {
        "ensemble": "average",
        "temperature": 3.0,
        "distillation_weight": 0.5,
        "reduction": reduction,
    }

    terms = KDCLLoss(**settings).reduced(student, peer, target)

    mean = (student + peer) / 2
    divergence = kd_loss(student, mean, temperature=3.0, reduction=reduction)
    torch.testing.assert_close(terms["student"], 0.5 * divergence)


def test_errors_say_what_was_got():
    good, target = logits(2, 4), torch.tensor([0, 3])
    with pytest.raises(ValueError, match=r"peer_logits must have the shape of logits \(2, 4\)"):
        KDCLLoss()(good, good[:, :3], target)
    with pytest.raises(TypeError, match="peer_logits must be a floating-point tensor"):
        KDCLLoss()(good, good.long(), target)
    with pytest.raises(ValueError, match=r"target must lie in \[0, 4\)"):
        KDCLLoss()(good, good, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"ensemble must be one of 'min_logit', .* got 'general'"):
        KDCLLoss(ensemble="general")


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_ignored_samples_count_nothing_and_have_soft_labels(ensemble):
    student, peer = logits(3, 4), logits(3, 4, seed=1)
    target, kept = torch.tensor([2, -1, 3]), torch.tensor([0, 2])
    method = KDCLLoss(ensemble=ensemble, ignore_index=-1)

    loss = method(student, peer, target)
    label = method.soft_labels(student, peer, target)

    of_kept = student[kept], peer[kept], target[kept]
    torch.testing.assert_close(loss, KDCLLoss(ensemble=ensemble)(*of_kept))
    expected = KDCLLoss(ensemble=ensemble).soft_labels(*of_kept)
    torch.testing.assert_close(label.target[kept], expected.target)
