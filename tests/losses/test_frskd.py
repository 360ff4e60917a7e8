"""FRSKD: published vectors, a plain computation, and the branch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shared.golden_vectors import assert_close, cases_of
from softlabels.losses.frskd import FRSKDLoss

SHAPES = [(3, 4, 8, 8), (3, 6, 4, 4), (3, 8, 2, 2)]


def case(seed: int = 0) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    return {
        "logits": draw(3, 5),
        "target": torch.arange(3),
        "maps": [draw(*shape) for shape in SHAPES],
        "branch_logits": draw(3, 5),
        "branch_maps": [draw(b, 2 * c, h, w) for b, c, h, w in SHAPES],
    }


def adapters_of(shapes: list[tuple[int, ...]], **settings: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FRSKDLoss(**settings).build_adapters({"logits": (shapes[0][0], 5), "maps": shapes})


def maps_of(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("golden", cases_of("frskd"))
def test_published_vectors(golden):
    levels = range(int(golden["num_levels"]))
    names = ["logits", *(f"map_{i}" for i in levels)]
    names += ["branch_logits", *(f"branch_map_{i}" for i in levels)]
    inputs = {name: golden[name].requires_grad_() for name in names}

    method = FRSKDLoss(
        temperature=float(golden["temperature"]),
        kd_weight=float(golden["kd_weight"]),
        attention_weight=float(golden["attention_weight"]),
    )
    values = (
        inputs["logits"],
        golden["target"],
        [inputs[f"map_{i}"] for i in levels],
        inputs["branch_logits"],
        [inputs[f"branch_map_{i}"] for i in levels],
    )
    loss, terms = method(*values), method.reduced(*values)

    distilled = terms["kd"] + terms["attention"]
    total = loss + nn.functional.cross_entropy(inputs["logits"], golden["target"])
    assert_close(terms["kd"], golden["kd_weight"] * golden["kl"])
    assert_close(terms["attention"], golden["attention_weight"] * golden["attention_total"])
    assert_close(terms["branch"], golden["branch_ce"])
    assert_close(distilled, golden["loss"])
    assert_close(total, golden["total"])
    for value, prefix in ((distilled, "grad_"), (total, "grad_total_")):
        found = torch.autograd.grad(
            value,
            [*inputs.values()],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        for name, gradient in zip(names, found, strict=True):
            assert_close(gradient, golden[prefix + name])


def test_by_hand():
    # Attention of (3, 0, 0, 2): squares 9 and 4 over a length of sqrt(97); of the branch's two
    # channels (1, 0, 0, 0) and (0, 0, 0, 1): mean squares 1/2 and 1/2 over sqrt(1/2).
    own = torch.tensor([[[[3.0, 0.0], [0.0, 2.0]]]])
    refined = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]]])
    logits = torch.zeros(1, 2)

    method = FRSKDLoss(branch_weight=0.5)
    terms = method.reduced(logits, torch.tensor([0]), [own], logits, [refined])

    half = 0.5**0.5
    gaps = ((9 / 97**0.5 - half) ** 2 + (4 / 97**0.5 - half) ** 2) / 4
    expected = {"branch": 0.5 * 0.693147, "kd": 0.0, "attention": 100 * gaps}
    assert {name: pytest.approx(t.item(), rel=1e-5) for name, t in terms.items()} == expected


def test_who_learns_what():
    values = case()

    FRSKDLoss(branch_weight=0.0)(**values).backward()

    assert bool(values["logits"].grad.abs().sum() > 0)
    assert all(bool(own.grad.abs().sum() > 0) for own in values["maps"])
    assert not values["branch_logits"].grad.any()
    assert all(refined.grad is None for refined in values["branch_maps"])


def test_the_branch_itself_has_nothing_to_teach():
    values = case()
    logits = values["logits"].detach()
    # Attention knows no scale, and a mean of equal channels is one of them.
    wider = [torch.cat((own, own), 1) * 3 for own in values["maps"]]

    terms = FRSKDLoss().reduced(values["logits"], values["target"], values["maps"], logits, wider)

    assert terms["kd"].item() == pytest.approx(0, abs=1e-12)
    assert terms["attention"].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_half_precision_and_empty_maps_give_a_finite_float32_loss(scale):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(1, 4, 3, 3, generator=generator)
    own = (scale * drawn).half().requires_grad_()
    logits = torch.tensor([[3e4, -3e4, 0.0]]).half().requires_grad_()

    loss = FRSKDLoss()(logits, torch.tensor([1]), [own], -logits.detach(), [drawn.half()])
    loss.backward()

    assert loss.dtype == torch.float32
    assert bool(torch.isfinite(loss))
    assert bool(torch.isfinite(own.grad).all() & torch.isfinite(logits.grad).all())


@pytest.mark.parametrize(
    "shapes",
    [
        SHAPES,
        [(2, 4, 7, 5), (2, 6, 4, 3), (2, 6, 2, 2), (2, 8, 1, 1)],  # odd sides
        [(2, 4, 6, 6), (2, 5, 4, 4)],  # not halved
        [(2, 6, 4, 4), (2, 6, 4, 4), (2, 6, 4, 4)],  # a vision transformer's grids
        [(2, 4, 3, 3)],  # a single stage
    ],
)
def test_the_branch_refines_maps_of_any_sizes_and_is_trained_in_full(shapes):
    adapters = adapters_of(shapes)
    maps = maps_of(shapes)

    values = adapters({"maps": maps})

    assert tuple(values["branch_logits"].shape) == (shapes[0][0], 5)
    assert [tuple(refined.shape) for refined in values["branch_maps"]] == [
        (b, 2 * c, h, w) for b, c, h, w in shapes
    ]
    loss = FRSKDLoss()(torch.zeros(shapes[0][0], 5), torch.arange(shapes[0][0]), maps, **values)
    loss.backward()
    for name, parameter in adapters.named_parameters():
        assert parameter.grad is not None, name


def test_every_map_of_the_branch_sees_every_stage():
    # Changes of one stage reach all refined maps: down from the deepest, up from the shallowest.
    adapters = adapters_of(SHAPES).eval()
    with torch.no_grad():
        before = adapters({"maps": maps_of(SHAPES)})["branch_maps"]
        for level in range(3):
            maps = maps_of(SHAPES)
            maps[level] = maps[level] + 1
            after = adapters({"maps": maps})["branch_maps"]
            assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_settings_of_the_branch():
    narrow = adapters_of(SHAPES, branch_width=1, branch_depth=1)
    wide = adapters_of(SHAPES)

    refined = narrow({"maps": maps_of(SHAPES)})["branch_maps"]

    assert [m.shape[1] for m in refined] == [4, 6, 8]
    count = [sum(isinstance(m, nn.Conv2d) for m in h.modules()) for h in (narrow, wide)]
    # 9 of width 1: 3 + 2 lateral, 2 + 2 between; 4 fusions of 2 convolutions for each of depth.
    assert count == [9 + 4 * 2, 9 + 4 * 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"maps": []}, "maps must hold at least one feature map, got none"),
        ({"maps": [torch.zeros(3, 8, 2, 2)]}, "got 1 and 3 maps of 3 samples"),
        ({"branch_maps": [torch.zeros(3, 8, 2, 2)] * 3}, "must have the same height and width"),
        ({"branch_logits": torch.zeros(3, 4)}, "branch_logits must have the shape of logits"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        FRSKDLoss()(**{**case(), **changes})


def test_missing_values_and_wrong_settings():
    values = case()
    with pytest.raises(TypeError, match="branch_logits is missing"):
        FRSKDLoss()(values["logits"], values["target"], values["maps"])
    with pytest.raises(ValueError, match="branch_width must be finite, above 0, got 0"):
        FRSKDLoss(branch_width=0)
    with pytest.raises(ValueError, match="stages must name one or more"):
        FRSKDLoss(stages=())
