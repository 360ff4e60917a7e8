"""OLS: the vectors of the published code, the matrix of soft labels, and corner cases."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from shared.by_hand import STUDENT_LOGITS, TARGET, assert_six_digits, logits_of, rows
from shared.golden_vectors import assert_close, cases_of
from softlabels.losses._memory_bank import MemoryBank
from softlabels.losses.ols import OLSLoss


def memory_of(num_classes, **settings):
    adapters = OLSLoss(**settings).build_adapters({"logits": (2, num_classes)})
    assert isinstance(adapters, MemoryBank)
    return adapters.double()


@pytest.mark.parametrize("fine_grained", [False, True])
def test_values_gradients_and_matrix_of_the_published_code(fine_grained):
    cases = cases_of("ols")
    assert len(cases) == 3
    for case in cases:
        before = case["soft_labels_before"]
        adapters = memory_of(len(before), keep_confident=0.88 if fine_grained else None)
        adapters.soft_labels.copy_(before)
        weight = 1.0 if fine_grained else OLSLoss.defaults.weight
        task_weight = 1.0 if fine_grained else OLSLoss.defaults.task_weight
        kind = "fine_grained_" if fine_grained else ""
        for number in (0, 1):
            logits = case[f"logits_{number}"].clone().requires_grad_()
            target = case[f"target_{number}"]
            term = OLSLoss()(logits, **adapters({"logits": logits, "target": target}))
            task = functional.cross_entropy(logits, target)
            whole = task_weight * task + weight * term
            whole.backward()
            adapters.after_step({"logits": logits.detach(), "target": target})

            assert_close(term, case[f"soft_ce_{number}"])
            assert_close(whole, case[f"loss_{kind}{number}"])
            assert_close(logits.grad, case[f"grad_{kind}logits_{number}"])
            end = "_after_first" if number == 0 else ""
            assert_close(adapters.class_sum, case[f"class_sum{end}"])
            assert_close(adapters.class_count, case[f"class_count{end}"].double())
        adapters.after_epoch()
        after = "soft_labels_after_fine_grained" if fine_grained else "soft_labels_after"
        assert_close(adapters.soft_labels, case[after])
        assert not adapters.class_sum.any()
        assert not adapters.class_count.any()


def test_one_sample_by_hand():
    # 1/2 ln 4 + 1/4 ln 4 + 1/4 ln 2 = 7/4 ln 2 = 1.213008; a row of zeros counts nothing.
    value = OLSLoss(reduction="none")(
        logits_of([1, 1, 2], [1, 1, 2]), rows([0.5, 0.25, 0.25], [0, 0, 0])
    )

    assert_six_digits(value, 1.213008, 0)


def test_an_epoch_by_hand():
    adapters = memory_of(3, initial="uniform")
    # Class 0 is predicted right twice, class 1 once and wrong once, class 2 never.
    logits = logits_of([2, 1, 1], [6, 1, 1], [1, 2, 1], [2, 1, 1], [2, 1, 1])
    batch = {"logits": logits, "target": torch.tensor([0, 0, 1, 1, 2])}

    # 1 / 3 in float32, before the memory was made wider.
    first = adapters(batch)["soft_target"]
    torch.testing.assert_close(first, rows(*[[1 / 3] * 3] * 5), rtol=0, atol=1e-7)
    for rows_of in (slice(0, 2), slice(2, 5)):
        adapters.after_step({name: value[rows_of] for name, value in batch.items()})
    adapters.after_epoch()

    third = 1 / 3
    expected = rows([0.625, 0.1875, 0.1875], [0.25, 0.5, 0.25], [third, third, third])
    assert_close(adapters.soft_labels, expected)
    assert_close(adapters(batch)["soft_target"], expected[[0, 0, 1, 1, 2]])
    adapters.after_epoch()
    assert_close(adapters.soft_labels, rows(*[[third] * 3] * 3))


def test_a_confident_class_keeps_its_row_while_it_is_predicted():
    adapters = memory_of(3, keep_confident=0.9)
    confident = rows([0.9, 0.1, 0], [0, 0.95, 0.05], [0.1, 0.1, 0.8])
    adapters.soft_labels.copy_(confident)

    logits = logits_of([2, 1, 1], [1, 1, 2])
    adapters.after_step({"logits": logits, "target": torch.tensor([0, 2])})
    adapters.after_epoch()

    # Class 0 keeps, class 1 had no sample, class 2 was below 0.9.
    assert_close(adapters.soft_labels, rows([0.9, 0.1, 0], [1 / 3] * 3, [0.25, 0.25, 0.5]))


def test_mixed_labels_mix_the_rows_and_count_for_the_largest_label():
    adapters = memory_of(3)
    adapters.soft_labels.copy_(rows([0.6, 0.4, 0], [0, 1, 0], [0.2, 0.2, 0.6]))
    target = rows([0.75, 0, 0.25], [0.6, 0.4, 0])
    logits = logits_of([2, 1, 1], [1, 2, 1])

    found = adapters({"logits": logits, "target": target.float()})["soft_target"]
    adapters.after_step({"logits": logits, "target": target})

    torch.testing.assert_close(found, rows([0.5, 0.35, 0.15], [0.36, 0.64, 0]))
    assert_close(adapters.class_sum, rows([0.5, 0.25, 0.25], [0, 0, 0], [0, 0, 0]))
    assert adapters.class_count.tolist() == [1, 0, 0]


def test_the_first_matrix_is_zeros_and_gives_neither_loss_nor_gradient():
    adapters = OLSLoss().build_adapters({"logits": (2, 5)})
    assert adapters.memory_inputs == ("logits", "target")
    assert adapters.num_bytes() == 4 * (2 * 25 + 5)
    logits = STUDENT_LOGITS.float().requires_grad_()

    loss = OLSLoss()(logits, **adapters({"logits": logits, "target": TARGET}))
    loss.backward()

    assert float(loss.detach()) == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extreme_logits_are_finite(dtype):
    largest = 1e4 if dtype == torch.float16 else 1e30
    logits = (largest * torch.tensor([[1.0, 0.0, -1.0]])).to(dtype).requires_grad_()
    adapters = OLSLoss().build_adapters({"logits": (1, 3)})

    loss = OLSLoss()(logits, torch.tensor([[0.0, 0.5, 0.5]]))
    loss.backward()
    adapters.after_step({"logits": logits.detach(), "target": torch.tensor([0])})

    assert loss.dtype == adapters.class_sum.dtype == torch.float32
    assert bool(torch.isfinite(loss))
    assert bool(torch.isfinite(logits.grad).all())
    assert adapters.class_sum.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_the_soft_labels_get_no_gradient():
    soft_target = STUDENT_LOGITS.flip(0).softmax(1).requires_grad_()
    logits = STUDENT_LOGITS.clone().requires_grad_()
    value = OLSLoss(reduction="none")(logits, soft_target)
    value.sum().backward()

    assert soft_target.grad is None
    assert_close(logits.grad, (logits.softmax(1) - soft_target).detach())


def test_soft_labels_are_the_rows_taken_apart():
    soft_target = rows([0.5, 0.25, 0.25], [0.2, 0.2, 0.6])

    one = OLSLoss().soft_labels(soft_target, soft_target, torch.tensor([0, 2]))
    two = OLSLoss().soft_labels(soft_target, soft_target, rows([0.7, 0.3, 0], [0, 0, 1]))

    assert_close(one.target, rows([0.5, 0, 0], [0, 0, 0.6]))
    assert_close(one.non_target, rows([0, 0.5, 0.5], [0.5, 0.5, 0]))
    assert_close(two.target, rows([0.5, 0.25, 0], [0, 0, 0.6]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"initial": "ones"}, ValueError, "initial must be one of 'zeros', 'uniform'"),
        ({"keep_confident": 1.5}, ValueError, "keep_confident must be .* at most 1"),
    ],
)
def test_wrong_settings_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        OLSLoss(**change)


def test_wrong_inputs_are_refused():
    with pytest.raises(ValueError, match="soft_target must have the shape of logits"):
        OLSLoss()(STUDENT_LOGITS, STUDENT_LOGITS[:1])
    with pytest.raises(TypeError, match="soft_target is missing"):
        OLSLoss()(STUDENT_LOGITS)
