"""Every wrong argument is refused, with a message that says what was got and expected."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from loss_cases import CASES, INDICES, MIXED, case_id
from torch import Tensor

from softlabels.losses import label_smoothing_loss

BATCH_SIZE, NUM_CLASSES = 4, 6


def with_label(value: int) -> Tensor:
    return torch.tensor([0, 5, value, 1])


def with_probabilities(row: int, *values: float) -> Tensor:
    target = torch.eye(NUM_CLASSES)[:BATCH_SIZE]
    target[row] = torch.tensor([*values, *[0.0] * (NUM_CLASSES - len(values))])
    return target


def with_vote(value: int) -> Tensor:
    votes = torch.zeros(BATCH_SIZE, 9, dtype=torch.int64)
    votes[2, 3] = value
    return votes


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


Wrong = tuple[object, type[Exception], list[str]]

# Argument -> (what is passed, the error's class, parts of the message).
WRONG: dict[str, list[Wrong]] = {
    "logits": [
        ([[1.0, 2.0]], TypeError, ["logits must be a floating-point tensor", "got list"]),
        (None, TypeError, ["logits must be a floating-point tensor", "got NoneType"]),
        (zeros(4, 6, dtype=torch.int64), TypeError, ["floating-point", "torch.int64"]),
        (zeros(4, 6, dtype=torch.complex64), TypeError, ["floating-point", "torch.complex64"]),
        (zeros(6), ValueError, ["logits must be [B, C]", "got (6,)"]),
        (zeros(4, 6, 1), ValueError, ["logits must be [B, C]", "got (4, 6, 1)"]),
        (zeros(4, 1), ValueError, ["two classes", "got (4, 1)"]),
        (zeros(0, 6), ValueError, ["at least one sample", "got (0, 6)"]),
    ],
    "teacher_logits": [
        (None, TypeError, ["teacher_logits must be a floating-point tensor", "got NoneType"]),
        (zeros(4, 6, dtype=torch.int32), TypeError, ["teacher_logits", "torch.int32"]),
        (zeros(24), ValueError, ["teacher_logits must be [B, C]", "got (24,)"]),
        (zeros(4, 7), ValueError, ["teacher_logits must have the shape", "(4, 6)", "got (4, 7)"]),
        (zeros(1, 6), ValueError, ["teacher_logits must have the shape", "(4, 6)", "got (1, 6)"]),
    ],
    "weak_logits": [
        ("weak", TypeError, ["weak_logits must be a floating-point tensor", "got str ('weak')"]),
        (zeros(4, 6, dtype=torch.bool), TypeError, ["weak_logits", "torch.bool"]),
        (zeros(4, 6, 1), ValueError, ["weak_logits must be [B, C]", "got (4, 6, 1)"]),
        (zeros(4, 7), ValueError, ["weak_logits must have the shape", "(4, 6)", "got (4, 7)"]),
        (zeros(1, 6), ValueError, ["weak_logits must have the shape", "(4, 6)", "got (1, 6)"]),
    ],
    "target": [
        ([0, 1, 2, 3], TypeError, ["target must be a tensor", "got list ([0, 1, 2, 3])"]),
        (zeros(4), TypeError, ["target [B] must hold integer class indices", "torch.float32"]),
        (zeros(4, dtype=torch.bool), TypeError, ["integer class indices", "torch.bool"]),
        (zeros(4, dtype=torch.complex64), TypeError, ["integer class indices", "complex64"]),
        (zeros(4, 6, dtype=torch.int64), TypeError, ["[B, C] must hold floating", "torch.int64"]),
        (zeros(4, 6, dtype=torch.bool), TypeError, ["[B, C] must hold floating", "torch.bool"]),
        (zeros(3, dtype=torch.int64), ValueError, ["must hold 4 labels", "got 3"]),
        (zeros((), dtype=torch.int64), ValueError, ["[4] class indices", "[4, 6]", "got ()"]),
        (zeros(4, 1, dtype=torch.int64), ValueError, ["[4] class indices", "got (4, 1)"]),
        (zeros(4, 5), ValueError, ["[4] class indices", "[4, 6] probabilities", "got (4, 5)"]),
        (zeros(3, 6), ValueError, ["[4] class indices", "[4, 6] probabilities", "got (3, 6)"]),
        (zeros(4, 6, 2), ValueError, ["[4] class indices", "got (4, 6, 2)"]),
        (with_label(6), ValueError, ["must lie in [0, 6)", "from 0 to 6"]),
        (with_label(-1), ValueError, ["must lie in [0, 6)", "from -1 to 5"]),
        (with_label(-100), ValueError, ["must lie in [0, 6)", "from -100 to 5"]),
        (with_probabilities(2, 0.5, 0.4), ValueError, ["must sum to 1", "row 2 sums to 0.9"]),
        (with_probabilities(1, 0.5, 0.51), ValueError, ["must sum to 1", "row 1 sums to 1.01"]),
        (with_probabilities(3), ValueError, ["must sum to 1", "row 3 sums to 0"]),
        (
            with_probabilities(2, 0.5, float("nan")),
            ValueError,
            ["must sum to 1", "row 2 sums to nan"],
        ),
        (
            with_probabilities(3, float("inf"), 0.5),
            ValueError,
            ["must sum to 1", "row 3 sums to inf"],
        ),
        (with_probabilities(3, 1.25, -0.25), ValueError, ["no negative values", "got -0.25"]),
    ],
    "votes": [
        ([[0]], TypeError, ["votes must hold integer class indices", "got list ([[0]])"]),
        (zeros(4, 9), TypeError, ["votes must hold integer class indices", "torch.float32"]),
        (zeros(4, 9, dtype=torch.bool), TypeError, ["integer class indices", "torch.bool"]),
        (zeros(4, 9, dtype=torch.complex64), TypeError, ["integer class indices", "complex64"]),
        (zeros(4, dtype=torch.int64), ValueError, ["votes must be [4, K]", "got (4,)"]),
        (zeros(4, 3, 3, dtype=torch.int64), ValueError, ["votes must be [4, K]", "(4, 3, 3)"]),
        (zeros(3, 9, dtype=torch.int64), ValueError, ["votes must be [4, K]", "got (3, 9)"]),
        (zeros(4, 0, dtype=torch.int64), ValueError, ["votes must be [4, K]", "got (4, 0)"]),
        (with_vote(6), ValueError, ["votes must lie in [0, 6)", "from 0 to 6"]),
        (with_vote(-2), ValueError, ["votes must lie in [0, 6)", "from -2 to 0"]),
    ],
}

NOT_POSITIVE: list[Wrong] = [
    (0, ValueError, ["must be finite, above 0", "got 0"]),
    (0.0, ValueError, ["must be finite, above 0", "got 0.0"]),
]
NOT_A_WEIGHT: list[Wrong] = [
    (-0.5, ValueError, ["must be finite", "got -0.5"]),
    (float("inf"), ValueError, ["must be finite", "got inf"]),
    (float("nan"), ValueError, ["must be finite", "got nan"]),
    ("1", TypeError, ["must be a number", "got str ('1')"]),
    (True, TypeError, ["must be a number", "got bool (True)"]),
    (None, TypeError, ["must be a number", "got NoneType (None)"]),
    (torch.ones(1), TypeError, ["must be a number", "got a tensor of torch.float32"]),
]


def not_among(*choices: str) -> list[Wrong]:
    parts = ["must be one of", *map(repr, choices)]
    return [
        ("other", ValueError, [*parts, "got 'other'"]),
        (None, ValueError, [*parts, "got None"]),
    ]


WRONG_SETTINGS: dict[str, list[Wrong]] = {
    "temperature": NOT_POSITIVE + NOT_A_WEIGHT,
    "target_weight": NOT_A_WEIGHT,
    "non_target_weight": NOT_A_WEIGHT,
    "weak_weight": NOT_A_WEIGHT,
    "power": NOT_A_WEIGHT,
    "smoothing": [*NOT_A_WEIGHT, (1.5, ValueError, ["0 or more and at most 1", "got 1.5"])],
    "mixed_target": not_among("largest", "all"),
    "rank_by": not_among("probability", "log_probability"),
    "rank_from": not_among("votes", "logits"),
    "vote_upsample": NOT_POSITIVE + NOT_A_WEIGHT,
    "smooth_over": not_among("all", "non_target"),
    "reduction": [
        *not_among("mean", "sum", "none"),
        ("batchmean", ValueError, ["reduction must be one of", "got 'batchmean'"]),
    ],
}

CALLABLES = tuple(dict.fromkeys(c for case in CASES for c in (case.function, case.module)))


def settings_of(function_or_module: Callable[..., object]) -> list[str]:
    parameters = inspect.signature(function_or_module).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


def wrong_arguments() -> list[object]:
    return [
        pytest.param(case, name, *wrong, id=f"{case.name}-{name}-{number}")
        for case in CASES
        for name in case.inputs
        for number, wrong in enumerate(WRONG[name])
    ]


def wrong_settings() -> list[object]:
    return [
        pytest.param(called, name, *wrong, id=f"{called.__name__}-{name}-{number}")
        for called in CALLABLES
        for name in settings_of(called)
        for number, wrong in enumerate(WRONG_SETTINGS[name])
    ]


def assert_says(error: Exception, error_class: type[Exception], parts: list[str]) -> None:
    assert type(error) is error_class
    for part in parts:
        assert part in str(error)


@pytest.mark.parametrize(("case", "name", "value", "error_class", "parts"), wrong_arguments())
def test_a_wrong_tensor_is_refused(case, name, value, error_class, parts):
    inputs = case.make(case.target_kinds[0], BATCH_SIZE, NUM_CLASSES)
    inputs[name] = value

    with pytest.raises((TypeError, ValueError)) as error:
        case(inputs)

    assert_says(error.value, error_class, parts)


@pytest.mark.parametrize(("called", "name", "value", "error_class", "parts"), wrong_settings())
def test_a_wrong_setting_is_refused(called, name, value, error_class, parts):
    case = next(case for case in CASES if called in (case.function, case.module))
    inputs = case.make(case.target_kinds[0], BATCH_SIZE, NUM_CLASSES)
    # The module refuses when it is made, before it sees a tensor.
    arguments = () if called is case.module else tuple(inputs.values())

    with pytest.raises((TypeError, ValueError)) as error:
        called(*arguments, **{name: value})

    assert_says(error.value, error_class, [name, *parts])


@pytest.mark.parametrize("name", ["target_weight", "non_target_weight", "weak_weight", "power"])
def test_a_setting_of_zero_is_accepted_where_zero_is_in_range(name):
    takers = [called for called in CALLABLES if name in settings_of(called)]

    assert takers
    for called in takers:
        case = next(case for case in CASES if called in (case.function, case.module))
        inputs = case.make(INDICES)
        if called is case.module:
            value = called(**{name: 0})(*inputs.values())
        else:
            value = called(*inputs.values(), **{name: 0})
        assert bool(torch.isfinite(value))


@pytest.mark.parametrize("smoothing", [0, 0.0, 1, 1.0])
def test_smoothing_may_reach_both_ends_of_its_range(smoothing):
    loss = label_smoothing_loss(zeros(1, 6), torch.tensor([2]), smoothing=smoothing)

    torch.testing.assert_close(loss, torch.tensor(6.0).log())


@pytest.mark.parametrize(
    ("dtype", "total", "accepted"),
    [
        (torch.float64, 1.0009, True),
        (torch.float64, 0.998, False),
        (torch.float32, 0.9992, True),
        (torch.float32, 1.002, False),
        (torch.float16, 1.015, True),
        (torch.float16, 1.03, False),
        (torch.bfloat16, 0.985, True),
        (torch.bfloat16, 0.97, False),
    ],
)
def test_row_sums_may_be_off_by_rounding_alone(dtype, total, accepted):
    target = torch.tensor([[0.5, total - 0.5]], dtype=dtype)

    if accepted:
        assert bool(torch.isfinite(label_smoothing_loss(zeros(1, 2), target)))
    else:
        with pytest.raises(ValueError, match="must sum to 1, row 0"):
            label_smoothing_loss(zeros(1, 2), target)


@pytest.mark.parametrize("case", [c for c in CASES if MIXED in c.target_kinds], ids=case_id)
def test_only_uskd_refuses_three_labels(case):
    inputs = case.make(INDICES, 2, 5)
    inputs["target"] = torch.tensor([[0.5, 0.5, 0, 0, 0], [0.2, 0.5, 0, 0.3, 0]])

    if case.name.startswith("uskd"):
        with pytest.raises(ValueError, match=r"row 1 .* has 3 labelled classes.*unsmoothed"):
            case(inputs)
    else:
        assert bool(torch.isfinite(case(inputs)))


def test_smoothed_labels_are_refused_by_uskd_with_advice():
    case = next(case for case in CASES if case.name == "uskd")
    inputs = case.make(INDICES)
    inputs["target"] = torch.full((4, 6), 0.02).scatter(1, inputs["target"].unsqueeze(1), 0.9)

    with pytest.raises(ValueError, match=r"6 labelled classes, at most two .* unsmoothed labels"):
        case(inputs)
