"""The losses against slow_reference.py, a second version in plain Python, on drawn inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared import slow_reference
from shared.draws import Batch, batches, ranks_are_clear
from softlabels.losses import (
    kd_loss,
    label_smoothing_loss,
    nkd_loss,
    uskd_loss,
    uskd_targets,
    zipf_ls_loss,
    zipf_ls_targets,
)

temperatures = st.sampled_from([0.5, 1.0, 3.0, 4.0])
weights = st.sampled_from([0.0, 0.1, 1.0, 2.5])
powers = st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.7])


def assert_close(actual: Tensor, expected: float | list[float] | list[list[float]]) -> None:
    witnessed = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, witnessed, rtol=1e-9, atol=1e-9)


@given(batch=batches(), temperature=temperatures)
def test_kd(batch, temperature):
    value = kd_loss(batch.logits, batch.other_logits, temperature=temperature, reduction="none")

    assert_close(
        value,
        slow_reference.kd(batch.logits.tolist(), batch.other_logits.tolist(), temperature),
    )


TERMS = [("T1", "normalized"), ("T2", "normalized"), ("both", "unnormalized")]


@pytest.mark.parametrize(("target_term", "non_target_term"), TERMS)
@pytest.mark.parametrize("mixed_target", ["largest", "all"])
@given(batch=batches(most_labels=7, unsmoothed=True), temperature=temperatures, weight=weights)
def test_nkd(mixed_target, target_term, non_target_term, batch, temperature, weight):
    value = nkd_loss(
        batch.logits,
        batch.other_logits,
        batch.target,
        temperature=temperature,
        non_target_weight=weight,
        mixed_target=mixed_target,
        target_term=target_term,
        non_target_term=non_target_term,
        reduction="none",
    )

    assert_close(
        value,
        slow_reference.nkd(
            batch.logits.tolist(),
            batch.other_logits.tolist(),
            batch.labels.tolist(),
            temperature,
            weight,
            mixed_target,
            target_term,
            non_target_term,
        ),
    )


USKD_SETTINGS = [
    ("T1", "both", "probability", True, False),
    ("T1", "both", "log_probability", True, False),
    ("T1", "both_unnormalized", "probability", False, False),
    ("both", "both_unnormalized", "log_probability", True, False),
    ("T2", "weak", "probability", False, False),
    ("T1", "final", "probability", True, True),
    ("both", "weak", "log_probability", True, True),
]


@pytest.mark.parametrize(
    ("target_term", "rank_from", "rank_by", "squared", "has_teacher"), USKD_SETTINGS
)
@given(batch=batches(), alpha=weights, beta=weights, mu=weights)
def test_uskd(target_term, rank_from, rank_by, squared, has_teacher, batch, alpha, beta, mu):
    assume(ranks_are_clear(batch, rank_by, rank_from=rank_from))
    if target_term != "T1":
        assume(not bool((batch.labels > 0).all(1).any()))
    teacher_logits = batch.other_logits.flip(1) if has_teacher else None
    inputs = batch.logits, batch.other_logits, batch.target, teacher_logits
    given_settings = {"rank_from": rank_from, "rank_by": rank_by, "squared": squared}

    soft = uskd_targets(*inputs, **given_settings)
    value = uskd_loss(
        *inputs,
        **given_settings,
        target_term=target_term,
        target_weight=alpha,
        non_target_weight=beta,
        weak_weight=mu,
        reduction="none",
    )

    lists = batch.logits.tolist(), batch.other_logits.tolist(), batch.labels.tolist()
    teacher_rows = None if teacher_logits is None else teacher_logits.tolist()
    witnessed = slow_reference.uskd_targets(*lists, rank_by, rank_from, squared, teacher_rows)
    assert_close(soft.target, witnessed.target)
    assert_close(soft.non_target, witnessed.non_target)
    assert_close(value, slow_reference.uskd(*lists, witnessed, alpha, beta, mu, target_term))


laws = st.one_of(
    st.tuples(st.just("zipf"), st.fixed_dictionaries({"power": powers})),
    st.tuples(st.just("constant"), st.just({})),
    st.tuples(
        st.just("linear_decay"),
        st.fixed_dictionaries({"smallest_probability": st.sampled_from([0.0, 1e-6, 0.1, 1 / 7])}),
    ),
    st.tuples(
        st.just("exponential_decay"),
        st.fixed_dictionaries({"decay": st.sampled_from([0.0, 0.3, 1.0, 4.0])}),
    ),
    st.tuples(
        st.just("unbiased_zipf"),
        st.fixed_dictionaries(
            {
                "power": st.sampled_from([0.5, 1.0, 1.5, 3.0]),
                "lower_bound": st.sampled_from([0.001, 0.5]),
                "upper_bound": st.sampled_from([1.0, 7.0]),
            }
        ),
    ),
)


@pytest.mark.parametrize("rank_from", ["votes", "logits"])
@pytest.mark.parametrize("mixed_target", ["largest", "all"])
@settings(max_examples=60)
@given(batch=batches(most_labels=7, unsmoothed=True), law=laws)
def test_zipf_ls(rank_from, mixed_target, batch, law):
    votes = batch.votes if rank_from == "votes" else None
    distribution, parameters = law
    given_settings = {"distribution": distribution, "mixed_target": mixed_target, **parameters}

    soft = zipf_ls_targets(batch.logits, batch.target, votes, **given_settings)
    value = zipf_ls_loss(batch.logits, batch.target, votes, **given_settings, reduction="none")

    lists = (
        batch.logits.tolist(),
        batch.labels.tolist(),
        None if votes is None else votes.tolist(),
        mixed_target,
        distribution,
        parameters,
    )
    assert_close(soft, slow_reference.zipf_ls_targets(*lists))
    assert_close(value, slow_reference.zipf_ls(*lists))


def mean_of(values: list[float], kept: list[bool]) -> float:
    return sum(v for v, keep in zip(values, kept, strict=True) if keep) / max(1, sum(kept))


@given(batch=batches(), exit_weight=weights)
def test_zipf_ls_of_correct_samples_with_exits(batch, exit_weight):
    exit_logits = batch.other_logits, batch.logits.flip(1)
    labels = batch.labels.tolist()

    given = batch.logits, batch.target, batch.votes, exit_logits
    loss = zipf_ls_loss(*given, correct_only=True, exit_weight=exit_weight)

    values = slow_reference.zipf_ls(
        batch.logits.tolist(), labels, batch.votes.tolist(), "largest", "zipf", {"power": 1.0}
    )
    correct = slow_reference.predicted_correctly(batch.logits.tolist(), labels)
    everyone = [True] * len(labels)
    of_exits = exit_weight * sum(
        mean_of(slow_reference.cross_entropy(own.tolist(), labels), everyone) for own in exit_logits
    )
    of_non_target = mean_of(values, correct)
    alone = zipf_ls_loss(*given[:3], correct_only=True)
    assert_close(alone, of_non_target)
    assert_close(loss, of_non_target + of_exits)


def pick(rows: Tensor, kept: Tensor) -> list[list[float]]:
    return rows[kept].tolist()


def slow_nkd(batch: Batch, kept: Tensor) -> list[float]:
    lists = (pick(t, kept) for t in (batch.logits, batch.other_logits, batch.labels))
    return slow_reference.nkd(*lists, 1.0, 1.5, "largest")


def slow_uskd(batch: Batch, kept: Tensor) -> list[float]:
    lists = [pick(t, kept) for t in (batch.logits, batch.other_logits, batch.labels)]
    soft = slow_reference.uskd_targets(*lists, "probability") if lists[0] else None
    return slow_reference.uskd(*lists, soft, 1.0, 0.1, 0.005)


def slow_zipf_ls(batch: Batch, kept: Tensor) -> list[float]:
    lists = (pick(t, kept) for t in (batch.logits, batch.labels, batch.votes))
    return slow_reference.zipf_ls(*lists, "largest", "zipf", {"power": 1.0})


def slow_exits(batch: Batch, kept: Tensor) -> list[float]:
    own = slow_reference.cross_entropy(pick(batch.other_logits, kept), pick(batch.labels, kept))
    return [a + 0.5 * b for a, b in zip(slow_zipf_ls(batch, kept), own, strict=True)]


def slow_label_smoothing(batch: Batch, kept: Tensor) -> list[float]:
    lists = pick(batch.logits, kept), pick(batch.labels, kept)
    return slow_reference.label_smoothing(*lists, 0.1, "all")


# Name -> the loss with defaults of a batch, and its slow version for the rows that are kept.
IGNORING = {
    "nkd": (lambda b, t, **s: nkd_loss(b.logits, b.other_logits, t, **s), slow_nkd),
    "uskd": (lambda b, t, **s: uskd_loss(b.logits, b.other_logits, t, **s), slow_uskd),
    "zipf_ls": (lambda b, t, **s: zipf_ls_loss(b.logits, t, b.votes, **s), slow_zipf_ls),
    "zipf_ls_exits": (
        lambda b, t, **s: zipf_ls_loss(
            b.logits, t, b.votes, [b.other_logits], exit_weight=0.5, **s
        ),
        slow_exits,
    ),
    "label_smoothing": (
        lambda b, t, **s: label_smoothing_loss(b.logits, t, **s),
        slow_label_smoothing,
    ),
}


@pytest.mark.parametrize("name", IGNORING)
@given(
    batch=batches(most_labels=1),
    ignored=st.lists(st.booleans(), min_size=5, max_size=5),
    ignore_index=st.sampled_from([-100, 0, 255]),
)
def test_ignored_samples_count_nothing(name, batch, ignored, ignore_index):
    loss, slow = IGNORING[name]
    target = batch.labels.argmax(1)
    target = torch.where(torch.tensor(ignored[: len(target)]), ignore_index, target)
    kept = target != ignore_index
    batch = batch._replace(labels=torch.nn.functional.one_hot(batch.labels.argmax(1), 7).double())
    batch = batch._replace(labels=batch.labels[:, : batch.logits.shape[1]])
    if name == "uskd":
        assume(ranks_are_clear(batch, "probability"))

    values = loss(batch, target, ignore_index=ignore_index, reduction="none")
    mean = loss(batch, target, ignore_index=ignore_index)

    expected = slow(batch, kept)
    assert_close(values[kept], expected)
    assert not values[~kept].any()
    assert_close(mean, sum(expected) / max(1, len(expected)))


@pytest.mark.parametrize("smooth_over", ["all", "non_target"])
@given(batch=batches(most_labels=7), smoothing=st.sampled_from([0.0, 0.1, 0.45, 1.0]))
def test_label_smoothing(smooth_over, batch, smoothing):
    value = label_smoothing_loss(
        batch.logits,
        batch.target,
        smoothing=smoothing,
        smooth_over=smooth_over,
        reduction="none",
    )

    assert_close(
        value,
        slow_reference.label_smoothing(
            batch.logits.tolist(), batch.labels.tolist(), smoothing, smooth_over
        ),
    )
