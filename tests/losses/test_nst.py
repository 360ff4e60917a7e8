"""NST against the published numbers and a plain computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shared.golden_vectors import assert_close, cases_of
from shared.map_draws import drawn, levels
from shared.terms import loss_and_terms
from softlabels.losses.nst import NSTLoss

CASES = cases_of("nst")


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_published_ones(case) -> None:
    student = levels(case, "student_map", gradient=True)
    teacher = levels(case, "teacher_map")
    output = loss_and_terms(NSTLoss(), student, teacher)
    for level, part in enumerate(output.terms.values()):
        assert_close(part, case[f"level_loss_{level}"])
    assert_close(output.loss, case["total"])
    loss = case["weight"] * output.loss
    assert_close(loss, case["loss"])
    loss.backward()
    for level, map in enumerate(student):
        assert_close(map.grad, case[f"grad_student_map_{level}"])


def test_a_loop_over_channel_pairs_gives_the_same() -> None:
    student, teacher = drawn((3, 4, 2, 3)), drawn((3, 6, 2, 3), seed=1)
    total = 0.0
    for ours, theirs in zip(student[0].numpy(), teacher[0].numpy(), strict=True):
        ours, theirs = (
            [row.ravel() / np.linalg.norm(row) for row in map] for map in (ours, theirs)
        )
        for left, right, factor in ((theirs, theirs, 1), (ours, ours, 1), (theirs, ours, -2)):
            kernel = [np.dot(one, other) ** 2 for one in left for other in right]
            total += factor * np.mean(kernel) / 3
    assert_close(NSTLoss()(student, teacher), torch.tensor(total))


def test_it_is_the_squared_distance_of_mean_outer_products() -> None:
    # The kernel is the inner product of the outer products x x^T, so the MMD is a distance.
    student, teacher = drawn((2, 4, 3, 3)), drawn((2, 6, 3, 3), seed=1)
    means = []
    for (map,) in (student, teacher):
        rows = map.flatten(2)
        rows = rows / rows.norm(dim=2, keepdim=True)
        means.append(rows.transpose(1, 2) @ rows / rows.shape[1])
    assert_close(NSTLoss()(student, teacher), (means[0] - means[1]).square().sum((1, 2)).mean())


def test_order_scale_and_sign_of_channels_do_not_matter() -> None:
    (student,), (teacher,) = drawn((2, 3, 4, 4)), drawn((2, 5, 4, 4), seed=1)
    expected = NSTLoss()([student], [teacher])
    scale = torch.tensor([3.0, -0.1, 20.0], dtype=torch.float64)[:, None, None]
    assert_close(NSTLoss()([(student * scale).flip(1)], [teacher]), expected)
    assert abs(NSTLoss()([student * scale], [student])) < 1e-12 < expected


def test_the_larger_map_is_pooled_first() -> None:
    (student,), (teacher,) = drawn((2, 3, 2, 2)), drawn((2, 5, 6, 6), seed=1)
    small = torch.nn.functional.avg_pool2d(teacher, 3)
    assert_close(NSTLoss()([student], [teacher]), NSTLoss()([student], [small]))
    assert_close(NSTLoss()([teacher], [student]), NSTLoss()([small], [student]))


def test_a_dead_channel_gets_no_gradient_and_one_sample_will_do() -> None:
    student = torch.zeros(1, 2, 2, 2)
    student[0, 1, 0] = torch.tensor([3.0, 4.0])
    student.requires_grad_()
    teacher = torch.ones(1, 1, 2, 2)
    loss = NSTLoss()([student], [teacher])
    loss.backward()
    # Teacher: 1. Student: one of 4 pairs is 1. Cross: (0.5 (0.6 + 0.8))^2 = 0.49, mean of 2.
    torch.testing.assert_close(loss, torch.tensor(1 + 0.25 - 2 * 0.245))
    assert (student.grad[0, 0] == 0).all()
    assert student.grad[0, 1].isfinite().all()
    assert student.grad[0, 1].any()
