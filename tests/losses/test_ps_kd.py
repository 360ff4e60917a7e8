"""PS-KD: the vectors of the published code, the memory of predictions, and corner cases."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from shared.by_hand import STUDENT_LOGITS, assert_six_digits, logits_of, rows
from shared.golden_vectors import assert_close, cases_of
from softlabels.losses._memory_bank import MemoryBank
from softlabels.losses.ps_kd import PSKDLoss


def memory_of(num_samples, num_classes):
    adapters = PSKDLoss(num_samples=num_samples).build_adapters({"logits": (2, num_classes)})
    assert isinstance(adapters, MemoryBank)
    return adapters.double()


def test_values_gradients_and_memory_of_the_published_code():
    cases = cases_of("ps_kd")
    assert len(cases) == 4
    for case in cases:
        before = case["predictions_before"]
        adapters = memory_of(*before.shape)
        if int(case["epoch"]) > 0:
            adapters.after_step({"logits": before.log(), "index": torch.arange(len(before))})
        logits = case["logits"].requires_grad_()
        batch = {"logits": logits, "target": case["target"], "index": case["index"]}
        alpha = case["alpha"]

        added = adapters(batch)
        term = PSKDLoss()(logits, **added)
        task = functional.cross_entropy(logits, case["target"])
        whole = (1 - alpha) * task + alpha * term
        whole.backward()
        adapters.after_step({"logits": logits.detach(), "index": case["index"]})

        assert list(added) == ["past_prediction"]
        label = functional.one_hot(case["target"], before.shape[1])
        soft_target = (1 - alpha) * label + alpha * added["past_prediction"]
        assert_close(soft_target, case["soft_target"])
        assert_close(whole, case["loss"])
        assert_close(logits.grad, case["grad_logits"])
        stored = adapters.predictions
        assert_close(stored[case["index"]], case["predictions_after"][case["index"]])
        if int(case["epoch"]) > 0:
            assert_close(stored, case["predictions_after"])


def test_one_sample_by_hand():
    # 1/2 ln 4 + 1/4 ln 4 + 1/4 ln 2 = 7/4 ln 2 = 1.213008.
    value = PSKDLoss()(logits_of([1, 1, 2]), rows([0.5, 0.25, 0.25]))

    assert_six_digits(value, 1.213008)


def test_an_unseen_sample_has_its_label_and_a_seen_one_its_last_prediction():
    adapters = memory_of(5, 3)
    logits = logits_of([2, 1, 1], [1, 1, 2])
    mixed = rows([0.3, 0.7, 0], [0, 0, 1])
    adapters.after_step({"logits": logits, "index": torch.tensor([4, 1])})

    def past(target, index):
        values = {"logits": logits, "target": target, "index": torch.tensor(index)}
        return adapters(values)["past_prediction"]

    assert_close(past(torch.tensor([0, 2]), [1, 2]), rows([0.25, 0.25, 0.5], [0, 0, 1]))
    assert_close(past(mixed, [3, 4]), rows([0.3, 0.7, 0], [0.5, 0.25, 0.25]))
    adapters.after_step({"logits": logits.flip(0), "index": torch.tensor([4, 0])})
    assert_close(past(torch.tensor([0, 2]), [4, 0]), rows([0.25, 0.25, 0.5], [0.5, 0.25, 0.25]))
    assert adapters.seen.tolist() == [True, True, False, False, True]


def test_of_a_sample_that_comes_twice_the_last_prediction_stays():
    adapters = memory_of(4, 3)
    logits = logits_of([2, 1, 1], [1, 2, 1], [1, 1, 2], [1, 1, 1])

    adapters.after_step({"logits": logits, "index": torch.tensor([3, 1, 3, 3])})

    assert_close(adapters.predictions[3], rows([1 / 3] * 3)[0])
    assert_close(adapters.predictions[1], rows([0.25, 0.5, 0.25])[0])


def test_a_forward_changes_no_memory_and_an_epoch_neither():
    adapters = memory_of(5, 3)
    before = {name: buffer.clone() for name, buffer in adapters.named_buffers()}

    adapters(
        {"logits": logits_of([2, 1, 1]), "target": torch.tensor([0]), "index": torch.tensor([4])}
    )
    adapters.after_epoch()

    assert all(torch.equal(before[name], buffer) for name, buffer in adapters.named_buffers())


def test_the_memory_is_float32_also_for_logits_of_half_precision():
    adapters = PSKDLoss(num_samples=5).build_adapters({"logits": (2, 3)})
    assert adapters.memory_inputs == ("logits", "index")
    assert adapters.num_bytes() == 5 * (4 * 3 + 1)

    adapters.after_step({"logits": torch.zeros(1, 3).half(), "index": torch.tensor([2]).int()})
    values = {"logits": None, "target": torch.tensor([1]), "index": torch.tensor([2]).int()}

    assert adapters.predictions.dtype == torch.float32
    torch.testing.assert_close(adapters(values)["past_prediction"], torch.full((1, 3), 1 / 3))


def test_a_memory_without_a_size_or_too_large_is_refused():
    shapes = {"logits": (2, 21843)}
    with pytest.raises(ValueError, match="set num_samples to the size of the training set"):
        PSKDLoss().build_adapters(shapes)
    # ImageNet-21k: 14197122 * (4 * 21843 + 1) bytes, over 2^30.
    with pytest.raises(ValueError, match=r"\(1155\.\d GiB\).*raise most_memory"):
        PSKDLoss(num_samples=14197122).build_adapters(shapes)
    with pytest.raises(ValueError, match=r"13000 bytes .* most_memory allows 1e-05 GiB"):
        PSKDLoss(num_samples=1000, most_memory=1e-5).build_adapters({"logits": (1, 3)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extreme_logits_are_finite(dtype):
    largest = 1e4 if dtype == torch.float16 else 1e30
    logits = (largest * torch.tensor([[1.0, 0.0, -1.0]])).to(dtype).requires_grad_()

    loss = PSKDLoss()(logits, torch.tensor([[0.0, 0.5, 0.5]]))
    loss.backward()

    assert loss.dtype == torch.float32
    assert bool(torch.isfinite(loss))
    assert bool(torch.isfinite(logits.grad).all())


def test_the_past_gets_no_gradient():
    past = STUDENT_LOGITS.flip(0).softmax(1).requires_grad_()
    logits = STUDENT_LOGITS.clone().requires_grad_()
    value = PSKDLoss(reduction="none")(logits, past)
    value.sum().backward()

    assert past.grad is None
    assert_close(logits.grad, (logits.softmax(1) - past).detach())


def test_soft_labels_are_the_past_prediction_taken_apart():
    past = rows([0.5, 0.25, 0.25], [0, 1, 0])

    soft = PSKDLoss().soft_labels(past, past, torch.tensor([1, 1]))

    assert_close(soft.target, rows([0, 0.25, 0], [0, 1, 0]))
    assert_close(soft.non_target, rows([2 / 3, 0, 1 / 3], [0, 0, 0]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_samples": 0}, ValueError, "num_samples must be finite, above 0"),
        ({"num_samples": 1.5}, TypeError, "num_samples must be a whole number"),
        ({"most_memory": 0.0}, ValueError, "most_memory must be finite, above 0"),
    ],
)
def test_wrong_settings_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        PSKDLoss(**change)


def test_wrong_inputs_are_refused():
    with pytest.raises(ValueError, match="past_prediction must have the shape of logits"):
        PSKDLoss()(STUDENT_LOGITS, STUDENT_LOGITS[:1])
    with pytest.raises(TypeError, match="past_prediction is missing"):
        PSKDLoss()(STUDENT_LOGITS)
