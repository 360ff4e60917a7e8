"""Hypothesis strategies for the inputs of losses: float64, B 1 to 5, C 2 to 7."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor

from shared.slow_reference import rank_scores

STEP = 1 / 16  # logits lie on a grid of exact binary fractions: ties are exact, near-ties absent


class Batch(NamedTuple):
    """Drawn inputs; `labels` are `target` as [B, C] rows."""

    logits: Tensor
    other_logits: Tensor  # the teacher's or the weak head's
    target: Tensor
    labels: Tensor
    votes: Tensor


def _integers(
    draw: st.DrawFn, shape: tuple[int, int], low: int, high: int, distinct: bool
) -> NDArray[np.float64]:
    """Whole numbers as floats; `distinct`: no two of a row are equal."""
    row = hnp.arrays(np.int64, shape[1], elements=st.integers(low, high), unique=distinct)
    return np.stack([draw(row) for _ in range(shape[0])]).astype(np.float64)


@st.composite
def batches(
    draw: st.DrawFn,
    *,
    most_labels: int = 2,
    min_classes: int = 2,
    distinct: bool = False,
    unsmoothed: bool = False,
) -> Batch:
    """Draw a batch.

    Args:
        draw: Given by hypothesis.
        most_labels: How many labeled classes a row may have; rows with fewer are mixed in.
        min_classes: The least number of classes.
        distinct: No two logits of a row are equal, nor two of its positive labels.
        unsmoothed: Every row of three classes or more has a class without a label.
    """
    batch_size = draw(st.integers(1, 5))
    num_classes = draw(st.integers(min_classes, 7))
    if unsmoothed and num_classes > 2:
        most_labels = min(most_labels, num_classes - 1)
    shape = (batch_size, num_classes)
    logits = STEP * _integers(draw, shape, -160, 160, distinct)
    other_logits = STEP * _integers(draw, shape, -160, 160, distinct)
    votes = draw(hnp.arrays(np.int64, (batch_size, 6), elements=st.integers(0, num_classes - 1)))

    classes = draw(hnp.arrays(np.int64, batch_size, elements=st.integers(0, num_classes - 1)))
    labels = np.zeros(shape)
    labels[np.arange(batch_size), classes] = 1.0
    target = torch.from_numpy(classes)
    if draw(st.booleans()):
        drawn = _integers(draw, shape, 0, 8, distinct)
        for row in range(batch_size):
            order = np.argsort(drawn[row], kind="stable")
            drawn[row, order[: max(0, num_classes - most_labels)]] = 0.0
            if drawn[row].sum() == 0:
                drawn[row, classes[row]] = 1.0
        labels = drawn / drawn.sum(1, keepdims=True)
        target = torch.from_numpy(labels)
    return Batch(
        torch.from_numpy(logits),
        torch.from_numpy(other_logits),
        target,
        torch.from_numpy(labels),
        torch.from_numpy(votes),
    )


def ranks_are_clear(batch: Batch, rank_by: str, gap: float = 1e-9, rank_from: str = "both") -> bool:
    """Whether no two of USKD's rank scores of a row are nearly, but not exactly, tied.

    A near-tie is decided by the last bit of a softmax, which two correct programs round
    differently. Classes with equal logits in both networks are an exact tie, and are kept.
    """
    logits, weak_logits = batch.logits.tolist(), batch.other_logits.tolist()
    for row, label in enumerate(batch.labels.tolist()):
        scores = rank_scores(logits[row], weak_logits[row], label, rank_by, rank_from)
        for i in range(len(scores)):
            for j in range(i):
                same = (logits[row][i], weak_logits[row][i]) == (
                    logits[row][j],
                    weak_logits[row][j],
                )
                if rank_from in ("weak", "final"):  # logits of a grid, compared as they are
                    same = True
                if not same and abs(scores[i] - scores[j]) < gap:
                    return False
    return True
