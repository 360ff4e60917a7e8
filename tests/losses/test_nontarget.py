"""The algebra that the losses share, one piece at a time."""

from __future__ import annotations

import math

import pytest
import torch
from by_hand import assert_six_digits, logits_of, rows
from draws import batches
from hypothesis import given

from softlabels.losses import SoftLabels
from softlabels.losses.nontarget import (
    check_choice,
    check_logits,
    check_number,
    check_target,
    check_two_labels,
    check_votes,
    class_mask,
    in_float32,
    label_probabilities,
    non_target_log_softmax,
    non_target_softmax,
    normalized,
    reduce_batch,
)

LOGITS = torch.zeros(2, 3)


# Checks that pass


def test_what_is_right_passes_in_silence():
    check_logits(LOGITS)
    check_logits(LOGITS.half(), "teacher_logits", like=LOGITS)
    check_target(torch.tensor([0, 2]), LOGITS)
    check_target(torch.tensor([0, 2], dtype=torch.uint8), LOGITS)
    check_target(rows([0.2, 0.3, 0.5], [0, 1, 0]), LOGITS)
    check_two_labels(torch.tensor([0, 2]))
    check_two_labels(rows([0.5, 0, 0.5], [0, 1, 0]))
    check_votes(torch.tensor([[0, 2, 1, 1], [2, 2, 0, 0]]), LOGITS)
    check_choice("reduction", "mean", ("mean", "sum"))
    check_number("weight", 0)
    check_number("temperature", 1e-3, positive=True)
    check_number("smoothing", 1.0, at_most=1)


def test_the_row_that_is_furthest_off_is_named():
    target = rows([0.9, 0, 0], [0.2, 0.3, 0.2])

    with pytest.raises(ValueError, match=r"each row of target must sum to 1, row 1 sums to 0\.7"):
        check_target(target, LOGITS)


def test_the_row_with_the_most_labels_is_named():
    target = rows([0.5, 0.5, 0, 0], [0.4, 0.3, 0.3, 0], [0.25, 0.25, 0.25, 0.25])

    with pytest.raises(ValueError, match="row 2 of target has 4 labelled classes"):
        check_two_labels(target)


def test_a_long_value_is_shortened_in_a_message():
    with pytest.raises(TypeError, match=r"got list \(.{1,60}\)$"):
        check_logits(list(range(1000)))


@pytest.mark.parametrize(
    ("settings", "value", "message"),
    [
        ({}, -1, "weight must be finite, 0 or more, got -1"),
        ({"positive": True}, 0, "weight must be finite, above 0, got 0"),
        ({"at_most": 1}, 2, "weight must be finite, 0 or more and at most 1, got 2"),
        ({"positive": True, "at_most": 3.5}, 4, "finite, above 0 and at most 3.5, got 4"),
        ({"at_most": 1}, float("nan"), "finite, 0 or more and at most 1, got nan"),
    ],
)
def test_the_wanted_range_is_named(settings, value, message):
    with pytest.raises(ValueError) as error:
        check_number("weight", value, **settings)

    assert message in str(error.value)


# Labels


def test_class_indices_become_rows_with_a_single_one():
    labels = label_probabilities(torch.tensor([2, 0]), LOGITS.double())

    torch.testing.assert_close(labels, rows([0, 0, 1], [1, 0, 0]))
    torch.testing.assert_close(
        class_mask(torch.tensor([2, 0]), 3), rows([0, 0, 1], [1, 0, 0]).bool()
    )


def test_all_labels_are_kept_or_the_first_largest_alone():
    target = rows([0.25, 0.75, 0], [0, 0.5, 0.5])

    torch.testing.assert_close(label_probabilities(target, LOGITS), target.float())
    torch.testing.assert_close(label_probabilities(target, LOGITS, "all"), target.float())
    torch.testing.assert_close(
        label_probabilities(target, LOGITS, "largest"), rows([0, 1, 0], [0, 1, 0]).float()
    )


# The non-target softmax


@given(batch=batches(most_labels=6, min_classes=3))
def test_it_is_the_softmax_of_what_is_left_after_removal(batch):
    labelled = batch.labels > 0

    log_probabilities = non_target_log_softmax(batch.logits, labelled)
    probabilities = non_target_softmax(batch.logits, labelled)

    for row, kept in enumerate(~labelled):
        if kept.any():
            removed = batch.logits[row][kept].log_softmax(0)
            torch.testing.assert_close(log_probabilities[row][kept], removed)
            torch.testing.assert_close(probabilities[row][kept], removed.exp())
        assert not log_probabilities[row][~kept].any()
        assert not probabilities[row][~kept].any()


@pytest.mark.parametrize("others", [0.0, 5e3, -5e3])
@pytest.mark.parametrize("extreme", [0.0, 1e4, -1e4, 1e30])
def test_the_removed_logit_may_be_anything(extreme, others):
    # The others are 1/4 and 3/4, wherever they lie: their logits differ by ln 3.
    logits = rows([extreme, others, others + math.log(3)]).requires_grad_()
    labelled = class_mask(torch.tensor([0]), 3)

    values = non_target_log_softmax(logits, labelled)
    values[0, 1].backward()

    assert_six_digits(values.detach(), [[0, -1.386294, -0.287682]])
    assert_six_digits(non_target_softmax(logits.detach(), labelled), [[0, 0.25, 0.75]])
    assert_six_digits(logits.grad, [[0, 0.75, -0.75]])


def test_a_row_whose_every_class_is_labelled_gives_zeros_and_no_gradient():
    logits = rows([1, 2, 3]).requires_grad_()
    labelled = torch.ones(1, 3, dtype=torch.bool)

    # Anomaly detection refuses a NaN anywhere on the way back, also one that is masked later.
    with torch.autograd.set_detect_anomaly(True):
        values = non_target_log_softmax(logits, labelled)
        values.sum().backward()

    assert not values.any()
    assert not logits.grad.any()
    assert not non_target_softmax(logits, labelled).any()


def test_weights_are_scaled_over_the_classes_without_a_label():
    labelled = rows([1, 0, 0, 1], [0, 0, 1, 0]).bool()

    scaled = normalized(rows([9, 1, 3, 9], [1, 1, 7, 2]), labelled)

    assert_six_digits(scaled, [0, 0.25, 0.75, 0], [0.25, 0.25, 0, 0.5])


def test_weights_without_a_class_left_are_zeros():
    labelled = torch.ones(1, 3, dtype=torch.bool)

    assert not normalized(rows([1, 2, 3]), labelled).any()


# Precision and reduction


@pytest.mark.parametrize(
    ("given_dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_less_than_float32_is_widened(given_dtype, expected):
    assert in_float32(LOGITS.to(given_dtype)).dtype == expected


def test_reductions_over_the_batch():
    losses = torch.tensor([1.0, 2.0, 6.0])

    assert float(reduce_batch(losses, "mean")) == 3
    assert float(reduce_batch(losses, "sum")) == 9
    torch.testing.assert_close(reduce_batch(losses, "none"), losses)
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum', 'none', got 'x'"):
        reduce_batch(losses, "x")


def test_soft_labels_have_two_parts():
    soft = SoftLabels(logits_of([1.0]), logits_of([2.0]))

    target, non_target = soft
    assert soft.target is target
    assert soft.non_target is non_target
    assert SoftLabels._fields == ("target", "non_target")
