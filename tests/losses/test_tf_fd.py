"""Tf-FD against the reference's numbers, and against plain sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shared.golden_vectors import assert_close, cases_of
from softlabels.losses.tf_fd import TfFDLoss


@pytest.mark.parametrize("case", cases_of("tf_fd"))
def test_the_reference(case):
    maps = [case[f"map_{level}"].requires_grad_() for level in range(3)]
    weights = {name: float(case[name]) for name in ("intra_weight", "inter_weight")}

    method = TfFDLoss(**weights)
    loss, terms = method(maps), method.reduced(maps)
    loss.backward()

    assert_close(loss.detach(), case["loss"])
    for level, map in enumerate(maps):
        assert_close(map.grad, case[f"grad_map_{level}"])
        alone = TfFDLoss(intra_weight=1.0)([map])
        assert_close(alone.detach(), case[f"intra_{level}"])
    for first, second in ((0, 1), (1, 2), (0, 2)):
        pair = TfFDLoss(intra_weight=0.0, inter_weight=1.0)([maps[first], maps[second]])
        assert_close(pair.detach(), case[f"inter_{first}_{second}"])
    assert_close(sum(terms.values()).detach(), case["loss"])


@pytest.mark.parametrize("case", cases_of("tf_fd"))
def test_the_training_script_divides_by_three(case):
    maps = [case[f"map_{level}"] for level in range(3)]
    weights = {name: float(case[name]) / 3 for name in ("intra_weight", "inter_weight")}

    assert_close(TfFDLoss(**weights)(maps), case["loss_train_script"])


def test_plain_sums():
    generator = torch.Generator().manual_seed(7)
    shallow = torch.randn(3, 4, 4, 4, generator=generator).double()
    deep = torch.randn(3, 6, 2, 2, generator=generator).double()

    intra = 0.0
    for map in (shallow.numpy(), deep.numpy()):
        lengths = np.sqrt((map**2).sum((2, 3), keepdims=True))
        order = np.argsort(-(map / lengths).mean((0, 2, 3)))
        half = map.shape[1] // 2
        pairs = zip(order[:half], order[half:], strict=True)
        intra += np.mean([(map[:, a] - map[:, b]) ** 2 for a, b in pairs])
    pooled = shallow.numpy().reshape(3, 4, 2, 2, 2, 2).mean((3, 5))
    inter = ((pooled - deep.numpy()[:, :4]) ** 2).mean()

    terms = TfFDLoss(intra_weight=0.3, inter_weight=0.7).terms([shallow, deep])

    assert float(terms["intra"]) == pytest.approx(0.3 * intra, rel=1e-12)
    assert float(terms["inter"]) == pytest.approx(0.7 * inter, rel=1e-12)


def test_an_odd_channel_is_left_out_of_the_first_term():
    map = torch.tensor([[[[1.0, 0]], [[5, 5]], [[3, -1]]]])

    # Lengths 1, 7.07, 3.16, so saliences 0.5, 0.707, 0.316: channel 1 against 2, gaps 2 and 6.
    assert float(TfFDLoss(intra_weight=1.0)([map])) == pytest.approx((4 + 36) / 2)


def test_the_deeper_map_is_constant_in_the_second_term():
    maps = [torch.randn(2, 4, 4, 4, requires_grad=True), torch.randn(2, 4, 2, 2)]
    deep = maps[1].requires_grad_()

    TfFDLoss(intra_weight=0.0, inter_weight=1.0)(maps).backward()

    assert maps[0].grad.any()
    assert not deep.grad.any()


def test_equal_channels_and_stages_cost_nothing():
    maps = [torch.ones(2, 4, 4, 4), torch.ones(2, 6, 2, 2), torch.ones(2, 8, 3, 3)]

    assert float(TfFDLoss()(maps)) == 0


def test_zeros_and_large_halves_stay_finite():
    maps = [torch.zeros(1, 2, 2, 2).half(), torch.full((1, 3, 1, 1), 6e4).half()]
    maps = [map.requires_grad_() for map in maps]

    loss = TfFDLoss()(maps)
    loss.backward()

    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert all(map.grad.isfinite().all() for map in maps)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "two channels or more", lambda x: TfFDLoss()([x[:, :1]])),
        (ValueError, "at least one feature map", lambda x: TfFDLoss()([])),
        (ValueError, "of one batch", lambda x: TfFDLoss()([x, x[:1]])),
        (TypeError, "floating-point", lambda x: TfFDLoss()([x.int()])),
    ],
)
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 3, 4, 4))
