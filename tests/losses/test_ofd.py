"""OFD against the published numbers, a loop, and hand-made cases."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch

from shared.golden_vectors import assert_close, cases_of
from shared.map_draws import drawn, heads_of, levels
from shared.terms import loss_and_terms
from softlabels.losses.ofd import OFDLoss, ofd_margins

CASES = cases_of("ofd")


def norms_of(case) -> list[torch.Tensor]:
    return [
        torch.stack(pair)
        for pair in zip(
            levels(case, "teacher_bn_weight"), levels(case, "teacher_bn_bias"), strict=True
        )
    ]


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_published_ones(case) -> None:
    student = levels(case, "student_map", gradient=True)
    values = {
        "student_maps": student,
        "teacher_maps": levels(case, "teacher_map"),
        "norm_parameters": norms_of(case),
    }
    method = OFDLoss()
    heads = heads_of(method, values)
    published = {
        f"levels.{level}.{part}": case[f"{name}_{level}"]
        for level in range(len(student))
        for part, name in {
            "0.weight": "connector_weight",
            "1.weight": "connector_bn_weight",
            "1.bias": "connector_bn_bias",
        }.items()
    }
    heads.load_state_dict(published, strict=False)
    aligned = heads(values)["student_maps"]
    for map in aligned:
        map.retain_grad()
    output = loss_and_terms(method, **{**values, "student_maps": aligned})
    assert_close(output.loss * case["weight"], case["loss"])
    for level, part in enumerate(output.terms.values()):
        factor = case[f"level_weight_{level}"]
        assert_close(part, factor * case[f"level_loss_{level}"])
    (output.loss * case["weight"]).backward()
    for level, map in enumerate(aligned):
        # The published code has the teacher's map pooled, so the student's size stays.
        assert_close(map.grad, case[f"grad_aligned_map_{level}"])
        assert_close(student[level].grad, case[f"grad_student_map_{level}"])
        connector = heads.levels[level]
        assert_close(connector[0].weight.grad, case[f"grad_connector_weight_{level}"])
        assert_close(connector[1].weight.grad, case[f"grad_connector_bn_weight_{level}"])
        assert_close(connector[1].bias.grad, case[f"grad_connector_bn_bias_{level}"])


@pytest.mark.parametrize("case", CASES)
def test_margins_are_the_published_ones(case) -> None:
    for margin, expected in zip(ofd_margins(norms_of(case)), levels(case, "margin"), strict=True):
        assert_close(margin, expected)


def test_a_loop_over_elements_gives_the_same() -> None:
    student = drawn((2, 3, 3, 2), (2, 4, 1, 2))
    teacher = drawn((2, 3, 3, 2), (2, 4, 1, 2), seed=1)
    norms = drawn((2, 3), (2, 4), seed=2)
    normal = NormalDist()
    expected = 0.0
    for level in range(2):
        for index in torch.cartesian_prod(*(torch.arange(n) for n in student[level].shape)):
            ours, theirs = student[level][tuple(index)], teacher[level][tuple(index)]
            deviation, mean = abs(norms[level][0, index[1]].item()), norms[level][1, index[1]]
            share = normal.cdf(-mean / deviation)
            margin = -3 * deviation
            if share > 0.001:
                margin = mean - deviation * normal.pdf(mean / deviation) / share
            distance = (ours - theirs) ** 2
            if theirs <= margin:
                distance = (ours - margin) ** 2 if ours > margin else 0.0
            elif theirs <= 0 and ours <= theirs:
                distance = 0.0
            expected += distance / 2 / (2 if level == 0 else 1)
    assert_close(OFDLoss()(student, teacher, norms), expected)


def test_the_margin_is_the_mean_of_the_negative_values() -> None:
    parameters = torch.tensor([[2.0, -0.5], [1.0, -3.0]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400_000, generator=generator, dtype=torch.float64)
    for margin, (weight, bias) in zip(ofd_margins([parameters])[0], parameters.T, strict=True):
        values = weight * noise + bias
        torch.testing.assert_close(margin, values[values < 0].mean(), rtol=0, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_norm_weight_of_zero_has_finite_margins(dtype) -> None:
    # All values are the bias: their negative mean is the bias, or 0 where none is negative.
    parameters = torch.tensor([[0.0] * 4, [-1.5, 0.0, 2.0, -6e4]]).to(dtype)
    (margin,) = ofd_margins([parameters])
    expected = torch.tensor([-1.5, 0.0, 0.0, -6e4]).to(margin)
    torch.testing.assert_close(margin, expected, rtol=1e-3, atol=0)
    student = torch.ones(1, 4, 1, 1, requires_grad=True)
    loss = OFDLoss()([student], [-torch.ones(1, 4, 1, 1)], [parameters])
    loss.backward()
    # Targets are the larger of -1 and the margin: gaps of 2, 1, 1 and 2.
    torch.testing.assert_close(loss, torch.tensor(10.0))
    assert student.grad.flatten().tolist() == [4.0, 2.0, 2.0, 4.0]


def test_tiny_norm_weights_are_as_zero() -> None:
    parameters = torch.tensor([[1e-45, -1e-38], [-1.0, 1.0]])
    assert ofd_margins([parameters])[0].tolist() == pytest.approx([-1.0, 0.0])


def test_nothing_is_asked_where_the_activation_hides_the_difference() -> None:
    (teacher,) = drawn((2, 3, 4, 4))
    norms = drawn((2, 3), seed=1)
    lower = torch.where(teacher > 0, teacher, teacher - 1)
    assert OFDLoss()([lower], [teacher], norms) == 0
    assert OFDLoss()([lower + 1e-3], [teacher], norms) > 0


def test_the_larger_map_is_pooled_unless_sizes_must_be_equal() -> None:
    (student,), (teacher,) = drawn((2, 3, 2, 2)), drawn((2, 3, 6, 6), seed=1)
    norms = drawn((2, 3), seed=2)
    small = torch.nn.functional.avg_pool2d(teacher, 3)
    assert_close(OFDLoss()([student], [teacher], norms), OFDLoss()([student], [small], norms))
    assert_close(OFDLoss()([teacher], [student], norms), OFDLoss()([small], [student], norms))
    method = OFDLoss(pool_maps=False)
    assert_close(method([student], [small], norms), OFDLoss()([student], [small], norms))
    with pytest.raises(ValueError, match=r"same height and width, got \(2, 3, 2, 2\)"):
        method([student], [teacher], norms)


def test_the_module_reads_before_the_activation() -> None:
    inputs = OFDLoss(stages=("stage:1",)).inputs
    assert inputs["student_maps"].before_activation
    assert inputs["teacher_maps"].before_activation
    assert inputs["norm_parameters"].stages == ("stage:1",)


def test_connectors_have_the_published_initialization() -> None:
    # Normal with a variance of 2 over the output channels.
    values = {"student_maps": drawn((1, 300, 1, 1)), "teacher_maps": drawn((1, 200, 1, 1))}
    weight = heads_of(OFDLoss(), values).levels[0][0].weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / 200), rel=0.02)


@pytest.mark.parametrize(
    ("norms", "error", "message"),
    [
        (torch.ones(2, 3), TypeError, "norm_parameters must be a list, got Tensor"),
        ([], ValueError, "one tensor for each of the 1 teacher_maps, got 0"),
        ([torch.ones(2, 4)], ValueError, r"\[0\] must be \[2, 3\].*got \(2, 4\)"),
        ([torch.ones(2, 3).int()], TypeError, r"\[0\] must be a floating-point tensor"),
    ],
)
def test_norm_parameters_that_do_not_fit_are_told(norms, error, message) -> None:
    map = torch.ones(1, 3, 2, 2)
    with pytest.raises(error, match=message):
        OFDLoss()([map], [map], norms)
    with pytest.raises(TypeError, match="pool_maps must be True or False"):
        OFDLoss(pool_maps=1)
