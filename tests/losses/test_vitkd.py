"""ViTKD against the reference's numbers, and against plain sums."""

from __future__ import annotations

import pytest
import torch

from shared.golden_vectors import assert_close, cases_of
from shared.terms import loss_and_terms
from softlabels.losses.vitkd import ViTKDLoss


def on_grid(tokens):
    """[B, N, D] tokens of a square as a map."""
    batch_size, count, width = tokens.shape
    side = round(count**0.5)
    return tokens.transpose(1, 2).reshape(batch_size, width, side, side)


def heads_for(student_width, teacher_width, side=4, **settings):
    student, teacher = (2, student_width, side, side), (2, teacher_width, side, side)
    shapes = {
        "student_low": [student] * 2,
        "student_high": [student],
        "teacher_low": [teacher] * 2,
        "teacher_high": [teacher],
    }
    return ViTKDLoss(**settings).build_adapters(shapes)


NAMES = {
    "mask_token": "mask_token",
    "generator.0.weight": "generator_weight_0",
    "generator.0.bias": "generator_bias_0",
    "generator.2.weight": "generator_weight_1",
    "generator.2.bias": "generator_bias_1",
    "align_low.0.weight": "align_low_0_weight",
    "align_low.0.bias": "align_low_0_bias",
    "align_low.1.weight": "align_low_1_weight",
    "align_low.1.bias": "align_low_1_bias",
    "align_high.weight": "align_high_weight",
    "align_high.bias": "align_high_bias",
}


@pytest.mark.parametrize("case", cases_of("vitkd"))
def test_the_reference(case):
    student_low = case["student_low"].requires_grad_()
    student_high = case["student_high"].requires_grad_()
    settings = {
        "mimic_weight": float(case["alpha"]),
        "generation_weight": float(case["beta"]),
        "mask_ratio": float(case["mask_ratio"]),
    }
    side = round(student_high.shape[1] ** 0.5)
    heads = heads_for(student_low.shape[3], case["teacher_low"].shape[3], side, **settings)
    heads = heads.double()
    with torch.no_grad():
        for name, parameter in heads.named_parameters():
            parameter.copy_(case[NAMES[name]].view_as(parameter))

    low = [on_grid(student_low[:, level]) for level in range(2)]
    noise = case["noise"].view(-1, side, side)
    generated, mask = heads.generated(on_grid(student_high), noise)
    loss, parts = loss_and_terms(
        ViTKDLoss(**settings),
        [align(map) for align, map in zip(heads.align_low, low, strict=True)],
        [generated],
        [on_grid(case["teacher_low"][:, level]) for level in range(2)],
        [on_grid(case["teacher_high"])],
        mask,
    )
    loss.backward()

    assert torch.equal(mask.flatten(1).double(), case["mask"])
    assert_close(parts["mimic"].detach(), case["mimic_term"])
    assert_close(parts["generation"].detach(), case["generation_term"])
    assert_close(loss.detach(), case["loss"])
    assert_close(student_low.grad, case["grad_student_low"])
    assert_close(student_high.grad, case["grad_student_high"])
    for name, parameter in heads.named_parameters():
        assert_close(parameter.grad, case[f"grad_{NAMES[name]}"].view_as(parameter))


def drawn(side=3):
    generator = torch.Generator().manual_seed(5)
    low = torch.randn(2, 2, 4, side, side, generator=generator).double()
    teacher_low = torch.randn(2, 2, 4, side, side, generator=generator).double()
    high, teacher_high = torch.randn(2, 2, 4, side, side, generator=generator).double()
    mask = torch.rand(2, side, side, generator=generator) < 0.4
    return [*low], [high], [*teacher_low], [teacher_high], mask


def test_plain_sums():
    low, (high,), teacher_low, (teacher_high,), mask = drawn()
    settings = {"mimic_weight": 0.3, "generation_weight": 0.7, "mask_ratio": 0.4}

    loss, parts = loss_and_terms(ViTKDLoss(**settings), *drawn())

    mimic = generation = 0.0
    for sample in range(2):
        for channel in range(4):
            for row in range(3):
                for column in range(3):
                    at = (sample, channel, row, column)
                    for ours, theirs in zip(low, teacher_low, strict=True):
                        mimic += float(ours[at] - theirs[at]) ** 2
                    if mask[sample, row, column]:
                        generation += float(high[at] - teacher_high[at]) ** 2
    assert float(parts["mimic"]) == pytest.approx(0.3 * mimic / 2, rel=1e-12)
    assert float(parts["generation"]) == pytest.approx(0.7 * generation / 2 / 0.4, rel=1e-12)
    assert_close(loss, parts["mimic"] + parts["generation"])


