"""BYOT: published vectors, a computation by hand, and what each term pulls at."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from shared.golden_vectors import assert_close, cases_of
from softlabels.losses.byot import BYOTLoss, byot_loss, split_branches


def case(num_exits: int = 2, batch_size: int = 3, seed: int = 0) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    return {
        "logits": draw(batch_size, 5),
        "target": torch.arange(batch_size) % 5,
        "branch_logits": [draw(batch_size, 5) for _ in range(num_exits)],
        "branch_maps": [draw(batch_size, 4, 2, 3) for _ in range(num_exits)],
        "last_map": draw(batch_size, 4, 2, 3),
    }


@pytest.mark.parametrize("golden", cases_of("byot"))
def test_published_vectors(golden):
    # Exit 0 of the vectors is the final one.
    numbers = range(int(golden["num_exits"]))
    logits = [golden[f"logits_{i}"].requires_grad_() for i in numbers]
    maps = [golden[f"map_{i}"].requires_grad_() for i in numbers]

    loss, parts = byot_loss(
        logits[0],
        golden["target"],
        logits[:0:-1],
        maps[:0:-1],
        maps[0],
        temperature=float(golden["temperature"]),
        feature_weight=float(golden["feature_weight"]),
        return_parts=True,
    )

    distilled = parts["kd"] + parts["feature"]
    of_final = nn.functional.cross_entropy(logits[0], golden["target"])
    assert_close(parts["kd"], sum(golden[f"kl_{i}"] for i in numbers[1:]))
    assert_close(
        parts["feature"],
        golden["feature_weight"] * sum(golden[f"feature_mse_{i}"] for i in numbers[1:]),
    )
    assert_close(distilled, golden["loss"])
    assert_close(parts["branch"] + of_final, golden["ce"])
    assert_close(loss + of_final, golden["total"])
    inputs = [*logits, *maps]
    for value, prefix in ((distilled, "grad_"), (loss + of_final, "grad_total_")):
        found = torch.autograd.grad(
            value, inputs, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        names = [f"{kind}_{i}" for kind in ("logits", "map") for i in numbers]
        for name, gradient in zip(names, found, strict=True):
            assert_close(gradient, golden[prefix + name])


def test_by_hand():
    # S of the exit is (1/4, 3/4), of the final exit (1/2, 1/2), label 0:
    # CE = ln 4; KL = 1/2 ln 2 + 1/2 ln(2/3) = 1/2 ln(4/3); maps differ by 1 and 3: mean 5.
    final, last_map = torch.zeros(1, 2), torch.zeros(1, 1, 1, 2)
    exit_logits = torch.tensor([[0.0, math.log(3)]])
    exit_map = torch.tensor([[[[1.0, -3.0]]]])

    _, parts = byot_loss(
        final,
        torch.tensor([0]),
        [exit_logits],
        [exit_map],
        last_map,
        temperature=1.0,
        branch_weight=2.0,
        kd_weight=3.0,
        feature_weight=0.1,
        return_parts=True,
    )

    expected = {"branch": 2 * math.log(4), "kd": 1.5 * math.log(4 / 3), "feature": 0.5}
    assert {name: pytest.approx(float(part)) for name, part in parts.items()} == expected


def test_exits_equal_to_the_final_one_learn_the_label_alone():
    values = case()
    values["branch_logits"] = [values["logits"].detach().clone() for _ in range(2)]
    values["branch_maps"] = [values["last_map"].detach().clone() for _ in range(2)]

    loss, parts = byot_loss(**values, return_parts=True)

    label = nn.functional.cross_entropy(values["logits"], values["target"])
    torch.testing.assert_close(loss, 2 * label)
    torch.testing.assert_close(parts["kd"] + parts["feature"], torch.zeros_like(loss))


def test_the_final_exit_is_not_pulled_at():
    values = case()

    byot_loss(**values).backward()

    assert values["logits"].grad is None
    assert values["last_map"].grad is None
    for tensor in (*values["branch_logits"], *values["branch_maps"]):
        assert bool(tensor.grad.abs().sum() > 0)


def test_reductions_and_labels_as_probabilities():
    values = case()

    rows = byot_loss(**values, reduction="none")
    one_hot = nn.functional.one_hot(values["target"], 5).double()

    assert rows.shape == (3,)
    torch.testing.assert_close(byot_loss(**values), rows.mean())
    torch.testing.assert_close(byot_loss(**values, reduction="sum"), rows.sum())
    torch.testing.assert_close(byot_loss(**{**values, "target": one_hot}), rows.mean())


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_half_precision_gives_a_finite_float32_loss(scale):
    generator = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(3, 1, 5, generator=generator)).half()
    maps = torch.randn(2, 1, 4, 2, 2, generator=generator).half()
    leaf = logits[1].clone().requires_grad_()

    loss = byot_loss(logits[0], torch.tensor([1]), [leaf], [maps[0]], maps[1])
    loss.backward()

    assert loss.dtype == torch.float32
    assert bool(torch.isfinite(loss))
    assert bool(torch.isfinite(leaf.grad).all())


def test_the_module_gives_what_the_function_gives():
    values = case(num_exits=3)
    settings = {"temperature": 2.0, "kd_weight": 0.5, "feature_weight": 0.2, "branch_weight": 0.7}
    module = BYOTLoss(**settings, stages=("layer1", "layer2", "layer3"))

    output = module(
        values["logits"],
        values["target"],
        [*values["branch_logits"], *values["branch_maps"]],
        [values["last_map"]],
        return_parts=True,
    )

    expected = byot_loss(**values, **settings, return_parts=True)
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.parts, expected.parts)
    assert module.inputs["branches"].stages == ("layer1", "layer2", "layer3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branch_logits": []}, "at least one, got 0 and 2"),
        ({"branch_maps": [torch.zeros(3, 4, 2, 3)]}, "got 2 and 1"),
        ({"branch_logits": [torch.zeros(3, 4)] * 2}, r"branch_logits\[0\] must have the shape"),
        ({"branch_maps": [torch.zeros(3, 4, 2, 2)] * 2}, r"branch_maps\[0\] must have the shape"),
        ({"last_map": torch.zeros(2, 4, 2, 3)}, r"last_map must be \[3, D, H, W\]"),
        ({"temperature": 0.0}, "temperature must be finite, above 0"),
        ({"feature_weight": -1.0}, "feature_weight must be finite, 0 or more"),
        ({"target": torch.tensor([0, 1])}, "target must hold 3 labels"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        byot_loss(**{**case(), **changes})


def test_an_odd_number_of_branch_tensors():
    with pytest.raises(ValueError, match="logits and a map of each exit, got 3"):
        split_branches([torch.zeros(1)] * 3)
