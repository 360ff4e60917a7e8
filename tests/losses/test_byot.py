"""BYOT: published vectors, a computation by hand, and what each term pulls at."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from shared.golden_vectors import assert_close, cases_of
from softlabels.losses.byot import BYOTLoss

LOGITS, MAP = torch.zeros(3, 5), torch.zeros(3, 4, 2, 3)


def case(num_exits: int = 2, batch_size: int = 3, seed: int = 0) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    return {
        "logits": draw(batch_size, 5),
        "target": torch.arange(batch_size) % 5,
        "branches": [draw(batch_size, 5) for _ in range(num_exits)]
        + [draw(batch_size, 4, 2, 3) for _ in range(num_exits)],
        "last_map": [draw(batch_size, 4, 2, 3)],
    }


@pytest.mark.parametrize("golden", cases_of("byot"))
def test_published_vectors(golden):
    # Exit 0 of the vectors is the final one.
    numbers = range(int(golden["num_exits"]))
    logits = [golden[f"logits_{i}"].requires_grad_() for i in numbers]
    maps = [golden[f"map_{i}"].requires_grad_() for i in numbers]

    method = BYOTLoss(
        temperature=float(golden["temperature"]), feature_weight=float(golden["feature_weight"])
    )
    inputs = logits[0], golden["target"], [*logits[:0:-1], *maps[:0:-1]], [maps[0]]
    loss, terms = method(*inputs), method.reduced(*inputs)

    distilled = terms["kd"] + terms["feature"]
    of_final = nn.functional.cross_entropy(logits[0], golden["target"])
    assert_close(terms["kd"], sum(golden[f"kl_{i}"] for i in numbers[1:]))
    assert_close(
        terms["feature"],
        golden["feature_weight"] * sum(golden[f"feature_mse_{i}"] for i in numbers[1:]),
    )
    assert_close(distilled, golden["loss"])
    assert_close(terms["branch"] + of_final, golden["ce"])
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

    method = BYOTLoss(temperature=1.0, branch_weight=2.0, kd_weight=3.0, feature_weight=0.1)
    terms = method.reduced(final, torch.tensor([0]), [exit_logits, exit_map], [last_map])

    expected = {"branch": 2 * math.log(4), "kd": 1.5 * math.log(4 / 3), "feature": 0.5}
    assert {name: pytest.approx(float(term)) for name, term in terms.items()} == expected


def test_exits_equal_to_the_final_one_learn_the_label_alone():
    values = case()
    values["branches"] = [
        tensor.detach().clone()
        for tensor in (values["logits"], values["last_map"][0])
        for _ in range(2)
    ]

    loss, terms = BYOTLoss()(**values), BYOTLoss().reduced(**values)

    label = nn.functional.cross_entropy(values["logits"], values["target"])
    torch.testing.assert_close(loss, 2 * label)
    torch.testing.assert_close(terms["kd"] + terms["feature"], torch.zeros_like(loss))


def test_the_final_exit_is_not_pulled_at():
    values = case()

    BYOTLoss()(**values).backward()

    assert values["logits"].grad is None
    assert values["last_map"][0].grad is None
    for tensor in values["branches"]:
        assert bool(tensor.grad.abs().sum() > 0)


def test_reductions_and_labels_as_probabilities():
    values = case()

    rows = BYOTLoss(reduction="none")(**values)
    one_hot = nn.functional.one_hot(values["target"], 5).double()

    assert rows.shape == (3,)
    torch.testing.assert_close(BYOTLoss()(**values), rows.mean())
    torch.testing.assert_close(BYOTLoss(reduction="sum")(**values), rows.sum())
    torch.testing.assert_close(BYOTLoss()(**{**values, "target": one_hot}), rows.mean())


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_half_precision_gives_a_finite_float32_loss(scale):
    generator = torch.Generator().manual_seed(0)
    logits = (scale * torch.randn(3, 1, 5, generator=generator)).half()
    maps = torch.randn(2, 1, 4, 2, 2, generator=generator).half()
    leaf = logits[1].clone().requires_grad_()

    loss = BYOTLoss()(logits[0], torch.tensor([1]), [leaf, maps[0]], [maps[1]])
    loss.backward()

    assert loss.dtype == torch.float32
    assert bool(torch.isfinite(loss))
    assert bool(torch.isfinite(leaf.grad).all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branches": []}, "at least one exit, got none"),
        ({"branches": [LOGITS, MAP, MAP]}, "logits and a map of each exit, got 3"),
        ({"branches": [torch.zeros(3, 4), MAP]}, "logits of exit 0 must have the shape"),
        ({"branches": [LOGITS, MAP[..., :2]]}, "map of exit 0 must have the shape"),
        ({"last_map": [torch.zeros(2, 4, 2, 3)]}, r"last_map must be \[3, D, H, W\]"),
        ({"last_map": [MAP, MAP]}, "last_map must be a list of one tensor, got 2"),
        ({"target": torch.tensor([0, 1])}, "target must hold 3 labels"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        BYOTLoss()(**{**case(), **changes})


def test_settings():
    exits = BYOTLoss(stages=["layer1", "layer2"]).inputs["branches"]
    assert exits.stages == ("layer1", "layer2")
    with pytest.raises(ValueError, match="stages must name one or more"):
        BYOTLoss(stages=())
    with pytest.raises(ValueError, match="feature_weight must be finite, 0 or more"):
        BYOTLoss(feature_weight=-1.0)


def test_an_ignored_sample_counts_nothing():
    values = case()
    values["target"] = torch.tensor([1, 9, 2])
    kept = torch.tensor([0, 2])
    of_kept = {
        name: [t[kept] for t in value] if isinstance(value, list) else value[kept]
        for name, value in values.items()
    }

    torch.testing.assert_close(BYOTLoss(ignore_index=9)(**values), BYOTLoss()(**of_kept))