def test_the_heads_mask_anew_each_time_at_the_ratio():
    heads = heads_for(4, 4, mask_ratio=0.3)
    maps = [torch.ones(2, 4, 4, 4)]
    values = {"student_low": maps * 2, "student_high": maps}

    torch.manual_seed(0)
    first, second = heads(values)["mask"], heads(values)["mask"]
    torch.manual_seed(0)
    again = heads(values)["mask"]

    # int(16 * 0.7) = 11 of 16 are kept.
    assert first.flatten(1).sum(1).tolist() == [5, 5]
    assert not torch.equal(first, second)
    assert torch.equal(first, again)


def test_what_is_masked_is_not_seen():
    heads = heads_for(3, 5)
    student_map = torch.randn(2, 3, 4, 4)
    noise = torch.rand(2, 4, 4)
    generated, mask = heads.generated(student_map, noise)

    changed, _ = heads.generated(student_map + 10 * mask.unsqueeze(1), noise)

    torch.testing.assert_close(changed, generated)


@pytest.mark.parametrize("widths", [(3, 5), (4, 4)])
def test_every_parameter_gets_a_gradient_in_a_step_of_one_sample(widths):
    student = [torch.randn(1, widths[0], 2, 3, requires_grad=True) for _ in range(3)]
    teacher = [torch.randn(1, widths[1], 2, 3, requires_grad=True) for _ in range(3)]
    values = {
        "student_low": student[:2],
        "student_high": student[2:],
        "teacher_low": teacher[:2],
        "teacher_high": teacher[2:],
    }
    module = ViTKDLoss()
    shapes = {name: [tuple(map.shape) for map in maps] for name, maps in values.items()}
    heads = module.build_adapters(shapes)

    module(**{**values, **heads(values)}).backward()

    assert all(parameter.grad is not None for parameter in heads.parameters())
    assert all(map.grad is not None and map.grad.isfinite().all() for map in student)
    assert all(map.grad is None for map in teacher)
    assert len([*heads.parameters()]) == (11 if widths == (3, 5) else 5)


def test_half_precision_is_widened():
    high = torch.full((1, 2, 2, 2), 300.0).half()
    zeros, mask = torch.zeros(1, 2, 2, 2).half(), torch.ones(1, 2, 2)

    loss = ViTKDLoss(mimic_weight=1.0)([high], [high], [zeros], [zeros], mask)

    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(720000, rel=1e-4)


def test_another_grid_is_refused():
    shape, other = (2, 4, 4, 4), (2, 4, 3, 5)
    shapes = {"student_low": [shape] * 2, "student_high": [shape]}
    shapes.update(teacher_low=[other] * 2, teacher_high=[other])

    with pytest.raises(ValueError, match=r"one grid of tokens .* got 4 x 4 and 3 x 5: use"):
        ViTKDLoss().build_adapters(shapes)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "must hold as many maps, got 2 and 1", {"teacher_low": drawn()[2][:1]}),
        (ValueError, "same number of channels", {"teacher_high": [torch.zeros(2, 5, 3, 3)]}),
        (ValueError, "same height and width", {"teacher_high": [torch.zeros(2, 4, 4, 4)]}),
        (ValueError, r"mask must be \(2, 3, 3\), got \(2, 9\)", {"mask": torch.zeros(2, 9)}),
        (TypeError, "student_high.* floating", {"student_high": [torch.zeros(2, 4, 3, 3).int()]}),
    ],
)
def test_errors(error, message, change):
    names = ("student_low", "student_high", "teacher_low", "teacher_high", "mask")
    arguments = {**dict(zip(names, drawn(), strict=True)), **change}

    with pytest.raises(error, match=message):
        ViTKDLoss()(**arguments)


@pytest.mark.parametrize(
    "change", [{"mimic_weight": -1.0}, {"generation_weight": -1.0}, {"mask_ratio": 0.0}]
)
def test_wrong_settings_are_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        ViTKDLoss(**change)


def test_the_mask_comes_from_the_adapters():
    with pytest.raises(TypeError, match="mask is missing: it comes from the module that build_ada"):
        ViTKDLoss()(*drawn()[:4])
