"""AT against the published numbers and a plain computation."""

from __future__ import annotations

import pytest
import torch

from shared.golden_vectors import assert_close, cases_of
from shared.map_draws import drawn, levels
from shared.terms import loss_and_terms
from softlabels.losses.at import ATLoss

CASES = cases_of("at")


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_published_ones(case) -> None:
    student = levels(case, "student_map", gradient=True)
    teacher = levels(case, "teacher_map")
    output = loss_and_terms(ATLoss(power=int(case["power"])), student, teacher)
    for level, part in enumerate(output.terms.values()):
        assert_close(part, case[f"level_loss_{level}"])
    assert_close(output.loss, case["total"])
    loss = case["weight"] * output.loss
    assert_close(loss, case["loss"])
    loss.backward()
    for level, map in enumerate(student):
        assert_close(map.grad, case[f"grad_student_map_{level}"])


@pytest.mark.parametrize("power", [1, 2, 3])
def test_a_loop_over_samples_gives_the_same(power) -> None:
    student, teacher = drawn((3, 4, 2, 3)), drawn((3, 6, 2, 3), seed=1)
    gaps = []
    for row in range(3):
        attentions = []
        for map in (student[0][row], teacher[0][row]):
            sums = [
                sum(abs(float(map[channel, y, x])) ** power for channel in range(len(map)))
                for y in range(2)
                for x in range(3)
            ]
            length = sum(value**2 for value in sums) ** 0.5
            attentions.append([value / length for value in sums])
        gaps += [(ours - theirs) ** 2 for ours, theirs in zip(*attentions, strict=True)]
    expected = torch.tensor(sum(gaps) / len(gaps), dtype=torch.float64)
    assert_close(ATLoss(power=power)(student, teacher), expected)


def test_scales_signs_and_copies_of_channels_do_not_matter() -> None:
    (student,), (teacher,) = drawn((2, 3, 4, 4)), drawn((2, 5, 4, 4), seed=1)
    expected = ATLoss()([student], [teacher])
    scale = torch.tensor([3.0, -0.1], dtype=torch.float64)[:, None, None, None]
    changed = torch.cat((student, student), 1).flip(1) * scale
    assert_close(ATLoss()([changed], [teacher]), expected)
    assert ATLoss()([changed], [student]) < 1e-12 < expected


def test_the_larger_map_is_pooled_first() -> None:
    (student,), (teacher,) = drawn((2, 3, 2, 2)), drawn((2, 5, 6, 6), seed=1)
    small = torch.nn.functional.avg_pool2d(teacher, 3)
    assert_close(ATLoss()([student], [teacher]), ATLoss()([student], [small]))
    assert_close(ATLoss()([teacher], [student]), ATLoss()([small], [student]))


def test_no_attention_at_all_is_a_constant_and_one_sample_will_do() -> None:
    student = torch.zeros(1, 3, 2, 2, requires_grad=True)
    teacher = torch.ones(1, 5, 2, 2)
    # The teacher's attention is 1/2 at each of 4 positions: the mean of squares is 1/4.
    for power in (1, 2):
        loss = ATLoss(power=power)([student], [teacher])
        loss.backward()
        torch.testing.assert_close(loss, torch.tensor(0.25))
        assert (student.grad == 0).all()


def test_wrong_settings_are_told() -> None:
    with pytest.raises(ValueError, match="power must be finite, above 0, got 0"):
        ATLoss(power=0)
    with pytest.raises(TypeError, match="power must be a whole number, got bool"):
        ATLoss(power=True)(drawn((1, 3, 2, 2)), drawn((1, 3, 2, 2)))
    with pytest.raises(TypeError, match="power must be a whole number, got float"):
        ATLoss(power=2.5)
