"""FitNet against the published numbers; its regressors by size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shared.golden_vectors import assert_close, cases_of
from shared.map_draws import drawn, heads_of, through
from softlabels.losses.fitnet import FitNetLoss

CASES = cases_of("fitnet")


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_published_ones(case) -> None:
    student = case["student_map"].clone().requires_grad_()
    values = {"student_maps": [student], "teacher_maps": [case["teacher_map"]]}
    method = FitNetLoss()
    heads = heads_of(method, values)
    convolution, norm, _ = heads.levels[0]
    # The regressor's kind follows from the sizes alone.
    assert isinstance(convolution, nn.ConvTranspose2d) == bool(case["transposed"])
    assert convolution.stride == (case["stride"],) * 2
    assert convolution.padding == (case["padding"],) * 2
    with torch.no_grad():
        for layer, name in ((convolution, "conv"), (norm, "bn")):
            assert layer.weight.shape == case[f"{name}_weight"].shape
            layer.weight.copy_(case[f"{name}_weight"])
            layer.bias.copy_(case[f"{name}_bias"])
    (regressed,) = heads(values)["student_maps"]
    regressed.retain_grad()
    assert_close(regressed, case["regressed_map"])
    loss = method(**{**values, "student_maps": [regressed]})
    assert_close(loss, case["mse"])
    (case["weight"] * loss).backward()
    assert_close(case["weight"] * loss, case["loss"])
    assert_close(regressed.grad, case["grad_regressed_map"])
    assert_close(student.grad, case["grad_student_map"])
    for layer, name in ((convolution, "conv"), (norm, "bn")):
        assert_close(layer.weight.grad, case[f"grad_{name}_weight"])
        assert_close(layer.bias.grad, case[f"grad_{name}_bias"])


def test_a_loop_over_levels_gives_the_same() -> None:
    student = drawn((2, 3, 4, 4), (2, 5, 2, 2))
    teacher = drawn((2, 9, 8, 8), (2, 3, 4, 4), (2, 5, 2, 2), seed=1)
    expected = 0.0
    for ours, theirs in ((student[0], teacher[1]), (student[1], teacher[2])):
        gaps = [(a - b) ** 2 for a, b in zip(ours.flatten(), theirs.flatten(), strict=True)]
        expected += sum(gaps) / len(gaps)
    assert_close(FitNetLoss()(student, teacher), expected)


def test_the_larger_map_is_pooled() -> None:
    (student,), (teacher,) = drawn((2, 3, 2, 2)), drawn((2, 3, 6, 4), seed=1)
    small = nn.functional.avg_pool2d(teacher, (3, 2))
    assert_close(FitNetLoss()([student], [teacher]), FitNetLoss()([student], [small]))
    assert_close(FitNetLoss()([teacher], [student]), FitNetLoss()([small], [student]))


@pytest.mark.parametrize(
    ("student", "teacher", "kind", "kernel", "regressed"),
    [
        ((8, 8), (4, 4), nn.Conv2d, (3, 3), (4, 4)),
        ((4, 4), (8, 8), nn.ConvTranspose2d, (4, 4), (8, 8)),
        ((7, 9), (7, 9), nn.Conv2d, (1, 1), (7, 9)),
        ((7, 9), (5, 8), nn.Conv2d, (3, 2), (5, 8)),
        # The published code has none for these.
        ((4, 4), (7, 7), nn.Conv2d, (1, 1), (4, 4)),
        ((4, 9), (7, 7), nn.Conv2d, (1, 3), (4, 7)),
    ],
)
def test_the_regressor_goes_by_the_sizes(student, teacher, kind, kernel, regressed) -> None:
    values = {"student_maps": drawn((2, 3, *student)), "teacher_maps": drawn((2, 5, *teacher))}
    heads = heads_of(FitNetLoss(), values)
    convolution = heads.levels[0][0]
    assert type(convolution) is kind
    assert convolution.kernel_size == kernel
    heard = through(heads, values)
    assert heard["student_maps"][0].shape == (2, 5, *regressed)
    assert FitNetLoss()(**heard).isfinite()


def test_equal_maps_have_no_loss() -> None:
    maps = drawn((2, 3, 4, 4), gradient=True)
    loss = FitNetLoss()(maps, [map.detach() for map in maps])
    loss.backward()
    assert loss == 0
    assert (maps[0].grad == 0).all()


def test_one_sample_will_do() -> None:
    values = {"student_maps": drawn((1, 3, 4, 4)), "teacher_maps": drawn((1, 5, 4, 4))}
    assert FitNetLoss()(**through(heads_of(FitNetLoss(), values), values)).isfinite()


def test_the_second_stage_is_read_unless_asked() -> None:
    assert FitNetLoss().inputs["student_maps"].stages == ("stage:1",)
    assert not FitNetLoss().inputs["teacher_maps"].before_activation


def test_maps_of_other_widths_are_told() -> None:
    with pytest.raises(ValueError, match="same number of channels"):
        FitNetLoss()(drawn((2, 3, 4, 4)), drawn((2, 5, 4, 4)))
