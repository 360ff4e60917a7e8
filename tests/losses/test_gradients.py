"""Gradients in float64: the closed forms (prediction minus target), and finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from shared.loss_cases import (
    BY_NAME,
    CASES_AND_KINDS,
    DENSE,
    INDICES,
    MIXED,
    ONE_HOT,
    case_id,
    gradients,
)
from softlabels.losses import uskd_targets, zipf_ls_targets

BATCH_SIZE, NUM_CLASSES = 4, 6
# The losses whose targets do not depend on the logits, so that finite differences apply.
FIXED_TARGETS = [
    (case, kind)
    for case, kind in CASES_AND_KINDS
    if case.name.startswith(("nkd", "kd", "label"))
    or "votes" in case.inputs
    or case.name == "uskd_teacher"
]
TARGET_KINDS = [INDICES, ONE_HOT, MIXED]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def make(name: str, kind: str) -> dict[str, Tensor]:
    return BY_NAME[name].make(kind, BATCH_SIZE, NUM_CLASSES, torch.float64, seed=3)


def labels_of(target: Tensor) -> Tensor:
    if target.dim() == 2:
        return target
    return functional.one_hot(target, NUM_CLASSES).double()


def largest_of(target: Tensor) -> Tensor:
    return functional.one_hot(labels_of(target).argmax(1), NUM_CLASSES).double()


def softmax_without(logits: Tensor, removed: Tensor) -> Tensor:
    return logits.masked_fill(removed, -torch.inf).softmax(1)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_pulls_the_softened_prediction_to_the_teachers(temperature):
    inputs = make("kd", "no_target")

    _, found = gradients(BY_NAME["kd"], inputs, temperature=temperature)

    student = (inputs["logits"] / temperature).softmax(1)
    teacher = (inputs["teacher_logits"] / temperature).softmax(1)
    assert_close(found["logits"], temperature * (student - teacher) / BATCH_SIZE)


@pytest.mark.parametrize("mixed_target", ["largest", "all"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("kind", TARGET_KINDS)
def test_nkd_pulls_to_the_teachers_target_and_non_target_parts(kind, temperature, mixed_target):
    inputs = make("nkd", kind)
    settings = {"temperature": temperature, "non_target_weight": 0.7, "mixed_target": mixed_target}

    _, found = gradients(BY_NAME["nkd"], inputs, **settings)

    logits, teacher_logits = inputs["logits"], inputs["teacher_logits"]
    labels = labels_of(inputs["target"]) if mixed_target == "all" else largest_of(inputs["target"])
    labeled = labels > 0
    target = teacher_logits.softmax(1) * labeled
    of_target = logits.softmax(1) * target.sum(1, keepdim=True) - target
    of_others = softmax_without(logits / temperature, labeled) - softmax_without(
        teacher_logits / temperature, labeled
    )
    assert_close(found["logits"], (of_target + 0.7 * temperature * of_others) / BATCH_SIZE)


@pytest.mark.parametrize("rank_by", ["probability", "log_probability"])
@pytest.mark.parametrize("kind", TARGET_KINDS)
def test_uskd_pulls_to_its_soft_labels_as_constants(kind, rank_by):
    inputs = make("uskd", kind)
    settings = {
        "target_weight": 0.9,
        "non_target_weight": 0.6,
        "weak_weight": 0.3,
        "rank_by": rank_by,
    }

    _, found = gradients(BY_NAME["uskd"], inputs, **settings)

    soft = uskd_targets(*inputs.values(), rank_by=rank_by)
    labels = labels_of(inputs["target"])
    logits, weak_logits = inputs["logits"], inputs["weak_logits"]
    of_target = logits.softmax(1) * soft.target.sum(1, keepdim=True) - soft.target
    of_others = softmax_without(logits, labels > 0) - soft.non_target
    smoothed = 0.9 * labels + 0.1 / NUM_CLASSES
    assert_close(found["logits"], (0.9 * of_target + 0.6 * of_others) / BATCH_SIZE)
    assert_close(found["weak_logits"], 0.3 * (weak_logits.softmax(1) - smoothed) / BATCH_SIZE)


@pytest.mark.parametrize("mixed_target", ["largest", "all"])
@pytest.mark.parametrize("name", ["zipf_ls_votes", "zipf_ls_logits"])
@pytest.mark.parametrize("kind", TARGET_KINDS)
def test_zipf_ls_pulls_the_wrong_classes_to_its_soft_labels(kind, name, mixed_target):
    inputs = make(name, kind)

    _, found = gradients(BY_NAME[name], inputs, mixed_target=mixed_target, power=1.0)

    soft = zipf_ls_targets(*inputs.values(), mixed_target=mixed_target)
    labels = labels_of(inputs["target"]) if mixed_target == "all" else largest_of(inputs["target"])
    prediction = softmax_without(inputs["logits"], labels > 0)
    assert_close(found["logits"], (prediction - soft) / BATCH_SIZE)


@pytest.mark.parametrize("kind", [*TARGET_KINDS, DENSE])
def test_label_smoothing_over_all_classes_equals_torchs_cross_entropy(kind):
    inputs = make("label_smoothing", kind)
    logits = inputs["logits"].clone().requires_grad_()

    loss, found = gradients(BY_NAME["label_smoothing"], inputs)
    expected = functional.cross_entropy(logits, inputs["target"], label_smoothing=0.1)
    expected.backward()

    assert_close(loss, expected.detach())
    assert_close(found["logits"], logits.grad)


@pytest.mark.parametrize("kind", [*TARGET_KINDS, DENSE])
def test_label_smoothing_over_wrong_classes_pulls_to_the_smoothed_labels(kind):
    inputs = make("label_smoothing_non_target", kind)

    _, found = gradients(BY_NAME["label_smoothing_non_target"], inputs)

    labels = labels_of(inputs["target"])
    smoothed = 0.7 * labels + 0.3 * (1 - labels) / (NUM_CLASSES - 1)
    assert_close(found["logits"], (inputs["logits"].softmax(1) - smoothed) / BATCH_SIZE)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("case", "kind"), FIXED_TARGETS, ids=case_id)
def test_finite_differences_agree_where_targets_are_fixed(case, kind, reduction):
    inputs = case.make(kind, 3, 4, torch.float64)
    logits = inputs["logits"].requires_grad_()

    assert torch.autograd.gradcheck(
        lambda logits: case({**inputs, "logits": logits}, reduction=reduction), (logits,)
    )


@pytest.mark.parametrize(
    ("case", "kind"),
    [(case, kind) for case, kind in CASES_AND_KINDS if "weak_logits" in case.trained],
    ids=case_id,
)
def test_finite_differences_agree_for_the_weak_head(case, kind):
    inputs = case.make(kind, 3, 4, torch.float64)
    weak_logits = inputs["weak_logits"].requires_grad_()
    # Small steps do not change the ranks, which are all that the other terms see of it.
    assert torch.autograd.gradcheck(
        lambda weak_logits: case({**inputs, "weak_logits": weak_logits}), (weak_logits,)
    )


@pytest.mark.parametrize(("case", "kind"), CASES_AND_KINDS, ids=case_id)
def test_the_gradient_is_scaled_by_what_follows(case, kind):
    inputs = case.make(kind, dtype=torch.float64)
    _, expected = gradients(case, inputs)
    leaves = {
        name: tensor.requires_grad_() if name in case.trained else tensor
        for name, tensor in inputs.items()
    }

    (2.5 * case(leaves)).backward()

    for name, gradient in expected.items():
        assert_close(leaves[name].grad, 2.5 * gradient)


@pytest.mark.parametrize(
    ("case", "kind"),
    [(case, kind) for case, kind in CASES_AND_KINDS if case.teacher],
    ids=case_id,
)
def test_the_teacher_gets_no_gradient(case, kind):
    inputs = case.make(kind)
    inputs["logits"].requires_grad_()
    inputs["teacher_logits"].requires_grad_()

    case(inputs).backward()

    assert inputs["logits"].grad is not None
    assert inputs["teacher_logits"].grad is None
