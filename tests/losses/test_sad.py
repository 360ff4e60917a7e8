"""SAD against the reference's numbers, and against plain sums."""

from __future__ import annotations

import math

import pytest
import torch

from shared.golden_vectors import assert_close, cases_of
from softlabels.losses.sad import SADLoss


@pytest.mark.parametrize("case", cases_of("sad"))
def test_the_reference(case):
    maps = [case[f"map_{level}"].requires_grad_() for level in range(int(case["num_levels"]))]

    loss = SADLoss()(maps)
    (float(case["weight"]) * loss).backward()

    assert float(case["weight"]) == SADLoss.defaults.weight
    assert_close(float(case["weight"]) * loss.detach(), case["loss"])
    assert maps[-1].grad is None
    assert not case[f"grad_map_{len(maps) - 1}"].any()
    for level, map in enumerate(maps[:-1]):
        assert_close(map.grad, case[f"grad_map_{level}"])
        assert_close(SADLoss()(maps[level : level + 2]).detach(), case[f"level_loss_{level}"])


def attention_by_hand(map):
    """A softmax over positions of the mean square, of a list [D][H][W]."""
    height, width = len(map[0]), len(map[0][0])
    squares = [
        sum(channel[y][x] ** 2 for channel in map) / len(map)
        for y in range(height)
        for x in range(width)
    ]
    powers = [math.exp(square) for square in squares]
    return [power / sum(powers) for power in powers]


def test_plain_sums_with_a_row_doubled_by_hand():
    generator = torch.Generator().manual_seed(6)
    shallow = torch.randn(2, 3, 1, 4, generator=generator).double()
    deep = torch.randn(2, 5, 1, 2, generator=generator).double()

    # Doubled with half-pixel centers: a, 3/4 a + 1/4 b, 1/4 a + 3/4 b, b.
    total = 0.0
    for ours, theirs in zip(shallow.tolist(), deep.tolist(), strict=True):
        doubled = [[[a, 0.75 * a + 0.25 * b, 0.25 * a + 0.75 * b, b]] for ((a, b),) in theirs]
        gaps = zip(attention_by_hand(ours), attention_by_hand(doubled), strict=True)
        total += sum((x - y) ** 2 for x, y in gaps)

    assert float(SADLoss()([shallow, deep])) == pytest.approx(total / 8, rel=1e-12)


def test_equal_maps_cost_nothing():
    map = torch.randn(2, 3, 4, 4)

    assert float(SADLoss()([map, -map, map])) == 0


@pytest.mark.parametrize("sizes", [((7, 5), (4, 3)), ((4, 4), (4, 4)), ((2, 2), (5, 5))])
def test_any_sizes_fit(sizes):
    maps = [torch.randn(1, 2, *size, requires_grad=True) for size in sizes]

    loss = SADLoss()(maps)
    loss.backward()

    assert float(loss.detach()) > 0
    assert maps[0].grad.isfinite().all()
    assert maps[1].grad is None


def test_zeros_and_large_halves_stay_finite():
    large = (torch.eye(4).expand(1, 2, 4, 4) * 6e4).half().requires_grad_()

    loss = SADLoss()([large, torch.zeros(1, 2, 2, 2).half()])
    loss.backward()

    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert large.grad.isfinite().all()


@pytest.mark.parametrize(
    ("error", "message", "maps"),
    [
        (ValueError, "at least two maps", [torch.zeros(1, 2, 3, 3)]),
        (ValueError, "at least one feature map", []),
        (ValueError, "of one batch", [torch.zeros(1, 2, 3, 3), torch.zeros(2, 2, 3, 3)]),
        (ValueError, r"must be \[B, D, H, W\]", [torch.zeros(1, 2), torch.zeros(1, 2)]),
        (TypeError, "floating-point", [torch.zeros(1, 2, 3, 3).int()] * 2),
        (TypeError, "list of feature maps", torch.zeros(2, 1, 2, 3, 3)),
    ],
)
def test_errors(error, message, maps):
    with pytest.raises(error, match=message):
        SADLoss()(maps)


def test_the_stages_are_those_that_are_read():
    assert SADLoss(stages=("stage:0", "last")).inputs["student_maps"].stages == ("stage:0", "last")
