"""Every wrong argument is refused, with a message that says what was got and expected."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shared.loss_cases import BY_NAME, CASES, INDICES, MIXED, PLAIN_CASES, LossCase, case_id
from softlabels.losses import (
    NKDLoss,
    USKDLoss,
    ZipfLSLoss,
    label_smoothing_loss,
    nkd_loss,
    uskd_loss,
    uskd_targets,
    zipf_ls_loss,
    zipf_ls_targets,
)
from softlabels.losses._method import setting_fields

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

WRONG.update(
    {
        f"exit_logits_{number}": [
            (None, TypeError, [f"exit_logits[{number}] must be a floating-point", "got NoneType"]),
            (zeros(4, 6, dtype=torch.int32), TypeError, [f"exit_logits[{number}]", "torch.int32"]),
            (zeros(24), ValueError, [f"exit_logits[{number}] must be [B, C]", "got (24,)"]),
            (zeros(4, 7), ValueError, [f"exit_logits[{number}]", "shape", "got (4, 7)"]),
            (zeros(1, 6), ValueError, [f"exit_logits[{number}]", "shape", "got (1, 6)"]),
        ]
        for number in range(2)
    }
)

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


def above(bound: float) -> Wrong:
    value = 2 * bound
    return value, ValueError, [f"at most {bound}", f"got {value}"]


NOT_A_FLAG: list[Wrong] = [
    (1, TypeError, ["must be True or False", "got int (1)"]),
    (None, TypeError, ["must be True or False", "got NoneType (None)"]),
    ("no", TypeError, ["must be True or False", "got str ('no')"]),
]

WRONG_SETTINGS: dict[str, list[Wrong]] = {
    "temperature": [*NOT_POSITIVE, *NOT_A_WEIGHT, above(1e6)],
    "target_term": not_among("T1", "T2", "both"),
    "non_target_term": not_among("normalized", "unnormalized"),
    "target_from": not_among("self", "teacher"),
    "squared": NOT_A_FLAG,
    "sync_batch_stats": NOT_A_FLAG,
    "correct_only": NOT_A_FLAG,
    "ignore_index": [
        (1.5, TypeError, ["must be a whole number", "got float (1.5)"]),
        (True, TypeError, ["must be a whole number", "got bool (True)"]),
        ("0", TypeError, ["must be a whole number", "got str ('0')"]),
    ],
    "distribution": not_among("zipf", "constant", "sorted_pareto", "unbiased_zipf"),
    "smallest_probability": [*NOT_A_WEIGHT, above(1)],
    "decay": [*NOT_A_WEIGHT, above(30)],
    "lower_bound": [
        *NOT_POSITIVE,
        *NOT_A_WEIGHT,
    ],
    "upper_bound": [
        *NOT_POSITIVE,
        *NOT_A_WEIGHT,
        (0.001, ValueError, ["must be above lower_bound 0.001", "got 0.001"]),
    ],
    "exit_weight": NOT_A_WEIGHT,
    "exit_taps": [
        ("middle", TypeError, ["exit_taps must be a sequence", "got str"]),
        ((1,), TypeError, ["exit_taps[0] must be str", "got int"]),
    ],
    "vote_interpolation": not_among("bilinear", "bicubic"),
    "target_weight": NOT_A_WEIGHT,
    "non_target_weight": NOT_A_WEIGHT,
    "weak_weight": NOT_A_WEIGHT,
    "power": [*NOT_A_WEIGHT, above(30)],
    "smoothing": [*NOT_A_WEIGHT, (1.5, ValueError, ["0 or more and at most 1", "got 1.5"])],
    "mixed_target": not_among("largest", "all"),
    "rank_by": not_among("probability", "log_probability"),
    "vote_upsample": [
        (0, ValueError, ["must be finite, above 0", "got 0"]),
        (-1, ValueError, ["must be finite, above 0", "got -1"]),
        (1.5, TypeError, ["must be a whole number", "got float (1.5)"]),
        (True, TypeError, ["must be a whole number", "got bool (True)"]),
        ("1", TypeError, ["must be a whole number", "got str ('1')"]),
        (None, TypeError, ["must be a whole number", "got NoneType (None)"]),
    ],
    "smooth_over": not_among("all", "non_target"),
    "reduction": [
        *not_among("mean", "sum", "none"),
        ("batchmean", ValueError, ["reduction must be one of", "got 'batchmean'"]),
    ],
}

RANKS_FROM = {
    "USKD": not_among("both", "both_unnormalized", "weak", "final"),
    "ZipfLS": not_among("votes", "logits"),
}

CALLABLES = tuple(dict.fromkeys(c for case in CASES for c in (case.function, case.module)))


def settings_of(function_or_module: Callable[..., object]) -> list[str]:
    if isinstance(function_or_module, type):
        return [*setting_fields(function_or_module)]
    parameters = inspect.signature(function_or_module).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


def case_of(called: Callable[..., object]) -> LossCase:
    return next(case for case in PLAIN_CASES if called in (case.function, case.module))


def wrong_arguments() -> list[object]:
    return [
        pytest.param(case, name, *wrong, id=f"{case.name}-{name}-{number}")
        for case in (*PLAIN_CASES, BY_NAME["uskd_teacher"], BY_NAME["zipf_ls_exits"])
        for name in case.inputs
        for number, wrong in enumerate(WRONG[name])
        if not (case.name == "uskd_teacher" and wrong[0] is None)  # None is no teacher
    ]


def wrong_values_of(called: Callable[..., object], name: str) -> list[Wrong]:
    if name == "rank_from":
        return RANKS_FROM[case_of(called).module.__name__.removesuffix("Loss")]
    return WRONG_SETTINGS[name]


def wrong_settings() -> list[object]:
    return [
        pytest.param(called, name, *wrong, id=f"{called.__name__}-{name}-{number}")
        for called in CALLABLES
        for name in settings_of(called)
        for number, wrong in enumerate(wrong_values_of(called, name))
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
    case = case_of(called)
    inputs = case.make(case.target_kinds[0], BATCH_SIZE, NUM_CLASSES)
    # The module refuses when it is made, before it sees a tensor.
    arguments = () if called is case.module else tuple(inputs.values())

    with pytest.raises((TypeError, ValueError)) as error:
        called(*arguments, **{name: value})

    assert_says(error.value, error_class, [name, *parts])


ZERO_IN_RANGE = (
    "target_weight",
    "non_target_weight",
    "weak_weight",
    "power",
    "decay",
    "smallest_probability",
    "exit_weight",
)


@pytest.mark.parametrize("name", ZERO_IN_RANGE)
def test_a_setting_of_zero_is_accepted_where_zero_is_in_range(name):
    takers = [called for called in CALLABLES if name in settings_of(called)]

    assert takers
    for called in takers:
        inputs = case_of(called).make(INDICES)
        if inspect.isclass(called):
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
        with pytest.raises(ValueError, match=r"row 1 .* has 3 labeled classes.*unsmoothed"):
            case(inputs)
    else:
        assert bool(torch.isfinite(case(inputs)))


def smoothed(num_classes: int = NUM_CLASSES) -> Tensor:
    rest = 0.1 / (num_classes - 1)
    return torch.full((4, num_classes), rest).scatter(1, torch.tensor([[0], [1], [0], [1]]), 0.9)


def test_smoothed_labels_are_refused_by_uskd_with_advice():
    inputs = BY_NAME["uskd"].make(INDICES)

    for called in (uskd_loss, uskd_targets, USKDLoss(), USKDLoss().soft_labels):
        with pytest.raises(ValueError, match=r"6 labeled classes, at most two .* unsmoothed labe"):
            called(inputs["logits"], inputs["weak_logits"], smoothed())


def test_smoothed_labels_are_refused_with_advice_where_all_labels_are_removed():
    logits, plain = torch.zeros(4, NUM_CLASSES), torch.eye(4, NUM_CLASSES)
    target = torch.cat((plain[:2], smoothed()[:2]))
    nkd, zipf = NKDLoss(mixed_target="all"), ZipfLSLoss(mixed_target="all", rank_from="logits")

    for called, arguments in (
        (nkd_loss, (logits, logits, target)),
        (zipf_ls_loss, (logits, target)),
        (zipf_ls_targets, (logits, target)),
    ):
        with pytest.raises(ValueError, match=r"row 2 of target .* every class.* unsmoothed label"):
            called(*arguments, mixed_target="all")
        assert bool(torch.isfinite(called(*arguments)).all())
    for called, arguments in (
        (nkd, (logits, logits, target)),
        (nkd.soft_labels, (logits, logits, target)),
        (zipf, (logits, target)),
        (zipf.soft_labels, (logits, target)),
    ):
        with pytest.raises(ValueError, match=r"row 2 of target .* every class.* unsmoothed label"):
            called(*arguments)


@pytest.mark.parametrize("target_term", ["T2", "both"])
def test_uskds_t2_names_the_row_where_it_is_undefined(target_term):
    logits, target = torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [0.7, 0.3]])

    with pytest.raises(ValueError, match=r"T2 is undefined for row 1 .* every class has a label"):
        uskd_loss(logits, logits, target, target_term=target_term)


def test_uskd_says_which_setting_needs_the_weak_logits():
    logits, target = torch.zeros(2, 3), torch.tensor([0, 1])

    with pytest.raises(ValueError, match="rank_from='both' ranks by weak_logits, got None"):
        uskd_loss(logits, None, target, weak_weight=0)
    with pytest.raises(ValueError, match="weak_weight is not 0, so weak_logits are needed, got N"):
        uskd_loss(logits, None, target, rank_from="final")
    with pytest.raises(ValueError, match="rank_from='weak' ranks by weak_logits, got None"):
        uskd_targets(logits, None, target, rank_from="weak")
    assert bool(torch.isfinite(uskd_loss(logits, None, target, rank_from="final", weak_weight=0)))


def test_uskds_module_takes_a_teacher_exactly_if_it_gives_the_target_label():
    logits, target = torch.zeros(2, 3), torch.tensor([0, 1])

    for method in (USKDLoss(target_from="teacher"), USKDLoss(target_from="teacher").soft_labels):
        with pytest.raises(ValueError, match=r"target_from='teacher' decides .* got none"):
            method(logits, logits, target)
    for method in (USKDLoss(), USKDLoss().soft_labels):
        with pytest.raises(ValueError, match=r"target_from='self' decides .* got some"):
            method(logits, logits, target, logits)


def test_uskds_module_needs_a_target():
    with pytest.raises(TypeError, match="target must be a tensor, got None"):
        USKDLoss()(torch.zeros(2, 3), torch.zeros(2, 3))


def test_zipf_ls_module_takes_logits_and_votes_of_each_exit():
    logits, target, votes = torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([[0], [2]])

    for exits in ((), (logits,), (logits, votes, logits, votes)):
        with pytest.raises(ValueError, match=rf"logits and votes of 1 heads, got {len(exits)}"):
            ZipfLSLoss(exit_taps=("middle",), exit_weight=0.1)(logits, target, votes, exits)
    with pytest.raises(ValueError, match="exit_taps need rank_from='votes', got rank_from='logits"):
        ZipfLSLoss(exit_taps=("middle",), exit_weight=0.1, rank_from="logits")
    with pytest.raises(ValueError, match="exit_weight must be above 0 with exit_taps, got 0"):
        ZipfLSLoss(exit_taps=("middle",))


def test_distributions_refuse_settings_that_give_no_distribution():
    logits, target = torch.zeros(2, 4), torch.tensor([0, 1])

    with pytest.raises(ValueError, match=r"smallest_probability must be at most 1 / 4 .* got 0.26"):
        zipf_ls_loss(logits, target, distribution="linear_decay", smallest_probability=0.26)


@pytest.mark.parametrize(
    "case", [case for case in CASES if "ignore_index" in case.settings], ids=case_id
)
def test_another_class_out_of_range_is_refused_beside_an_ignored_one(case):
    inputs = case.make(INDICES)
    inputs["target"][2] = 77

    with pytest.raises(ValueError, match=r"must lie in \[0, 6\), got values from 0 to 77"):
        case(inputs)
