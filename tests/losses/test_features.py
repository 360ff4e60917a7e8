"""What holds for every loss on feature maps, and the helpers that they share."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from shared.map_draws import drawn, heads_of, through
from shared.terms import loss_and_terms
from softlabels.losses._features import check_maps, paired_from_deepest, pooled_to
from softlabels.losses.at import ATLoss
from softlabels.losses.fitnet import FitNetLoss
from softlabels.losses.nst import NSTLoss
from softlabels.losses.ofd import OFDLoss
from softlabels.losses.reviewkd import ReviewKDLoss
from softlabels.losses.vid import VIDLoss

METHODS = [ATLoss, FitNetLoss, NSTLoss, OFDLoss, ReviewKDLoss, VIDLoss]


def values_for(method, seed: int = 0, batch: int = 3) -> dict:
    """Two student and three teacher levels of other widths and sizes, and what else is read."""
    student = drawn((batch, 3, 8, 8), (batch, 5, 2, 2), seed=seed, gradient=True)
    teacher = drawn(
        (batch, 2, 9, 9), (batch, 4, 4, 4), (batch, 6, 4, 4), seed=seed + 1, gradient=True
    )
    others = {
        "norm_parameters": lambda: drawn((2, 2), (2, 4), (2, 6), seed=seed + 2),
        "student_pooled": lambda: drawn((batch, 5), seed=seed + 3, gradient=True),
        "teacher_pooled": lambda: drawn((batch, 7), seed=seed + 4, gradient=True),
    }
    values = {"student_maps": student, "teacher_maps": teacher}
    return values | {name: others[name]() for name in method.inputs if name in others}


def built(method_type, **changes):
    method = method_type()
    values = values_for(method, **changes)
    heads = heads_of(method, values) if method.has_adapters() else None
    return method, heads, values


@pytest.mark.parametrize("method_type", METHODS)
def test_every_head_and_student_map_gets_a_gradient_and_no_teacher_map_does(method_type) -> None:
    method, heads, values = built(method_type)
    loss_and_terms(method, **through(heads, values)).loss.backward()
    learned = {} if heads is None else dict(heads.named_parameters())
    assert not [name for name, parameter in learned.items() if parameter.grad is None]
    students = [*values["student_maps"], *values.get("student_pooled", [])]
    assert all(map.grad is not None and map.grad.abs().sum() > 0 for map in students)
    assert all(map.grad is None for map in values["teacher_maps"])
    assert all(map.grad is None for map in values.get("teacher_pooled", []))


@pytest.mark.parametrize("method_type", METHODS)
def test_the_terms_sum_to_the_loss(method_type) -> None:
    method, heads, values = built(method_type)
    heard = through(heads, values)
    output = loss_and_terms(method, **heard)
    count = 3 if method_type is ReviewKDLoss else 2
    assert [*output.terms] == [f"level_{number}" for number in range(count)]
    torch.testing.assert_close(sum(output.terms.values()), output.loss)


@pytest.mark.parametrize("method_type", METHODS)
def test_half_precision_and_autocast_give_the_float32_loss_of_the_same_values(method_type) -> None:
    method, heads, values = built(method_type)
    heard = through(heads, values)
    half = {name: [tensor.detach().bfloat16() for tensor in value] for name, value in heard.items()}
    wide = {name: [tensor.float() for tensor in value] for name, value in half.items()}
    expected = method(**wide)
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(method(**half), expected)
        torch.testing.assert_close(method(**wide), expected)


@pytest.mark.parametrize("method_type", METHODS)
def test_a_teacher_of_another_precision_takes_the_students(method_type) -> None:
    method, heads, values = built(method_type)
    heard = through(heads, values)
    wide = method(**heard)
    narrow = {
        name: [tensor.float() for tensor in value] if name.startswith("student") else value
        for name, value in heard.items()
    }
    loss = method(**narrow)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wide.float())


@pytest.mark.parametrize("method_type", METHODS)
def test_maps_of_zeros_give_a_finite_loss_and_finite_gradients(method_type) -> None:
    method, heads, values = built(method_type)
    with torch.no_grad():
        for map in (*values["student_maps"], values["teacher_maps"][-1]):
            map.zero_()
    loss = method(**through(heads, values))
    loss.backward()
    assert loss.isfinite()
    assert all(map.grad.isfinite().all() for map in values["student_maps"])


@pytest.mark.parametrize("method_type", METHODS)
def test_large_maps_give_a_finite_loss_and_finite_gradients(method_type) -> None:
    method, _, values = built(method_type)
    # Without heads, whose BatchNorm would undo it, where the method can do without.
    students = [map[:, :2].detach().float() * 1e4 for map in values["student_maps"]]
    teachers = [map[:, :2].detach().float() * 1e4 for map in values["teacher_maps"]]
    values |= {"student_maps": students, "teacher_maps": teachers}
    if "norm_parameters" in values:
        values["norm_parameters"] = [torch.ones(2, 2), torch.zeros(2, 2), torch.ones(2, 2)]
    if method_type is VIDLoss:
        values["variances"] = [torch.full((2,), 1e-5)] * 2
    if method_type is ReviewKDLoss:
        values["teacher_maps"] = [-map for map in students]
        values["teacher_pooled"] = [-map for map in values["student_pooled"]]
    for map in students:
        map.requires_grad_()
    loss = method(**values)
    loss.backward()
    assert loss.isfinite()
    assert all(map.grad.isfinite().all() for map in students)


@pytest.mark.parametrize("method_type", METHODS)
def test_a_batch_is_the_mean_of_its_samples(method_type) -> None:
    method, heads, values = built(method_type)
    values = {
        name: [tensor.detach() for tensor in value]
        for name, value in through(heads, values).items()
    }
    shared = {name: values[name] for name in ("norm_parameters", "variances") if name in values}
    alone = [
        method(
            **{name: [tensor[row : row + 1] for tensor in value] for name, value in values.items()}
            | shared
        )
        for row in range(3)
    ]
    torch.testing.assert_close(torch.stack(alone).mean(), method(**values))


@pytest.mark.parametrize("method_type", METHODS)
def test_modules_read_the_stages_that_are_asked_for(method_type) -> None:
    method = method_type(stages=["stage:2", "last"])
    for name in ("student_maps", "teacher_maps"):
        kind = method.inputs[name]
        assert (kind.of, kind.stages) == (name.split("_")[0], ("stage:2", "last"))
        assert kind.form == "map"
    with pytest.raises(TypeError, match="stages must be a sequence, got str"):
        method_type(stages="last")


@pytest.mark.slow
@pytest.mark.parametrize("method_type", METHODS)
def test_compiled_to_one_graph_it_is_the_same(method_type) -> None:
    method, heads, values = built(method_type)

    def run(given):
        return method(**through(heads, given))

    expected = run(values)
    wanted = torch.autograd.grad(expected, values["student_maps"])
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(values)
    torch.testing.assert_close(compiled, expected)
    for actual, gradient in zip(
        torch.autograd.grad(compiled, values["student_maps"]), wanted, strict=True
    ):
        torch.testing.assert_close(actual, gradient)


def test_levels_are_paired_from_the_deepest() -> None:
    assert paired_from_deepest("abc", "xy") == [("b", "x"), ("c", "y")]
    assert paired_from_deepest("ab", "xyz") == [("a", "y"), ("b", "z")]
    assert paired_from_deepest("ab", "xy") == [("a", "x"), ("b", "y")]


@pytest.mark.parametrize("size", [(4, 2), (3, 5), (8, 8), (1, 1)])
def test_pooling_to_a_smaller_size_is_adaptive_and_never_enlarges(size) -> None:
    (map,) = drawn((2, 3, 8, 6))
    wanted = (min(size[0], 8), min(size[1], 6))
    torch.testing.assert_close(
        pooled_to(map, size), functional.adaptive_avg_pool2d(map, wanted), rtol=1e-12, atol=1e-12
    )
    assert pooled_to(map, (8, 9)) is map


@pytest.mark.parametrize(
    ("student", "teacher", "options", "error", "message"),
    [
        (torch.ones(2, 3, 4, 4), [], {}, TypeError, "student_maps must be a list of feature maps"),
        ([torch.ones(2, 3, 4, 4)], [], {}, ValueError, "teacher_maps must hold at least one"),
        (
            [torch.ones(2, 3, 4, 4).int()],
            [torch.ones(2, 3, 4, 4)],
            {},
            TypeError,
            r"student_maps\[0\] must be a floating-point tensor, got a tensor of torch.int32",
        ),
        (
            [torch.ones(2, 3, 4, 4)],
            [torch.ones(2, 3, 4)],
            {},
            ValueError,
            r"teacher_maps\[0\] must be \[B, D, H, W\] and not empty, got \(2, 3, 4\)",
        ),
        (
            [torch.ones(2, 3, 4, 4)],
            [torch.ones(1, 3, 4, 4)],
            {},
            ValueError,
            "must be of one batch, got 2 samples in student_maps.0. and 1 in one of teacher_maps",
        ),
        (
            [torch.ones(2, 3, 4, 4)],
            [torch.ones(2, 5, 4, 4)],
            {"same_widths": True},
            ValueError,
            r"same number of channels, got \(2, 3, 4, 4\) and \(2, 5, 4, 4\)",
        ),
        (
            [torch.ones(2, 3, 4, 4)],
            [torch.ones(2, 3, 4, 5)],
            {"same_sizes": True},
            ValueError,
            "same height and width",
        ),
    ],
)
def test_maps_that_do_not_fit_are_told(student, teacher, options, error, message) -> None:
    with pytest.raises(error, match=message):
        check_maps(student, teacher, **options)


def test_no_stage_at_all_is_told() -> None:
    with pytest.raises(ValueError, match="stages must name one or more"):
        ATLoss(stages=())
