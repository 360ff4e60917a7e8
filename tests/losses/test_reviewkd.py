"""ReviewKD against the published numbers and a plain computation."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from shared.golden_vectors import assert_close, cases_of
from shared.map_draws import drawn, heads_of, levels, through
from shared.terms import loss_and_terms
from softlabels.losses.reviewkd import ReviewKDLoss

CASES = cases_of("reviewkd")
POOLED = [torch.zeros(2, 4)], [torch.zeros(2, 4)]  # the deepest level, without a difference

# Names of a block's parameters in the golden file, by their names here.
NAMES = {
    "narrow.0.weight": "conv1_weight",
    "narrow.1.weight": "bn1_weight",
    "narrow.1.bias": "bn1_bias",
    "widen.0.weight": "conv2_weight",
    "widen.1.weight": "bn2_weight",
    "widen.1.bias": "bn2_bias",
    "attention.weight": "att_weight",
    "attention.bias": "att_bias",
}


def assert_close_to_largest(actual, expected, largest) -> None:
    """A pooled level's BatchNorm of 2 values has tiny gradients, which are mostly rounding."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * max(float(largest), 1.0))


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_published_ones(case) -> None:
    student = levels(case, "student_map", gradient=True)
    teacher = levels(case, "teacher_map")
    values = {
        "student_maps": student[:-1],
        "teacher_maps": teacher[:-1],
        "student_pooled": [student[-1].flatten(1)],
        "teacher_pooled": [teacher[-1].flatten(1)],
    }
    width = len(case["abf_0_bn1_weight"])
    method = ReviewKDLoss(max_width=width)
    heads = heads_of(method, values)
    published = {
        f"blocks.{level}.{ours}": case[f"abf_{level}_{theirs}"]
        for level in range(len(student))
        for ours, theirs in NAMES.items()
        if f"abf_{level}_{theirs}" in case
    }
    assert published.keys() == dict(heads.named_parameters()).keys()
    heads.load_state_dict(published, strict=False)
    replaced = heads(values)
    outputs = [*replaced["student_maps"], *replaced["student_pooled"]]
    for level, output in enumerate(outputs):
        output.retain_grad()
        assert_close(output, case[f"output_map_{level}"].reshape(output.shape))
    found = loss_and_terms(method, **{**values, **replaced})
    for level, part in enumerate(found.terms.values()):
        assert_close(part, case[f"level_loss_{level}"])
    warm_up = min(case["epoch"] / case["warmup_epochs"], torch.tensor(1.0))
    loss = case["weight"] * warm_up * found.loss
    assert_close(found.loss, case["hcl_total"])
    assert_close(loss, case["loss"])
    loss.backward()
    largest = max(value.abs().max() for name, value in case.items() if name.startswith("grad_"))
    for level, output in enumerate(outputs):
        expected = case[f"grad_output_map_{level}"].reshape(output.shape)
        assert_close_to_largest(output.grad, expected, largest)
        expected = case[f"grad_student_map_{level}"]
        assert_close_to_largest(student[level].grad, expected, largest)
    for name, parameter in heads.named_parameters():
        _, level, rest = name.split(".", 2)
        expected = case[f"grad_abf_{level}_{NAMES[rest]}"]
        assert_close_to_largest(parameter.grad, expected, largest)


@pytest.mark.parametrize(
    ("size", "weights"),
    [
        ((6, 6), {4: 0.5, 2: 0.25, 1: 0.125}),
        ((4, 4), {2: 0.5, 1: 0.25}),
        ((2, 3), {1: 0.5}),
        ((1, 1), {}),
    ],
)
def test_each_scale_has_half_the_weight_of_the_one_before(size, weights) -> None:
    (student,), (teacher,) = drawn((2, 3, *size)), drawn((2, 3, *size), seed=1)
    total = (student - teacher).square().mean()
    for side, weight in weights.items():
        pooled = [functional.adaptive_avg_pool2d(map, side) for map in (student, teacher)]
        total += weight * functional.mse_loss(*pooled)
    expected = total / (1 + sum(weights.values()))
    found = ReviewKDLoss().reduced([student], [teacher], *POOLED)
    assert_close(found["level_0"], expected)


