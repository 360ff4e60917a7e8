"""The algebra that the losses share, one piece at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.by_hand import assert_six_digits, logits_of, rows
from shared.draws import batches
from softlabels.losses import SoftLabels
from softlabels.losses._checks import (
    check_choice,
    check_flag,
    check_ignore_index,
    check_logits,
    check_number,
    check_target,
    check_temperature,
    check_two_labels,
    check_unsmoothed,
    check_votes,
)
from softlabels.losses._non_target import (
    Labels,
    column_means,
    finite_limit,
    in_float32,
    label_columns,
    label_probabilities,
    log_total,
    non_target_weights,
    reduce_terms,
    removed,
    row_sums,
    softmax_parts,
    spread,
    total_of,
    without_ignored,
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
    check_unsmoothed(torch.tensor([0, 2]))
    check_unsmoothed(rows([0.5, 0, 0.5], [0, 1, 0]))
    check_unsmoothed(rows([0.5, 0.5], [1, 0]))  # two classes, both mixed: there is no third
    check_target(torch.tensor([0, -100]), LOGITS, -100)
    check_temperature(1e6)
    check_flag("squared", False)
    check_ignore_index(None)
    check_ignore_index(-100)
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

    with pytest.raises(ValueError, match="row 2 of target has 4 labeled classes"):
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


def test_all_labels_are_kept_or_the_first_largest_alone():
    target = rows([0.25, 0.75, 0], [0, 0.5, 0.5])

    torch.testing.assert_close(label_probabilities(target, LOGITS), target.float())
    torch.testing.assert_close(label_probabilities(target, LOGITS, "all"), target.float())
    torch.testing.assert_close(
        label_probabilities(target, LOGITS, "largest"), rows([0, 1, 0], [0, 1, 0]).float()
    )


def test_class_indices_are_a_single_column():
    classes, values, kept = label_columns(torch.tensor([2, 0], dtype=torch.uint8), LOGITS)

    assert classes.tolist() == [[2], [0]]
    assert classes.dtype == torch.int64
    assert values == 1
    assert kept is None


@pytest.mark.parametrize("ignored", [-100, 1, 255])
def test_ignored_samples_are_marked_and_get_a_class_in_range(ignored):
    labels, kept = without_ignored(torch.tensor([2, ignored]), ignored)

    assert labels.tolist() == [2, 0]
    assert kept.tolist() == [True, False]
    assert without_ignored(labels, None) == (labels, None)


def test_two_columns_hold_the_two_largest_labels_of_which_the_second_may_be_absent():
    target = rows([0.25, 0, 0.75, 0], [0, 0.5, 0, 0.5], [0, 0, 0, 1])

    labels = label_columns(target, torch.zeros(3, 4, dtype=torch.float64), "two")

    assert labels.classes.tolist() == [[2, 0], [1, 3], [3, 3]]
    assert_six_digits(labels.values, [0.75, 0.25], [0.5, 0.5], [1, 0])
    assert labels.present().tolist() == [[True, True], [True, True], [True, False]]
    assert labels.kept is None


@given(batch=batches(most_labels=7))
def test_columns_spread_out_are_the_labels_again(batch):
    for mixed_target in ("all", "two"):
        if mixed_target == "two" and int((batch.labels > 0).sum(1).max()) > 2:
            continue
        labels = label_columns(batch.target, batch.logits, mixed_target)

        torch.testing.assert_close(spread(labels, labels.values, batch.logits), batch.labels)
        assert bool(batch.labels.gather(1, labels.classes).gt(0).all())


def test_removal_writes_at_labeled_classes_of_a_copy():
    values = rows([1, 2, 3], [4, 5, 6])
    labels = Labels(torch.tensor([[0, 2], [1, 1]]), rows([0.5, 0.5], [1, 0]))

    assert removed(values, labels).tolist() == [[-math.inf, 2, -math.inf], [4, -math.inf, 6]]
    assert removed(values, labels, 0.0).tolist() == [[0, 2, 0], [4, 0, 6]]
    torch.testing.assert_close(values, rows([1, 2, 3], [4, 5, 6]))


# The non-target softmax


@given(batch=batches(most_labels=6, min_classes=3), temperature=st.sampled_from([0.5, 1.0, 3.0]))
def test_it_is_the_softmax_of_what_is_left_after_removal(batch, temperature):
    labels = label_columns(batch.target, batch.logits)

    probabilities = softmax_parts(batch.logits, labels, temperature)[1]

    for row, kept in enumerate(batch.labels == 0):
        if kept.any():
            left = (batch.logits[row][kept] / temperature).softmax(0)
            torch.testing.assert_close(probabilities[row][kept], left)
        assert not probabilities[row][~kept].any()


@given(batch=batches(most_labels=7), temperature=st.sampled_from([0.5, 1.0, 3.0]))
def test_row_sums_are_log_sums_of_exponentials_over_parts_of_a_row(batch, temperature):
    labels = label_columns(batch.target, batch.logits)

    sums = row_sums(batch.logits, labels, temperature)

    everything = log_total(batch.logits, labels, sums.rest)
    torch.testing.assert_close(everything, batch.logits.logsumexp(1, keepdim=True))
    for row, kept in enumerate(batch.labels == 0):
        left = batch.logits[row][kept]
        if not kept.any():
            assert float(sums.top[row]) == 0
            assert float(sums.rest[row]) == -math.inf
            continue
        assert float(sums.top[row]) == float(left.max())
        torch.testing.assert_close(sums.rest[row, 0], left.logsumexp(0))
        scaled = ((left - left.max()) / temperature).logsumexp(0)
        torch.testing.assert_close(sums.scaled[row, 0], scaled)


@pytest.mark.parametrize("others", [0.0, 5e3, -5e3])
@pytest.mark.parametrize("extreme", [0.0, 1e4, -1e4, 1e30])
def test_the_removed_logit_may_be_anything(extreme, others):
    # The others are 1/4 and 3/4, wherever they lie: their logits differ by ln 3.
    logits = rows([extreme, others, others + math.log(3)]).requires_grad_()
    labels = label_columns(torch.tensor([0]), logits)

    rest = row_sums(logits, labels).rest
    rest.backward()

    assert_six_digits(rest.detach() - others, [[math.log(4)]])
    assert_six_digits(softmax_parts(logits.detach(), labels)[1], [[0, 0.25, 0.75]])
    assert_six_digits(logits.grad, [[0, 0.25, 0.75]])


def test_a_row_whose_every_class_is_labeled_has_no_softmax():
    logits = rows([1, 2, 3])

    soft = softmax_parts(logits, label_columns(rows([0.2, 0.3, 0.5]), logits))[1]

    assert not soft.any()


def test_weights_are_scaled_over_the_classes_without_a_label():
    labels = Labels(torch.tensor([[0, 3], [2, 2]]), rows([0.5, 0.5], [1, 0]))

    soft = non_target_weights(rows([9, 1, 3, 9], [1, 1, 7, 2]), labels)

    assert_six_digits(soft, [0, 0.25, 0.75, 0], [0.25, 0.25, 0, 0.5])


def test_weights_without_a_class_left_are_zeros():
    labels = label_columns(rows([0.2, 0.3, 0.5]), rows([1, 2, 3]))

    assert not non_target_weights(rows([1, 2, 3]), labels).any()


# The batch mean


def test_column_means_count_the_rows_that_have_the_column_and_are_kept():
    values = rows([1, 10], [2, 20], [6, 30], [100, 100]).requires_grad_()
    labels = Labels(
        torch.zeros(4, 2, dtype=torch.int64),
        rows([1, 1], [1, 0], [1, 1], [1, 1]),
        torch.tensor([True, True, True, False]),
    )

    means = column_means(values, labels)

    assert_six_digits(means, 3.0, 20.0)
    assert not means.requires_grad
    assert_six_digits(column_means(values, labels, sync=True), 3.0, 20.0)
    nothing = labels._replace(kept=torch.zeros(4, dtype=torch.bool))
    assert_six_digits(column_means(values, nothing), 0.0, 0.0)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_limit_leaves_room_for_sums_and_products_with_weights(dtype):
    limit = finite_limit(dtype)

    assert limit > 1e25
    assert math.isfinite(float(torch.tensor(limit, dtype=dtype) * 1e9))


def test_reductions_over_the_batch():
    parts = {"one": torch.tensor([1.0, 2.0, 6.0]), "two": torch.tensor([0.5, 0.25, 0.0])}

    of_mean = reduce_terms(parts, "mean")
    of_sum = reduce_terms(parts, "sum")
    of_none = reduce_terms(parts, "none")

    assert (float(of_mean["one"]), float(of_mean["two"])) == (3, 0.25)
    assert (float(of_sum["one"]), float(of_sum["two"])) == (9, 0.75)
    assert of_none["one"].tolist() == [1, 2, 6]
    assert float(total_of(of_mean)) == 3.25
    assert total_of(of_none).tolist() == [1.5, 2.25, 6]


def test_reductions_over_the_samples_that_are_kept():
    parts = {"one": torch.tensor([1.0, math.inf, 6.0])}
    kept = torch.tensor([True, False, True])

    assert float(reduce_terms(parts, "mean", kept)["one"]) == 3.5
    assert float(reduce_terms(parts, "sum", kept)["one"]) == 7
    assert reduce_terms(parts, "none", kept)["one"].tolist() == [1, 0, 6]
    assert float(reduce_terms(parts, "mean", torch.zeros(3, dtype=torch.bool))["one"]) == 0


def test_soft_labels_have_two_parts():
    soft = SoftLabels(logits_of([1.0]), logits_of([2.0]))

    target, non_target = soft
    assert soft.target is target
    assert soft.non_target is non_target
    assert SoftLabels._fields == ("target", "non_target")
