"""Exits with layers of their own, on networks of every kind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shared.small_networks import NUM_CLASSES, images_of, small_cnn, small_vit
from softlabels.inputs.aux_branches import AuxBranchesProvider, Branch
from softlabels.taps import FeatureTap, Layout, TapPoint


def provided(
    model: nn.Module, places: list[str], batch_size: int = 2
) -> tuple[AuxBranchesProvider, list[Tensor], Tensor]:
    """The provider, what it gives, and the student's last map."""
    layout = Layout(model, (3, 16, 16))
    last = layout.point("last")
    points = [layout.point(place) for place in places]
    provider = AuxBranchesProvider(points, last, layout.num_classes)
    with FeatureTap(model, [*{point.key for point in (*points, last)}]) as tap:
        logits = model(images_of(batch_size))
        features = tap.pop()
    values = provider(model, logits, features)
    assert isinstance(values, list)
    return provider, values, last.as_map(features[last.key])


def convolutions(branch: nn.Module) -> list[tuple[int, int, tuple[int, ...]]]:
    """Channels in and out, and stride, of each."""
    return [
        (m.in_channels, m.out_channels, m.stride)
        for m in branch.modules()
        if isinstance(m, nn.Conv2d)
    ]


@pytest.mark.parametrize(
    ("model", "places"),
    [(small_cnn, ["stem", "stage1", "stage2"]), (small_vit, ["blocks.0", "blocks.2", "norm"])],
)
def test_logits_come_first_then_maps_of_the_last_maps_shape(model, places):
    provider, values, last = provided(model(), places)

    assert [point.path for point in provider.points] == places[:2]
    assert [tuple(value.shape) for value in values[:2]] == [(2, NUM_CLASSES)] * 2
    assert [value.shape for value in values[2:]] == [last.shape] * 2


@pytest.mark.parametrize(
    ("model", "places"), [(small_cnn, ["stem", "stage1"]), (small_vit, ["blocks.0", "blocks.2"])]
)
def test_the_logits_alone_train_every_parameter_and_the_student(model, places):
    student = model()
    provider, values, _ = provided(student, places)

    torch.stack(values[:2]).square().sum().backward()

    for name, parameter in provider.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.abs().sum() > 0), name
    assert next(student.parameters()).grad is not None


@pytest.mark.parametrize(
    ("model", "places"), [(small_cnn, ["stem", "stage1"]), (small_vit, ["blocks.0", "blocks.2"])]
)
def test_the_logits_are_those_of_the_maps_mean(model, places):
    provider, values, _ = provided(model(), places)

    for branch, logits, reached in zip(provider.branches, values[:2], values[2:], strict=True):
        expected = reached.mean((2, 3)) @ branch.fc.weight.T + branch.fc.bias
        torch.testing.assert_close(logits, expected)


def test_a_map_is_halved_and_widened_until_it_is_like_the_last_one():
    provider, _, _ = provided(small_cnn(), ["stem", "stage1"])

    # 8 channels at 16x16 and 12 at 8x8, to 16 at 4x4.
    assert convolutions(provider.branches[0]) == [(8, 16, (2, 2)), (16, 16, (2, 2))]
    assert convolutions(provider.branches[1]) == [(12, 16, (2, 2))]


def test_channels_double_up_to_those_of_the_last_map():
    branch = Branch(TapPoint("a", "NCHW", 4, 32, 32), TapPoint("z", "NCHW", 64, 4, 4), 5)

    assert [pair[:2] for pair in convolutions(branch)] == [(4, 8), (8, 16), (16, 64)]


@pytest.mark.parametrize(
    ("size", "last_size", "strides", "num_pools"),
    [
        ((4, 4), (4, 4), [(1, 1)], 0),  # at least one block
        ((7, 7), (4, 4), [(2, 2)], 0),  # rounded up, as padded convolutions do
        ((8, 8), (3, 3), [(2, 2)], 1),  # 8 -> 4, and 4 -> 2 would go too far
        ((6, 6), (4, 4), [(1, 1)], 1),
        ((8, 4), (2, 2), [(2, 2), (2, 1)], 0),
        ((3, 3), (1, 1), [(2, 2), (2, 2)], 0),
        ((2, 2), (4, 4), [(1, 1)], 1),
    ],
)
def test_sizes_that_do_not_halve_evenly_are_pooled(size, last_size, strides, num_pools):
    branch = Branch(TapPoint("a", "NCHW", 6, *size), TapPoint("z", "NCHW", 8, *last_size), 5)

    logits, reached = branch(torch.randn(2, 6, *size))

    assert [stride for *_, stride in convolutions(branch)] == strides
    assert sum(isinstance(m, nn.AdaptiveAvgPool2d) for m in branch.modules()) == num_pools
    assert tuple(reached.shape) == (2, 8, *last_size)
    assert tuple(logits.shape) == (2, 5)


def test_channels_last_maps_and_vectors_and_other_widths():
    swin = TapPoint("a", "NHWC", 6, 8, 8)
    provider = AuxBranchesProvider([swin], TapPoint("z", "NHWC", 12, 4, 4), 5)
    values = provider(nn.Identity(), torch.zeros(2, 5), {"a": torch.randn(2, 8, 8, 6)})
    assert [tuple(value.shape) for value in values] == [(2, 5), (2, 12, 4, 4)]

    of_vector = AuxBranchesProvider([TapPoint("a", "vector", 6)], TapPoint("z", "vector", 9), 5)
    values = of_vector(nn.Identity(), torch.zeros(1, 5), {"a": torch.randn(1, 6)})
    assert [tuple(value.shape) for value in values] == [(1, 5), (1, 9, 1, 1)]

    # Tokens before patches are merged: a grid that is not the last one.
    merged = Branch(TapPoint("a", "tokens", 6, 4, 4), TapPoint("z", "tokens", 9, 2, 2), 5)
    assert tuple(merged(torch.randn(2, 6, 4, 4))[1].shape) == (2, 9, 2, 2)


def test_tokens_are_changed_each_by_itself():
    grid = TapPoint("a", "tokens", 6, 2, 2)
    branch = Branch(grid, TapPoint("z", "tokens", 6, 2, 2), 5)
    tokens = torch.randn(1, 6, 2, 2)
    changed = tokens.clone()
    changed[..., 0, 1] += torch.randn(6)

    differs = (branch(tokens)[1] != branch(changed)[1]).any(1)[0]

    assert differs.tolist() == [[False, True], [False, False]]


def test_no_place_before_the_last_map():
    last = TapPoint("layer4", "NCHW", 8, 4, 4)

    with pytest.raises(ValueError, match=r"place before the last map \('layer4'\), got 'layer4'"):
        AuxBranchesProvider([last], last, 5)
    with pytest.raises(ValueError, match="got none"):
        AuxBranchesProvider([], last, 5)