def test_a_plain_computation_of_the_fusion_gives_the_same() -> None:
    student, teacher = drawn((3, 4, 6, 6)), drawn((3, 5, 3, 3), seed=1)
    student_pooled, teacher_pooled = drawn((3, 6), seed=2), drawn((3, 7), seed=3)
    values = {
        "student_maps": student,
        "teacher_maps": teacher,
        "student_pooled": student_pooled,
        "teacher_pooled": teacher_pooled,
    }
    heads = heads_of(ReviewKDLoss(), values)
    parameters = dict(heads.named_parameters())

    def normed(map):
        mean = map.mean((0, 2, 3), keepdim=True)
        return (map - mean) / (map.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()

    # A 1x1 convolution is a product over channels; of a 3x3 one, a lone position sees the center.
    def narrowed(map, block):
        weight = parameters[f"blocks.{block}.narrow.0.weight"][..., 0, 0]
        return normed(torch.einsum("bdhw,ed->behw", map, weight))

    deep = narrowed(student_pooled[0][..., None, None], 1)
    center = parameters["blocks.1.widen.0.weight"][..., 1, 1]
    deep_output = normed(torch.einsum("bdhw,ed->behw", deep, center))
    own = narrowed(student[0], 0)
    both = torch.cat((own, deep.expand_as(own)), 1)
    weight = parameters["blocks.0.attention.weight"][..., 0, 0]
    bias = parameters["blocks.0.attention.bias"][:, None, None]
    shares = torch.sigmoid(torch.einsum("bdhw,ed->behw", both, weight) + bias)
    blend = shares[:, :1] * own + shares[:, 1:] * deep
    smaller = blend[:, :, ::2, ::2]
    output = normed(functional.conv2d(smaller, parameters["blocks.0.widen.0.weight"], padding=1))

    def loss_of(values):
        method = ReviewKDLoss()
        return method(**method.arguments_of(values))

    expected = ReviewKDLoss()([output], teacher, [deep_output.flatten(1)], teacher_pooled)
    assert_close(loss_of(through(heads, values)), expected)


def test_what_is_handed_up_has_the_size_of_the_teacher() -> None:
    values = {
        "student_maps": drawn((2, 3, 4, 4), (2, 3, 4, 4)),
        "teacher_maps": drawn((2, 5, 4, 4), (2, 5, 2, 2)),
        "student_pooled": drawn((2, 8)),
        "teacher_pooled": drawn((2, 6)),
    }
    # No batch statistics: each position counts where it is read alone.
    heads = heads_of(ReviewKDLoss(), values).eval()
    before = heads(values)["student_maps"]
    # The nearest positions of a half as large map have even coordinates.
    for row, changes in ((1, False), (2, True)):
        changed = values["student_maps"][1].clone()
        changed[:, :, row, row] += 1
        after = heads({**values, "student_maps": [values["student_maps"][0], changed]})
        for ours, theirs in zip(before, after["student_maps"], strict=True):
            assert torch.equal(ours, theirs) != changes


def test_equal_maps_have_no_loss() -> None:
    maps, pooled = drawn((2, 3, 8, 8), gradient=True), drawn((2, 4), gradient=True)
    loss = ReviewKDLoss()(maps, [maps[0].detach()], pooled, [pooled[0].detach()])
    loss.backward()
    assert loss == 0
    assert all((feature.grad == 0).all() for feature in (*maps, *pooled))


def test_the_deepest_level_has_no_attention_and_widths_are_capped() -> None:
    values = {
        "student_maps": drawn((2, 3, 4, 4)),
        "teacher_maps": drawn((2, 5, 4, 4)),
        "student_pooled": drawn((2, 8)),
        "teacher_pooled": drawn((2, 6)),
    }
    heads = heads_of(ReviewKDLoss(max_width=4), values)
    assert [name for name, _ in heads.named_parameters() if "attention" in name] == [
        "blocks.0.attention.weight",
        "blocks.0.attention.bias",
    ]
    assert {block.narrow[0].out_channels for block in heads.blocks} == {4}
    assert heads_of(ReviewKDLoss(), values).blocks[0].narrow[0].out_channels == 8
    replaced = heads(values)
    assert replaced["student_maps"][0].shape == (2, 5, 4, 4)
    assert replaced["student_pooled"][0].shape == (2, 6)


def test_the_student_is_read_after_the_activation_unless_asked() -> None:
    inputs = ReviewKDLoss().inputs
    assert not inputs["student_maps"].before_activation
    assert inputs["teacher_maps"].before_activation
    assert (inputs["student_pooled"].form, inputs["student_pooled"].stages) == ("pooled", ("last",))
    changed = ReviewKDLoss(student_before_activation=True).inputs
    assert changed["student_maps"].before_activation


def test_wrong_settings_and_shapes_are_told() -> None:
    with pytest.raises(ValueError, match="max_width must be finite, above 0, got 0"):
        ReviewKDLoss(max_width=0)
    with pytest.raises(TypeError, match="max_width must be a whole number, got float"):
        ReviewKDLoss(max_width=1.5)
    with pytest.raises(TypeError, match="student_before_activation must be True or False"):
        ReviewKDLoss(student_before_activation=1)
    with pytest.raises(ValueError, match="same height and width"):
        ReviewKDLoss()(drawn((2, 3, 4, 4)), drawn((2, 3, 2, 2)), *POOLED)
    shapes = {"student_maps": [(2, 3)], "teacher_maps": [(2, 3, 4, 4)]}
    with pytest.raises(ValueError, match=r"student_maps must be \[B, D, H, W\], got \(2, 3\)"):
        ReviewKDLoss().build_adapters(shapes)
