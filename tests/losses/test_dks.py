"""DKS: published vectors, a plain computation, and what each term pulls at."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from shared.golden_vectors import assert_close, cases_of
from shared.slow_reference import log_softmax, softmax
from softlabels.losses.dks import DKSLoss, dks_loss


def case(num_exits: int = 2, batch_size: int = 3, seed: int = 0) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        drawn = torch.randn(batch_size, 5, generator=generator, dtype=torch.float64)
        return drawn.requires_grad_()

    return {
        "logits": draw(),
        "target": torch.arange(batch_size) % 5,
        "branch_logits": [draw() for _ in range(num_exits)],
    }


@pytest.mark.parametrize("golden", cases_of("dks"))
def test_published_vectors(golden):
    numbers = range(int(golden["num_exits"]))
    exits = [golden[f"logits_{i}"].requires_grad_() for i in numbers]
    target, temperature = golden["target"], float(golden["temperature"])
    arguments = exits[0], target, exits[1:]

    loss, parts = dks_loss(*arguments, smoothing=float(golden["eps"]), return_parts=True)
    lib = dks_loss(*arguments, temperature=temperature, smoothing=0.0, branch_weight=0.0)

    of_final = nn.functional.cross_entropy(exits[0], target)
    pairs = [golden[f"kl_{i}_{j}"] for i in numbers for j in numbers if i != j]
    assert_close(parts["kd"], torch.stack(pairs).sum())
    assert_close(parts["kd"], golden["loss"])
    assert_close(parts["branch"] + of_final, golden["ce"])
    assert_close(loss + of_final, golden["total"])
    assert_close(lib, golden["loss_self_kd_lib"])
    for value, prefix in (
        (parts["kd"], "grad_"),
        (loss + of_final, "grad_total_"),
        (lib, "grad_self_kd_lib_"),
    ):
        for i, gradient in enumerate(torch.autograd.grad(value, exits, retain_graph=True)):
            assert_close(gradient, golden[f"{prefix}logits_{i}"])


@pytest.mark.parametrize(("temperature", "smoothing"), [(1.0, 1e-2), (2.5, 0.0), (3.0, 1e-3)])
def test_a_plain_computation(temperature, smoothing):
    values = case(num_exits=3)
    settings = {"temperature": temperature, "smoothing": smoothing}

    _, parts = dks_loss(
        **values, **settings, branch_weight=0.5, kd_weight=2.0, reduction="none", return_parts=True
    )

    exits = [[row.tolist() for row in t] for t in (*values["branch_logits"], values["logits"])]
    for row, label in enumerate(values["target"].tolist()):
        predicted = [
            [
                (p + smoothing) / (1 + 5 * smoothing)
                for p in softmax([value / temperature for value in of_exit[row]])
            ]
            for of_exit in exits
        ]
        divergences = [
            sum(a * math.log(a / b) for a, b in zip(source, learner, strict=True))
            for learner in predicted
            for source in predicted
            if source is not learner
        ]
        label_terms = [-log_softmax(of_exit[row])[label] for of_exit in exits[:-1]]
        expected = {"branch": 0.5 * sum(label_terms), "kd": 2 * temperature**2 * sum(divergences)}
        assert {name: part[row].item() for name, part in parts.items()} == pytest.approx(expected)


def test_equal_exits_learn_the_label_alone():
    logits = torch.randn(3, 5, dtype=torch.float64)
    target = torch.tensor([0, 1, 2])

    _, parts = dks_loss(logits, target, [logits.clone(), logits.clone()], return_parts=True)

    torch.testing.assert_close(parts["branch"], 2 * nn.functional.cross_entropy(logits, target))
    assert parts["kd"].item() == 0


def test_an_exit_is_pulled_at_by_the_others_and_they_are_not():
    # Only the pairs in which an exit learns train it: its gradient is that of these alone.
    values = case(num_exits=1)
    logits, (of_exit,) = values["logits"], values["branch_logits"]

    _, parts = dks_loss(**values, return_parts=True)
    gradient, _ = torch.autograd.grad(parts["kd"], (logits, of_exit))

    expected = (logits.softmax(1) - of_exit.softmax(1)) / len(logits)
    torch.testing.assert_close(gradient, expected.detach(), rtol=0, atol=1e-7)


def test_reductions_and_labels_as_probabilities():
    values = case()
    rows = dks_loss(**values, reduction="none")
    one_hot = nn.functional.one_hot(values["target"], 5).double()

    assert rows.shape == (3,)
    torch.testing.assert_close(dks_loss(**values), rows.mean())
    torch.testing.assert_close(dks_loss(**values, reduction="sum"), rows.sum())
    torch.testing.assert_close(dks_loss(**{**values, "target": one_hot}), rows.mean())


@pytest.mark.parametrize("smoothing", [1e-8, 0.0])
def test_extreme_half_precision_logits_give_a_finite_float32_loss(smoothing):
    logits = torch.tensor([[3e4, -3e4, 0.0]]).half().requires_grad_()
    of_exit = torch.tensor([[-3e4, 3e4, 0.0]]).half().requires_grad_()

    loss = dks_loss(logits, torch.tensor([0]), [of_exit], smoothing=smoothing)
    loss.backward()

    assert loss.dtype == torch.float32
    assert bool(torch.isfinite(loss))
    assert bool(torch.isfinite(logits.grad).all() & torch.isfinite(of_exit.grad).all())


def test_the_module_gives_what_the_function_gives():
    values = case()
    settings = {"temperature": 2.0, "smoothing": 0.0, "kd_weight": 0.5, "branch_weight": 0.7}
    module = DKSLoss(**settings, stages=("stage1",))
    maps = [torch.zeros(3, 2, 2, 2)] * 2

    output = module(
        values["logits"], values["target"], [*values["branch_logits"], *maps], return_parts=True
    )

    expected = dks_loss(**values, **settings, return_parts=True)
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.parts, expected.parts)
    assert module.inputs["branches"].stages == ("stage1",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branch_logits": []}, "at least one exit, got none"),
        ({"branch_logits": [torch.zeros(3, 4)]}, r"branch_logits\[0\] must have the shape"),
        ({"temperature": 0.0}, "temperature must be finite, above 0"),
        ({"smoothing": 1.5}, "smoothing must be finite, 0 or more and at most 1"),
        ({"kd_weight": -1.0}, "kd_weight must be finite, 0 or more"),
        ({"target": torch.tensor([0, 1])}, "target must hold 3 labels"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        dks_loss(**{**case(), **changes})
