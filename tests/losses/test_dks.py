"""DKS: published vectors, a plain computation, and what each term pulls at."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from shared.golden_vectors import assert_close, cases_of
from shared.slow_reference import log_softmax, softmax
from softlabels.losses.dks import DKSLoss

MAP = torch.zeros(3, 2, 2, 2)


def case(num_exits: int = 2, batch_size: int = 3, seed: int = 0) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        drawn = torch.randn(batch_size, 5, generator=generator, dtype=torch.float64)
        return drawn.requires_grad_()

    return {
        "logits": draw(),
        "target": torch.arange(batch_size) % 5,
        "branches": [*(draw() for _ in range(num_exits)), *[MAP] * num_exits],
    }


@pytest.mark.parametrize("golden", cases_of("dks"))
def test_published_vectors(golden):
    numbers = range(int(golden["num_exits"]))
    exits = [golden[f"logits_{i}"].requires_grad_() for i in numbers]
    target, temperature = golden["target"], float(golden["temperature"])
    arguments = exits[0], target, [*exits[1:], *[MAP] * (len(exits) - 1)]

    method = DKSLoss(smoothing=float(golden["eps"]))
    loss, terms = method(*arguments), method.reduced(*arguments)
    lib = DKSLoss(temperature=temperature, smoothing=0.0, branch_weight=0.0)(*arguments)

    of_final = nn.functional.cross_entropy(exits[0], target)
    pairs = [golden[f"kl_{i}_{j}"] for i in numbers for j in numbers if i != j]
    assert_close(terms["kd"], torch.stack(pairs).sum())
    assert_close(terms["kd"], golden["loss"])
    assert_close(terms["branch"] + of_final, golden["ce"])
    assert_close(loss + of_final, golden["total"])
    assert_close(lib, golden["loss_self_kd_lib"])
    for value, prefix in (
        (terms["kd"], "grad_"),
        (loss + of_final, "grad_total_"),
        (lib, "grad_self_kd_lib_"),
    ):
        for i, gradient in enumerate(torch.autograd.grad(value, exits, retain_graph=True)):
            assert_close(gradient, golden[f"{prefix}logits_{i}"])


@pytest.mark.parametrize(("temperature", "smoothing"), [(1.0, 1e-2), (2.5, 0.0), (3.0, 1e-3)])
def test_a_plain_computation(temperature, smoothing):
    values = case(num_exits=3)
    method = DKSLoss(temperature=temperature, smoothing=smoothing, branch_weight=0.5, kd_weight=2.0)

    terms = method.terms(**values)

    exits = [[row.tolist() for row in t] for t in (*values["branches"][:3], values["logits"])]
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
        assert {name: term[row].item() for name, term in terms.items()} == pytest.approx(expected)


def test_equal_exits_learn_the_label_alone():
    logits = torch.randn(3, 5, dtype=torch.float64)
    target = torch.tensor([0, 1, 2])

    terms = DKSLoss().reduced(logits, target, [logits.clone(), logits.clone(), MAP, MAP])

    torch.testing.assert_close(terms["branch"], 2 * nn.functional.cross_entropy(logits, target))
    assert terms["kd"].item() == 0


def test_an_exit_is_pulled_at_by_the_others_and_they_are_not():
    # Only the pairs in which an exit learns train it: its gradient is that of these alone.
    values = case(num_exits=1)
    logits, of_exit = values["logits"], values["branches"][0]

    terms = DKSLoss().reduced(**values)
    gradient, _ = torch.autograd.grad(terms["kd"], (logits, of_exit))

    expected = (logits.softmax(1) - of_exit.softmax(1)) / len(logits)
    torch.testing.assert_close(gradient, expected.detach(), rtol=0, atol=1e-7)


def test_reductions_and_labels_as_probabilities():
    values = case()
    rows = DKSLoss(reduction="none")(**values)
    one_hot = nn.functional.one_hot(values["target"], 5).double()

    assert rows.shape == (3,)
    torch.testing.assert_close(DKSLoss()(**values), rows.mean())
    torch.testing.assert_close(DKSLoss(reduction="sum")(**values), rows.sum())
    torch.testing.assert_close(DKSLoss()(**{**values, "target": one_hot}), rows.mean())


@pytest.mark.parametrize("smoothing", [1e-8, 0.0])
def test_extreme_half_precision_logits_give_a_finite_float32_loss(smoothing):
    logits = torch.tensor([[3e4, -3e4, 0.0]]).half().requires_grad_()
    of_exit = torch.tensor([[-3e4, 3e4, 0.0]]).half().requires_grad_()

    loss = DKSLoss(smoothing=smoothing)(logits, torch.tensor([0]), [of_exit, MAP])
    loss.backward()

    assert loss.dtype == torch.float32
    assert bool(torch.isfinite(loss))
    assert bool(torch.isfinite(logits.grad).all() & torch.isfinite(of_exit.grad).all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branches": []}, "at least one exit, got none"),
        ({"branches": [torch.zeros(3, 4), MAP]}, "logits of exit 0 must have the shape"),
        ({"target": torch.tensor([0, 1])}, "target must hold 3 labels"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        DKSLoss()(**{**case(), **changes})


def test_settings():
    assert DKSLoss(stages=("stage1",)).inputs["branches"].stages == ("stage1",)
    with pytest.raises(ValueError, match="stages must name one or more"):
        DKSLoss(stages=())
    with pytest.raises(ValueError, match="smoothing must be finite, 0 or more and at most 1"):
        DKSLoss(smoothing=1.5)
