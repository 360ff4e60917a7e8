"""CRD: golden vectors through the heads, its memory, and how negatives are drawn."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from shared.golden_vectors import assert_close, cases_of
from shared.terms import loss_and_terms
from softlabels.losses import crd
from softlabels.losses.crd import CRDLoss, crd_scores, draw_negatives

CASES = cases_of("crd")
PARAMETERS = {
    f"{of}_embedding.{part}": f"embed_{of}_{part}"
    for of in ("student", "teacher")
    for part in ("weight", "bias")
}


def numbers(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def built(module, widths=(6, 7)):
    shapes = {
        "student_features": [(2, widths[0])],
        "teacher_features": [(2, widths[1])],
    }
    return module.build_adapters(shapes).double()


def method_of(case):
    """The method and its heads as they were before the step of `case`."""
    module = CRDLoss(
        num_samples=int(case["num_data"]),
        num_negatives=case["negative_index"].shape[1],
        width=case["student_memory_before"].shape[1],
        temperature=float(case["temperature"]),
        momentum=float(case["momentum"]),
    )
    heads = built(module, (case["student_features"].shape[1], case["teacher_features"].shape[1]))
    state = heads.state_dict()
    for name, of_case in PARAMETERS.items():
        state[name] = case[of_case]
    for of in ("student", "teacher"):
        state[f"{of}_memory"] = case[f"{of}_memory_before"]
    if case["z_student_before"] > 0:
        before = (case["z_student_before"], case["z_teacher_before"])
        state["log_normalizers"] = torch.stack(before).log()
        state["begun"] = torch.tensor(True)
    heads.load_state_dict(state)
    return module, heads


@pytest.mark.parametrize("case", CASES)
def test_a_step_of_the_reference(case, monkeypatch):
    module, heads = method_of(case)
    monkeypatch.setattr(crd, "draw_negatives", lambda *_: case["negative_index"])
    student = case["student_features"].requires_grad_()
    teacher = case["teacher_features"].requires_grad_()
    values = {
        "student_features": [student],
        "teacher_features": [teacher],
        "target": torch.zeros_like(case["index"]),
        "index": case["index"],
    }

    values |= heads(values)
    loss, parts = loss_and_terms(module, **values)
    (float(case["weight"]) * loss).backward()
    with torch.no_grad():
        heads.after_step(values)

    assert_close(float(case["weight"]) * loss, case["loss"])
    for row, of in enumerate(("student", "teacher")):
        assert_close(values[f"{of}_features"][0], case[f"{of}_embedding"])
        normalizer = values["log_normalizers"][row]
        assert_close((values["scores"][row] - normalizer).exp(), case[f"{of}_scores"])
        assert_close(heads.log_normalizers[row].exp(), case[f"z_{of}"])
        assert_close(parts[of], case[f"{of}_loss"])
        assert_close(getattr(heads, f"{of}_memory"), case[f"{of}_memory_after"])
    assert_close(student.grad, case["grad_student_features"])
    assert teacher.grad is None
    for name, parameter in heads.named_parameters():
        assert_close(parameter.grad, case[f"grad_{PARAMETERS[name]}"])


def test_a_loop_over_all_entries():
    # Both ways to make the products: n = 9 is fewer than (1 + 4) * 3, n = 40 more.
    for num_samples in (9, 40):
        embedding = functional.normalize(numbers(2, 3), dim=1)
        memory = numbers(num_samples, 3, seed=1)
        index, negatives = torch.tensor([3, 1]), torch.tensor([[0, 2, 2, 8], [5, 4, 0, 7]])

        scores = crd_scores(embedding, memory, index, negatives, temperature=0.5)

        expected = 0.0
        rows = [[3, 0, 2, 2, 8], [1, 5, 4, 0, 7]]
        exponentials = [
            [math.exp(float(embedding[b] @ memory[place]) / 0.5) for place in row]
            for b, row in enumerate(rows)
        ]
        normalizer = num_samples * sum(map(sum, exponentials)) / 10
        floor = 4 / num_samples + 1e-7
        for first, *others in exponentials:
            probability = first / normalizer
            expected -= math.log(probability / (probability + floor)) / 2
            for other in others:
                expected -= math.log(4 / num_samples / (other / normalizer + floor)) / 2
        loss = CRDLoss(num_samples=num_samples)([scores, scores])
        assert_close(loss, 2 * torch.tensor(expected, dtype=torch.float64))


def test_both_ways_to_make_the_products_agree():
    embedding, memory = numbers(2, 3).requires_grad_(), numbers(30, 3, seed=1)
    index, negatives = torch.tensor([3, 1]), torch.arange(24).reshape(2, 12)

    through_all = crd_scores(embedding, memory, index, negatives)
    few = crd_scores(embedding, memory, index, negatives[:, :2])

    assert_close(few, through_all[:, :3])
    weight = numbers(2, 3, seed=2)
    (one,) = torch.autograd.grad((weight * through_all[:, :3]).sum(), embedding)
    (other,) = torch.autograd.grad((weight * few).sum(), embedding)
    assert_close(one, other)


def test_negatives_are_of_other_classes_and_all_of_them():
    labels = torch.tensor([0, 1, 0, 2, -1, 1, 0, 2])
    classes, index = torch.tensor([0, 2, 1]), torch.tensor([2, 3, 4])
    torch.manual_seed(0)

    drawn = draw_negatives(labels, classes, index, 3000)

    # The batch tells that sample 4 is of class 1.
    of_other_classes = [1, 3, 4, 5, 7], [0, 1, 2, 4, 5, 6], [0, 2, 3, 6, 7]
    for row, others in zip(drawn, of_other_classes, strict=True):
        places, counts = row.unique(return_counts=True)
        assert places.tolist() == others
        assert (counts / 3000 - 1 / len(others)).abs().max() < 0.03


def test_negatives_of_unseen_samples_and_of_a_single_class():
    unseen = torch.full((5,), -1)
    drawn = draw_negatives(unseen, torch.tensor([1]), torch.tensor([2]), 200)
    assert set(drawn.flatten().tolist()) == {0, 1, 3, 4}

    drawn = draw_negatives(torch.zeros(5).long(), torch.tensor([0]), torch.tensor([2]), 9)
    assert ((drawn >= 0) & (drawn < 5)).all()


def stepped(heads, rows, index, target, features):
    values = {
        "student_features": [features[0][rows]],
        "teacher_features": [features[1][rows]],
        "target": target[rows],
        "index": index[rows],
    }
    values |= heads(values)
    return {name: values[name] for name in heads.memory_inputs}


def joined(first, second):
    if isinstance(first, list):
        return [torch.cat(pair) for pair in zip(first, second, strict=True)]
    return torch.cat((first, second))


def test_a_forward_changes_nothing_and_the_first_step_sets_the_normalizers():
    heads = built(CRDLoss(num_samples=20, num_negatives=6, width=4))
    index, target = torch.tensor([3, 0, 19, 7]), torch.tensor([1, 0, 2, 1])
    features = numbers(4, 6), numbers(4, 7, seed=1)
    before = {name: buffer.clone() for name, buffer in heads.named_buffers()}

    # As two processes with half of the batch each.
    halves = [stepped(heads, rows, index, target, features) for rows in ([0, 1], [2, 3])]
    assert all(torch.equal(before[name], buffer) for name, buffer in heads.named_buffers())
    together = {name: joined(halves[0][name], halves[1][name]) for name in heads.memory_inputs}
    with torch.no_grad():
        heads.after_step(together)

    means = together["log_means"].exp().mean(0)
    assert_close(heads.log_normalizers.exp(), 20 * means)
    assert heads.labels[index].tolist() == [1, 0, 2, 1]
    assert (heads.labels == -1).sum() == 16
    changed = (heads.student_memory != before["student_memory"]).any(1)
    assert changed.nonzero().flatten().tolist() == [0, 3, 7, 19]
    first = heads.log_normalizers.clone()
    with torch.no_grad():
        heads.after_step(stepped(heads, [0, 1], index, target, features))
    assert torch.equal(heads.log_normalizers, first)


def test_the_last_of_two_equal_samples_counts():
    twice, once = (built(CRDLoss(num_samples=5, num_negatives=2, width=4)) for _ in range(2))
    once.load_state_dict(twice.state_dict())
    features, target = (numbers(3, 6), numbers(3, 7, seed=1)), torch.tensor([0, 2, 1])
    index = torch.tensor([4, 1, 4])

    values = stepped(twice, [0, 1, 2], index, target, features)
    with torch.no_grad():
        twice.after_step(values)
        once.after_step(stepped(once, [1, 2], index, target, features))

    assert twice.labels.tolist() == [-1, 2, -1, -1, 1]
    assert_close(twice.student_memory, once.student_memory)
    assert_close(twice.teacher_memory, once.teacher_memory)


def test_mixed_labels_are_remembered_by_their_largest():
    heads = built(CRDLoss(num_samples=5, num_negatives=2, width=4))
    target = torch.tensor([[0.2, 0.8, 0.0], [0.6, 0.0, 0.4]], dtype=torch.float64)
    features = numbers(2, 6), numbers(2, 7, seed=1)

    values = stepped(heads, [0, 1], torch.tensor([2, 0]), target, features)
    with torch.no_grad():
        heads.after_step(values)

    assert heads.labels.tolist() == [0, -1, 1, -1, -1]


def test_hazards_stay_finite():
    heads = built(CRDLoss(num_samples=12, temperature=0.005, num_negatives=4, width=4)).float()
    torch.nn.init.zeros_(heads.student_embedding.bias)
    student = torch.zeros(2, 6, requires_grad=True)
    values = {
        "student_features": [student],
        "teacher_features": [1e4 * numbers(2, 7).half()],
        "target": torch.tensor([0, 1]),
        "index": torch.tensor([3, 4]),
    }

    with torch.autocast("cpu", dtype=torch.bfloat16):
        values |= heads(values)
        method = CRDLoss(num_samples=12)
        loss = method(**method.arguments_of(values))
    loss.backward()

    assert loss.dtype == torch.float32
    assert values["scores"][0].dtype == torch.float32
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in heads.parameters())


def test_negatives_are_at_most_the_rest_of_a_small_set():
    heads = built(CRDLoss(num_samples=5, width=4))
    values = {
        "student_features": [numbers(1, 6)],
        "teacher_features": [numbers(1, 7)],
        "target": torch.tensor([0]),
        "index": torch.tensor([3]),
    }

    assert heads(values)["scores"][0].shape == (1, 5)
    with pytest.raises(ValueError, match=r"index must lie in \[0, 5\) .* from 5 to 5"):
        heads({**values, "index": torch.tensor([5])})


def test_given_normalizers_are_taken():
    scores, normalizers = [numbers(2, 4), numbers(2, 4, seed=1)], numbers(2)
    method = CRDLoss(num_samples=9)

    loss, terms = loss_and_terms(method, scores, normalizers)

    assert loss == terms["student"] + terms["teacher"]
    assert loss != method(scores)


def test_errors_say_what_was_got():
    scores = numbers(2, 4)
    with pytest.raises(ValueError, match="set num_samples to the size"):
        built(CRDLoss())
    # 10^7 rows of 2 * 128 float32 and a label are 10,320,000,000 bytes.
    with pytest.raises(ValueError, match=r"10320000000 bytes \(9.6 GiB\) .* most_memory allows 8"):
        built(CRDLoss(num_samples=10**7))
    with pytest.raises(ValueError, match=r"scores must be those of the student and .* got 0"):
        CRDLoss(num_samples=9)([])
    with pytest.raises(TypeError, match="scores is missing: it comes from the module that build_"):
        CRDLoss(num_samples=9)()
    with pytest.raises(TypeError, match=r"num_negatives must be a whole number, got float"):
        CRDLoss(num_negatives=2.5)
    with pytest.raises(ValueError, match=r"momentum must be .* at most 1, got 1.5"):
        CRDLoss(momentum=1.5)
    with pytest.raises(ValueError, match="temperature must be finite, above 0, got 0"):
        CRDLoss(temperature=0.0)
    with pytest.raises(ValueError, match="num_samples must be finite, above 0, got 0"):
        CRDLoss(num_samples=0)
    with pytest.raises(ValueError, match=r"must have one shape, got \(2, 4\) and \(2, 3\)"):
        CRDLoss(num_samples=9)([scores, scores[:, :3]])
    with pytest.raises(ValueError, match="at least one negative, got 1"):
        CRDLoss(num_samples=9)([scores[:, :1], scores[:, :1]])
    with pytest.raises(ValueError, match=r"log_normalizers must be \[2\], got \(3,\)"):
        CRDLoss(num_samples=9)([scores, scores], log_normalizers=numbers(3))
    with pytest.raises(ValueError, match=r"must be \[2\] and \[2, K\], got \(3,\)"):
        crd_scores(scores, scores, torch.zeros(3).long(), torch.zeros(2, 3).long())
    with pytest.raises(ValueError, match=r"\[B, D\] and \[n, D\], got \(2, 4\) and \(2, 3\)"):
        crd_scores(scores, scores[:, :3], torch.zeros(2).long(), torch.zeros(2, 3).long())
