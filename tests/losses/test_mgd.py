"""MGD against the reference's numbers, and against a plain sum."""

from __future__ import annotations

import pytest
import torch

from shared.golden_vectors import assert_close, cases_of
from softlabels.losses.mgd import MGDLoss


def shapes_of(**maps):
    return {name: [tuple(map.shape)] for name, map in maps.items()}


def heads_for(student_map, teacher_map, **settings):
    shapes = shapes_of(student_maps=student_map, teacher_maps=teacher_map)
    return MGDLoss(**settings).build_adapters(shapes).to(student_map.dtype)


def weights_of(case):
    """The reference's names of the heads' parameters."""
    names = {
        "generator.0.weight": "generator_weight_0",
        "generator.0.bias": "generator_bias_0",
        "generator.2.weight": "generator_weight_1",
        "generator.2.bias": "generator_bias_1",
        "align.weight": "align_weight",
        "align.bias": "align_bias",
    }
    return {ours: theirs for ours, theirs in names.items() if theirs in case}


@pytest.mark.parametrize("case", cases_of("mgd"))
def test_the_reference(case):
    student_map, teacher_map = case["student_map"].requires_grad_(), case["teacher_map"]
    heads = heads_for(student_map, teacher_map, mask_ratio=float(case["mask_ratio"]))
    names = weights_of(case)
    heads.load_state_dict({ours: case[theirs] for ours, theirs in names.items()})

    generated = heads.generated(student_map, case["noise"])
    loss = MGDLoss()([generated], [teacher_map])
    (float(case["alpha"]) * loss).backward()

    assert_close(generated.detach(), case["generated_map"])
    assert_close(loss.detach(), case["unweighted"])
    assert_close(float(case["alpha"]) * loss.detach(), case["loss"])
    assert_close(student_map.grad, case["grad_student_map"])
    for name, parameter in heads.named_parameters():
        assert_close(parameter.grad, case[f"grad_{names[name]}"])


def test_a_plain_sum():
    generator = torch.Generator().manual_seed(4)
    generated, teacher = torch.randn(2, 3, 2, 4, 5, generator=generator).double()

    total = 0.0
    for a, b in zip(generated.flatten().tolist(), teacher.flatten().tolist(), strict=True):
        total += (a - b) ** 2

    assert float(MGDLoss()([generated], [teacher])) == pytest.approx(total / 3, rel=1e-12)
    assert torch.equal(MGDLoss()([generated], [teacher]), MGDLoss()([generated], [teacher]))


def test_an_equal_map_costs_nothing_and_the_teacher_gets_no_gradient():
    teacher_map = torch.randn(2, 3, 4, 4, requires_grad=True)
    generated = torch.randn(2, 3, 4, 4, requires_grad=True)

    assert float(MGDLoss()([teacher_map.detach()], [teacher_map])) == 0
    MGDLoss()([generated], [teacher_map]).backward()

    assert teacher_map.grad is None
    torch.testing.assert_close(generated.grad, generated.detach() - teacher_map.detach())


def test_channels_are_masked_whole_anew_each_time_at_the_ratio():
    student_map = torch.ones(64, 50, 3, 3)
    heads = heads_for(student_map, student_map, mask_ratio=0.3)
    heads.generator = torch.nn.Identity()
    values = {"student_maps": [student_map], "teacher_maps": [student_map]}

    torch.manual_seed(0)
    (first,), (second,) = heads(values)["student_maps"], heads(values)["student_maps"]
    torch.manual_seed(0)
    (again,) = heads(values)["student_maps"]

    # Kept values stay as they are, without rescaling.
    assert torch.equal(first, first[:, :, :1, :1].expand_as(first))
    assert set(first.unique().tolist()) == {0.0, 1.0}
    assert float((first == 0).float().mean()) == pytest.approx(0.3, abs=0.03)
    assert not torch.equal(first, second)
    assert torch.equal(first, again)


@pytest.mark.parametrize(("student_side", "teacher_side"), [(8, 4), (4, 8), (7, 4), (1, 3)])
@pytest.mark.parametrize("widths", [(3, 5), (4, 4)])
def test_widths_and_sizes_may_differ_and_every_parameter_gets_a_gradient(
    student_side, teacher_side, widths
):
    student_map = torch.randn(2, widths[0], student_side, student_side, requires_grad=True)
    teacher_map = torch.randn(2, widths[1], teacher_side, teacher_side)
    heads = heads_for(student_map, teacher_map)

    values = heads({"student_maps": [student_map], "teacher_maps": [teacher_map]})
    loss = MGDLoss()(values["student_maps"], [teacher_map])
    loss.backward()

    side = min(student_side, teacher_side)
    assert values["student_maps"][0].shape == (2, widths[1], side, side)
    assert loss.isfinite()
    assert all(parameter.grad is not None for parameter in heads.parameters())
    assert isinstance(heads.align, torch.nn.Identity) == (widths[0] == widths[1])


def test_a_larger_teacher_is_pooled():
    teacher_map = torch.arange(4.0).view(1, 1, 2, 2)

    # Mean 1.5.
    assert float(MGDLoss()([torch.full((1, 1, 1, 1), 2.0)], [teacher_map])) == 0.25


def test_half_precision_is_widened():
    generated = torch.full((1, 2, 2, 2), 300.0).half().requires_grad_()

    loss = MGDLoss()([generated], [torch.zeros(1, 2, 2, 2).half()])
    loss.backward()

    # 8 * 90000, above the largest half.
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == 720000
    assert generated.grad.isfinite().all()


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "same number of channels", lambda x: MGDLoss()([x], [x[:, :2]])),
        (ValueError, "same height and width", lambda x: MGDLoss()([x], [x[..., :2]])),
        (ValueError, "must be of one batch", lambda x: MGDLoss()([x], [x[:1]])),
        (TypeError, "teacher_map.* floating-point", lambda x: MGDLoss()([x], [x.long()])),
        (ValueError, "mask_ratio", lambda x: MGDLoss(mask_ratio=1.1)),
        (ValueError, "student_maps must be a list of one", lambda x: MGDLoss()([x, x], [x])),
    ],
)
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 3, 4, 4))
