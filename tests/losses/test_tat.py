"""TaT by hand, and against plain sums."""

from __future__ import annotations

import math

import pytest
import torch

from softlabels.losses.tat import TaTLoss


def test_by_hand():
    # Two positions of the student, one channel: queries 0 and ln 3, values 4 and 8.
    query = torch.tensor([0.0, math.log(3)]).view(1, 1, 1, 2).double()
    value = torch.tensor([4.0, 8.0]).view(1, 1, 1, 2).double()
    # Teacher 1: scores 0, ln 3, weights 1/4, 3/4, rebuilt 7, gap 6.
    # Teacher 2: scores 0, 2 ln 3, weights 1/10, 9/10, rebuilt 7.6, gap 5.6.
    # Teacher 0: weights 1/2, 1/2, rebuilt 6, gap 6.
    teacher = torch.tensor([1.0, 2.0, 0.0]).view(1, 1, 3, 1).double()

    loss = TaTLoss()([query, value], [teacher])

    assert float(loss) == pytest.approx((36 + 5.6**2 + 36) / 3, rel=1e-6)


def test_the_published_code_by_hand():
    query = torch.tensor([0.0, math.log(3)]).view(1, 1, 1, 2).double()
    value = torch.tensor([4.0, 8.0]).view(1, 1, 1, 2).double()
    # Over the teacher's positions: student 0 gives 1/2, 1/2; student 1 (3 : 9) gives 1/4, 3/4.
    # Rebuilt 6 and 7, compared with 1 and 2.
    teacher = torch.tensor([1.0, 2.0]).view(1, 1, 1, 2).double()

    loss = TaTLoss(softmax_over="teacher")([query, value], [teacher])

    assert float(loss) == pytest.approx(25, rel=1e-6)


def test_plain_sums():
    generator = torch.Generator().manual_seed(8)
    query, value = torch.randn(2, 2, 3, 2, 2, generator=generator).double()
    teacher = torch.randn(2, 3, 3, 1, generator=generator).double()

    loss = TaTLoss()([query, value], [teacher])

    total = 0.0
    for sample in range(2):
        q, v, t = (map[sample].flatten(1).T.tolist() for map in (query, value, teacher))
        for target in t:
            powers = [math.exp(sum(a * b for a, b in zip(x, target, strict=True))) for x in q]
            for channel in range(3):
                rebuilt = sum(p * x[channel] for p, x in zip(powers, v, strict=True))
                total += (rebuilt / sum(powers) - target[channel]) ** 2
    assert float(loss) == pytest.approx(total / (2 * 3 * 3), rel=1e-12)


@pytest.mark.parametrize("softmax_over", ["student", "teacher"])
def test_the_module_is_the_function_and_the_teacher_gets_no_gradient(softmax_over):
    query, value, teacher = torch.randn(3, 2, 4, 3, 3).unbind()
    query.requires_grad_()
    value.requires_grad_()
    teacher.requires_grad_()

    loss = TaTLoss(softmax_over=softmax_over)([query, value], [teacher])
    loss.backward()

    assert torch.equal(loss, TaTLoss(softmax_over=softmax_over)([query, value], [teacher]))
    assert query.grad.any()
    assert value.grad.any()
    assert teacher.grad is None


def test_the_order_of_the_students_positions_is_nothing():
    query, value, teacher = torch.randn(3, 2, 4, 3, 3).double().unbind()

    torch.testing.assert_close(
        TaTLoss()([query.flip(2), value.flip(2)], [teacher]), TaTLoss()([query, value], [teacher])
    )


def test_the_right_position_found_costs_nothing():
    # Each query is far nearest to its own teacher's position.
    teacher = torch.eye(4).view(1, 4, 2, 2)

    assert float(TaTLoss()([100 * teacher, teacher], [teacher])) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("widths", [(3, 5), (4, 4)])
def test_the_heads_project_and_every_parameter_gets_a_gradient(widths):
    student_map = torch.randn(2, widths[0], 4, 4, requires_grad=True)
    teacher_map = torch.randn(2, widths[1], 2, 3)
    module = TaTLoss()
    values = {"student_maps": [student_map], "teacher_maps": [teacher_map]}
    shapes = {name: [tuple(map.shape) for map in maps] for name, maps in values.items()}
    heads = module.build_adapters(shapes)

    projected = heads(values)
    loss = module(**{**values, **projected})
    loss.backward()

    query_map, value_map = projected["student_maps"]
    assert query_map.shape == value_map.shape == (2, widths[1], 4, 4)
    assert not torch.equal(query_map, value_map)
    # BatchNorm on batch statistics.
    torch.testing.assert_close(query_map.mean((0, 2, 3)), torch.zeros(widths[1]), atol=1e-5, rtol=0)
    assert loss.isfinite()
    assert student_map.grad.any()
    assert all(parameter.grad is not None for parameter in heads.parameters())


@pytest.mark.parametrize("softmax_over", ["student", "teacher"])
def test_zeros_and_large_maps_stay_finite(softmax_over):
    large = (torch.eye(3).view(1, 1, 3, 3) * 6e4).requires_grad_()
    teacher = torch.full((1, 1, 3, 3), 6e4).half()
    for value in (large, torch.zeros_like(large)):
        loss = TaTLoss(softmax_over=softmax_over)([large, value], [teacher])
        loss.backward()

        assert loss.isfinite()
        assert large.grad.isfinite().all()
    # 6e4 squared is above the largest half.
    assert float(TaTLoss()([0 * teacher, 0 * teacher], [teacher])) == pytest.approx(3.6e9, rel=1e-3)


def test_autocast_changes_nothing():
    query, value, teacher = torch.randn(3, 2, 4, 3, 3).unbind()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = TaTLoss()([query, value], [teacher])

    assert torch.equal(inside, TaTLoss()([query, value], [teacher]))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "same number of channels", lambda x: TaTLoss()([x, x], [x[:, :2]])),
        (ValueError, "value_map must have the shape", lambda x: TaTLoss()([x, x[:, :2]], [x])),
        (ValueError, "of one batch", lambda x: TaTLoss()([x, x], [x[:1]])),
        (TypeError, "floating-point", lambda x: TaTLoss()([x, x], [x.int()])),
        (ValueError, "softmax_over", lambda x: TaTLoss(softmax_over="both")),
        (
            ValueError,
            "same height and width",
            lambda x: TaTLoss(softmax_over="teacher")([x, x], [x[..., :2]]),
        ),
        (ValueError, "queries and the values of the adapters", lambda x: TaTLoss()([x], [x])),
    ],
)
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 3, 4, 4))
