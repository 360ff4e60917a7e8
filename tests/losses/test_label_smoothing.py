"""Label smoothing by hand, in both conventions."""

from __future__ import annotations

import pytest
import torch

from shared.by_hand import MIXED_TARGET, STUDENT_LOGITS, TARGET, assert_six_digits, logits_of, rows
from softlabels.losses import label_smoothing_loss

# -ln S = 0.693147, 1.386294, 1.386294.
LOGITS = logits_of([0.5, 0.25, 0.25])


@pytest.mark.parametrize("smooth_over", ["all", "non_target"])
def test_without_smoothing_it_is_the_cross_entropy_of_the_shared_samples(smooth_over):
    settings = {"smoothing": 0.0, "smooth_over": smooth_over}

    values = label_smoothing_loss(STUDENT_LOGITS, TARGET, **settings, reduction="none")

    assert_six_digits(values, 0.574438, 1.497944)
    assert_six_digits(label_smoothing_loss(STUDENT_LOGITS, TARGET, **settings), 1.036191)
    assert_six_digits(label_smoothing_loss(STUDENT_LOGITS, MIXED_TARGET, **settings), 1.461191)


@pytest.mark.parametrize(
    ("smooth_over", "expected"),
    [
        # (0.9 + 0.1/3, 0.1/3, 0.1/3): 0.933333 * 0.693147 + 0.066667 * 1.386294.
        ("all", 0.739357),
        # (0.9, 0.05, 0.05): 0.9 * 0.693147 + 0.1 * 1.386294.
        ("non_target", 0.762462),
    ],
)
def test_one_label(smooth_over, expected):
    assert_six_digits(
        label_smoothing_loss(LOGITS, torch.tensor([0]), smooth_over=smooth_over), expected
    )


@pytest.mark.parametrize(
    ("smooth_over", "expected"),
    [
        # 0.7 V + 0.1 = (0.52, 0.38, 0.1): 0.52 * 0.693147 + 0.48 * 1.386294.
        ("all", 1.025858),
        # 0.7 V + 0.15 (1 - V) = (0.48, 0.37, 0.15): 0.48 * 0.693147 + 0.52 * 1.386294.
        ("non_target", 1.053584),
    ],
)
def test_mixed_labels(smooth_over, expected):
    target = rows([0.6, 0.4, 0])

    value = label_smoothing_loss(LOGITS, target, smoothing=0.3, smooth_over=smooth_over)

    assert_six_digits(value, expected)


def test_full_smoothing_over_wrong_classes_leaves_nothing_on_the_target():
    # (0, 0.5, 0.5): 1.386294.
    settings = {"smoothing": 1.0, "smooth_over": "non_target"}

    assert_six_digits(label_smoothing_loss(LOGITS, torch.tensor([0]), **settings), 1.386294)
