"""SP: golden vectors, a loop over all pairs, and maps of zeros."""

from __future__ import annotations

import math

import pytest
import torch

from shared.golden_vectors import assert_close, cases_of
from softlabels.inputs import Features
from softlabels.losses.sp import SPLoss


def maps(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", cases_of("sp"))
def test_values_and_gradients_of_the_reference(case):
    levels = range(int(case["num_levels"]))
    student = [case[f"student_map_{level}"].requires_grad_() for level in levels]
    teacher = [case[f"teacher_map_{level}"] for level in levels]

    loss = SPLoss()(student, teacher)
    weighted = case["weight"] * loss
    weighted.backward()

    assert_close(loss, case["total"])
    assert_close(weighted, case["loss"])
    for level in levels:
        alone = SPLoss()(student[level : level + 1], teacher[level : level + 1])
        assert_close(alone, case[f"level_loss_{level}"])
        assert_close(student[level].grad, case[f"grad_student_map_{level}"])


def test_a_loop_over_pairs():
    student, teacher = maps(5, 2, 3, 1), maps(5, 3, 2, 2, seed=1)

    def similarities(values):
        rows = [map.flatten().tolist() for map in values]
        products = [[sum(x * y for x, y in zip(a, b, strict=True)) for b in rows] for a in rows]
        return [[value / math.hypot(*line) for value in line] for line in products]

    ours, theirs = similarities(student), similarities(teacher)
    expected = sum((ours[i][j] - theirs[i][j]) ** 2 for i in range(5) for j in range(5)) / 25

    assert_close(SPLoss()([student], [teacher]), torch.tensor(expected, dtype=torch.float64))


def test_scale_and_rotation_of_the_channels_do_not_matter():
    teacher = maps(4, 3, 2, 2)
    rotation = torch.linalg.qr(maps(3, 3, seed=2)).Q
    turned = 5.0 * torch.einsum("bdhw,de->behw", teacher, rotation)

    assert SPLoss()([turned], [teacher]).abs() < 1e-12
    assert SPLoss()([teacher + 1.0], [teacher]) > 1e-3


def test_levels_are_paired_from_the_deepest():
    student, teacher = [maps(3, 2, 4, 4), maps(3, 4, 2, 2)], [maps(3, 5, 1, 1, seed=1)]

    assert SPLoss()(student, teacher) == SPLoss()(student[1:], teacher)
    assert SPLoss()(teacher, student) == SPLoss()(teacher, student[1:])


def test_a_map_of_zeros_gets_no_gradient_from_its_own_row():
    student = maps(3, 2, 2, 2)
    student[1] = 0.0
    student.requires_grad_()
    teacher = maps(3, 2, 2, 2, seed=1).requires_grad_()

    loss = SPLoss()([student], [teacher])
    loss.backward()

    assert loss.isfinite()
    # Its similarity to the two others, whose rows it stands in, still moves it.
    assert 0 < student.grad[1].abs().max() < 10
    assert teacher.grad is None


def test_half_precision_is_widened_also_under_autocast():
    student = (100 * maps(4, 3, 2, 2)).bfloat16().requires_grad_()
    teacher = maps(4, 3, 2, 2, seed=1).bfloat16()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = SPLoss()([student], [teacher])
    loss.backward()

    assert loss.dtype == torch.float32
    assert torch.equal(loss, SPLoss()([student.float()], [teacher.float()]))
    assert student.grad.isfinite().all()


def test_one_sample_is_similar_to_itself_alone():
    assert SPLoss()([maps(1, 2, 2, 2)], [maps(1, 3, 1, 1)]) == 0


def test_the_module_is_the_function():
    student, teacher = maps(4, 3, 2, 2), maps(4, 5, 1, 1, seed=1)

    assert SPLoss()([student], [teacher]) == SPLoss()([student], [teacher])
    assert SPLoss.defaults.weight == 3000
    assert SPLoss(stages=("stages",)).inputs["teacher_maps"] == Features(
        of="teacher", stages=("stages",), form="map"
    )


def test_errors_say_what_was_got():
    good = maps(4, 3, 2, 2)
    with pytest.raises(TypeError, match="student_maps must be a list of feature maps, got Tensor"):
        SPLoss()(good, [good])
    with pytest.raises(ValueError, match="teacher_maps must hold at least one feature map"):
        SPLoss()([good], [])
    with pytest.raises(ValueError, match="must be of one batch, got 4 samples"):
        SPLoss()([good], [good[:3]])
    with pytest.raises(TypeError, match="stages must be a sequence, got str"):
        SPLoss(stages="last")
