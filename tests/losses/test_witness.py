"""The losses against slow_reference.py, a second version in plain Python, on drawn inputs."""

from __future__ import annotations

import pytest
import slow_reference
import torch
from draws import batches, ranks_are_clear
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

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


def assert_close(actual: Tensor, expected: list[float] | list[list[float]]) -> None:
    witnessed = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, witnessed, rtol=1e-9, atol=1e-9)


@given(batch=batches(), temperature=temperatures)
def test_kd(batch, temperature):
    value = kd_loss(batch.logits, batch.other_logits, temperature=temperature, reduction="none")

    assert_close(
        value,
        slow_reference.kd(batch.logits.tolist(), batch.other_logits.tolist(), temperature),
    )


@pytest.mark.parametrize("mixed_target", ["largest", "all"])
@given(batch=batches(most_labels=7), temperature=temperatures, weight=weights)
def test_nkd(mixed_target, batch, temperature, weight):
    value = nkd_loss(
        batch.logits,
        batch.other_logits,
        batch.target,
        temperature=temperature,
        non_target_weight=weight,
        mixed_target=mixed_target,
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
        ),
    )


@pytest.mark.parametrize("rank_by", ["probability", "log_probability"])
@given(batch=batches(), alpha=weights, beta=weights, mu=weights)
def test_uskd(rank_by, batch, alpha, beta, mu):
    assume(ranks_are_clear(batch, rank_by))
    lists = batch.logits.tolist(), batch.other_logits.tolist(), batch.labels.tolist()

    soft = uskd_targets(batch.logits, batch.other_logits, batch.target, rank_by=rank_by)
    value = uskd_loss(
        batch.logits,
        batch.other_logits,
        batch.target,
        target_weight=alpha,
        non_target_weight=beta,
        weak_weight=mu,
        rank_by=rank_by,
        reduction="none",
    )

    witnessed = slow_reference.uskd_targets(*lists, rank_by)
    assert_close(soft.target, witnessed.target)
    assert_close(soft.non_target, witnessed.non_target)
    assert_close(value, slow_reference.uskd(*lists, alpha, beta, mu, rank_by))


@pytest.mark.parametrize("rank_from", ["votes", "logits"])
@pytest.mark.parametrize("mixed_target", ["largest", "all"])
@given(batch=batches(most_labels=7), power=st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.7]))
def test_zipf_ls(rank_from, mixed_target, batch, power):
    votes = batch.votes if rank_from == "votes" else None
    settings = {"power": power, "mixed_target": mixed_target}

    soft = zipf_ls_targets(batch.logits, batch.target, votes, **settings)
    value = zipf_ls_loss(batch.logits, batch.target, votes, **settings, reduction="none")

    lists = (
        batch.logits.tolist(),
        batch.labels.tolist(),
        None if votes is None else votes.tolist(),
        power,
        mixed_target,
    )
    assert_close(soft, slow_reference.zipf_ls_targets(*lists))
    assert_close(value, slow_reference.zipf_ls(*lists))


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
