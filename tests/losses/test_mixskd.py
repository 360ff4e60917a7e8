"""MixSKD: published vectors, a computation by hand, and what its learned parts are trained by."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from shared.golden_vectors import assert_close, cases_of
from softlabels.losses.mixskd import MixSKDLoss

NUM_CLASSES = 5


def case(num_exits: int = 3, batch_size: int = 4, seed: int = 0) -> dict[str, object]:
    """Arguments of `terms` without those that adapters add; leaves get a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    def network() -> tuple[Tensor, list[Tensor], list[Tensor]]:
        count = num_exits - 1
        branches = [draw(batch_size, NUM_CLASSES) for _ in range(count)]
        branches += [draw(batch_size, 6, 2, 3) for _ in range(count)]
        return draw(batch_size, NUM_CLASSES), branches, [draw(batch_size, 6, 2, 3)]

    logits, branches, last_map = network()
    mixed_logits, mixed_branches, mixed_last_map = network()
    return {
        "logits": logits,
        "target": torch.arange(batch_size) % NUM_CLASSES,
        "branches": branches,
        "last_map": last_map,
        "mixed_logits": mixed_logits,
        "mixed_branches": mixed_branches,
        "mixed_last_map": mixed_last_map,
        "mixup_index": torch.arange(batch_size).flip(0),
        "mixup_weight": torch.linspace(0.2, 0.9, batch_size, dtype=torch.float64),
    }


def adapters_of(module: MixSKDLoss, values: dict[str, object]) -> nn.Module:
    shapes = {
        name: [tuple(v.shape) for v in value] if isinstance(value, list) else tuple(value.shape)
        for name, value in values.items()
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return module.build_adapters(shapes).double()


def complete(values: dict[str, object]) -> dict[str, object]:
    return {**values, **adapters_of(MixSKDLoss(), values)(values)}


def leaves(values: dict[str, object]) -> list[Tensor]:
    tensors = [t for v in values.values() for t in (v if isinstance(v, list) else [v])]
    return [tensor for tensor in tensors if tensor.is_leaf and tensor.requires_grad]


@pytest.mark.parametrize("golden", cases_of("mixskd"))
def test_published_vectors(golden):
    count, size = int(golden["num_exits"]), int(golden["batch"])
    logits = [golden[f"logits_{i}"].requires_grad_() for i in range(count)]
    maps = [golden[f"map_{i}"].requires_grad_() for i in range(count)]
    aggregate = [
        golden[f"aggregate_logits_{name}"].requires_grad_() for name in ("interpolated", "mixup")
    ]
    values: dict[str, object] = {
        "logits": logits[-1][:size],
        "target": golden["target"],
        "branches": [t[:size] for t in (*logits[:-1], *maps[:-1])],
        "last_map": [maps[-1][:size]],
        "mixed_logits": logits[-1][size:],
        "mixed_branches": [t[size:] for t in (*logits[:-1], *maps[:-1])],
        "mixed_last_map": [maps[-1][size:]],
        "mixup_index": golden["partner_index"],
        "mixup_weight": golden["mix_weight"].expand(size),
    }
    module = MixSKDLoss(temperature=float(golden["temperature"]), discriminators="joint")
    adapters = adapters_of(module, values)
    weights = [
        (f"discriminator_{i}_{kind}_{layer}", f"discriminators.{i}.{2 * layer}.{kind}")
        for i in range(count)
        for layer in (0, 1)
        for kind in ("weight", "bias")
    ]
    adapters.load_state_dict({path: golden[name] for name, path in weights}, strict=False)
    values = {**values, **adapters(values), "aggregate_logits": aggregate}

    loss, terms = module(**values), module.reduced(**values)

    total = loss + nn.functional.cross_entropy(logits[-1][:size], golden["target"])
    script = total - terms["mixed_label"]
    assert_close(total - loss + terms["branch"], golden["ce_term"])
    assert_close(terms["mixed_label"], golden["mixup_ce_term"])
    for name in ("mutual", "feature", "discriminator"):
        assert_close(terms[name], golden[f"{name}_term"])
    assert_close(script, golden["loss"])
    assert_close(total, golden["loss_with_mixup_ce"])
    inputs = {
        **{f"logits_{i}": t for i, t in enumerate(logits)},
        **{f"map_{i}": t for i, t in enumerate(maps)},
        "aggregate_logits_interpolated": aggregate[0],
        "aggregate_logits_mixup": aggregate[1],
        **{name: adapters.get_parameter(path) for name, path in weights},
    }
    for value, prefix in (
        (script, "grad_"),
        (total, "grad_with_mixup_ce_"),
        (terms["mutual"], "grad_mutual_"),
    ):
        found = torch.autograd.grad(
            value, [*inputs.values()], retain_graph=True, allow_unused=True, materialize_grads=True
        )
        gradients = dict(zip(inputs, found, strict=True))
        compared = [name for name in gradients if prefix + name in golden]
        assert set(compared) >= {"logits_0", "aggregate_logits_mixup"}
        for name in compared:
            assert_close(gradients[name], golden[prefix + name])


def test_by_hand():
    # One image, mixed with itself: interpolated values are its own. Softmax of its exit (1/2, 1/2),
    # of the mixed image's (1/4, 3/4), aggregates (1/2, 1/2) and (1/4, 3/4); label 0.
    even, skewed = torch.zeros(1, 2), torch.tensor([[0.0, math.log(3)]])
    ones, threes = torch.ones(1, 1, 1, 2), 3 * torch.ones(1, 1, 1, 2)

    terms = MixSKDLoss(temperature=1.0, mixed_label_weight=0.5).terms(
        even,
        torch.tensor([0]),
        [],
        [ones],
        skewed,
        [],
        [threes],
        torch.tensor([0]),
        torch.tensor([0.3]),
        [even, skewed],
        [torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])],
    )

    # Each to the other's aggregate: 1/4 ln(1/2) + 3/4 ln(3/2), and 1/2 ln 2 + 1/2 ln(2/3).
    mutual = 0.25 * math.log(0.5) + 0.75 * math.log(1.5) + 0.5 * math.log(4 / 3)
    # The four outputs are right by 3/4, 1/2, 1/2 and 1/2.
    told = (math.log(4 / 3) + 3 * math.log(2)) / 4
    expected = {
        "branch": 0.0,
        "mixed_label": 0.5 * (math.log(4) + math.log(2) + math.log(4)),
        "mutual": mutual,
        "feature": 4.0,
        "discriminator": told,
    }
    assert {name: pytest.approx(term.item()) for name, term in terms.items()} == expected


def test_a_mixed_image_gets_the_two_labels():
    values = complete(case(num_exits=1))

    with_labels = MixSKDLoss(mutual_weight=0.0, feature_weight=0.0, discriminator_weight=0.0)
    loss = with_labels(**values)

    expected = torch.zeros((), dtype=torch.float64)
    for logits in (values["mixed_logits"], *values["aggregate_logits"]):
        for row, (partner, share) in enumerate(
            zip(values["mixup_index"].tolist(), values["mixup_weight"].tolist(), strict=True)
        ):
            log_probabilities = logits[row].log_softmax(0)
            own, other = values["target"][row], values["target"][partner]
            mixed = share * log_probabilities[own] + (1 - share) * log_probabilities[other]
            expected = expected - mixed / 4
    torch.testing.assert_close(loss, expected)


def test_answers_that_mix_linearly_have_nothing_to_learn_from_each_other():
    values = case(num_exits=2)
    share = values["mixup_weight"]

    def mixed(tensor: Tensor) -> Tensor:
        own = share.view(-1, *[1] * (tensor.dim() - 1))
        return own * tensor + (1 - own) * tensor[values["mixup_index"]]

    values["mixed_logits"] = mixed(values["logits"])
    for name in ("branches", "last_map"):
        values[f"mixed_{name}"] = [mixed(tensor) for tensor in values[name]]
    values = complete(values)
    # The final exit learns from the aggregates.
    values["aggregate_logits"] = [values["mixed_logits"]] * 2

    terms = MixSKDLoss().reduced(**values)

    torch.testing.assert_close(terms["mutual"].item(), 0.0, rtol=0, atol=1e-12)
    torch.testing.assert_close(terms["feature"].item(), 0.0, rtol=0, atol=1e-12)


def test_every_learned_part_is_trained():
    values = case()
    module = MixSKDLoss()
    adapters = adapters_of(module, values)

    module(**{**values, **adapters(values)}).backward()

    for name, parameter in adapters.named_parameters():
        assert parameter.requires_grad
        assert bool(parameter.grad.abs().sum() > 0), name
    assert all(tensor.grad is not None for tensor in leaves(values))


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({"discriminators": "fixed"}, {"mixture", "classifier"}),
        ({"mixed_label_weight": 0.0}, {"discriminators"}),
        ({"discriminators": "fixed", "mixed_label_weight": 0.0}, set()),
    ],
)
def test_what_the_published_scripts_leave_untrained_is_fixed(settings, trained):
    adapters = adapters_of(MixSKDLoss(**settings), case())

    kept = {name.split(".")[0] for name, p in adapters.named_parameters() if p.requires_grad}

    assert kept == trained


def test_discriminators_pull_features_apart_or_together():
    gradients = {}
    for kind in ("adversarial", "joint"):
        values = case(num_exits=2)
        module = MixSKDLoss(discriminators=kind)
        adapters = adapters_of(module, values)
        term = module.terms(**{**values, **adapters(values)})["discriminator"]
        features = [values["last_map"][0], values["mixed_branches"][1]]
        own = adapters.get_parameter("discriminators.0.0.weight")
        gradients[kind] = (term.detach(), *torch.autograd.grad(term, [*features, own]))

    (value, *of_features, of_own), (same, *reversed_, same_own) = gradients.values()
    torch.testing.assert_close(value, same)
    torch.testing.assert_close(of_own, same_own)
    for one, other in zip(of_features, reversed_, strict=True):
        assert bool(one.abs().sum() > 0)
        torch.testing.assert_close(one, -other)


def test_half_precision_gives_a_finite_float32_loss():
    values = case(num_exits=2)
    halves = {
        name: [t.detach().half() for t in value]
        if isinstance(value, list)
        else (value.detach().half() if value.is_floating_point() else value)
        for name, value in values.items()
    }
    halves["logits"] = (1e4 * halves["logits"]).requires_grad_()
    halves["mixup_weight"] = values["mixup_weight"].float()
    module = MixSKDLoss()

    loss = module(**{**halves, **adapters_of(module, halves).float()(halves)})
    loss.backward()

    assert loss.dtype == torch.float32
    assert bool(torch.isfinite(loss))
    assert bool(torch.isfinite(halves["logits"].grad).all())


def test_a_batch_of_one_and_labels_as_probabilities():
    values = complete(case(batch_size=1))
    one_hot = nn.functional.one_hot(values["target"], NUM_CLASSES).double()

    loss = MixSKDLoss()(**values)

    assert bool(torch.isfinite(loss))
    torch.testing.assert_close(MixSKDLoss()(**{**values, "target": one_hot}), loss)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branches": [torch.zeros(4, 5)]}, "logits and a map of each exit, got 1"),
        ({"last_map": []}, r"got \[3, 2, 3, 3, 3\]"),
        ({"discriminator_logits": [torch.zeros(8, 2)]}, r"got \[3, 3, 3, 3, 1\]"),
        ({"logits": torch.zeros(4, 6)}, "logits of exit 0 for own images must have the shape"),
        ({"mixed_last_map": [torch.zeros(4, 6, 2, 2)]}, "maps of exit 2 must be"),
        ({"discriminator_logits": [torch.zeros(4, 2)] * 3}, r"must be \[8, 2\], got \(4, 2\)"),
        ({"aggregate_logits": [torch.zeros(4, 5)]}, "must hold two tensors, got 1"),
        ({"aggregate_logits": [torch.zeros(4, 6)] * 2}, "must have the shape of logits"),
        ({"mixup_index": torch.tensor([0, 1, 2, 4])}, r"must lie in \[0, 4\), got"),
        ({"mixup_weight": torch.tensor([0.5])}, r"mixup_weight must be \[4\], got \(1,\)"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        MixSKDLoss()(**{**complete(case()), **changes})


def test_more_errors():
    with pytest.raises(TypeError, match="mixup_index must hold positions"):
        MixSKDLoss()(**{**complete(case()), "mixup_index": torch.zeros(4)})
    with pytest.raises(TypeError, match="aggregate_logits is missing"):
        MixSKDLoss()(**case())
    with pytest.raises(ValueError, match="discriminators must be one of"):
        MixSKDLoss(discriminators="none")
    with pytest.raises(ValueError, match="stages must name one or more"):
        MixSKDLoss(stages=())


def test_mixed_images_are_read_at_the_same_exits():
    inputs = MixSKDLoss(stages=("stage1",)).inputs

    assert inputs["branches"] == inputs["mixed_branches"].of
    assert inputs["branches"].stages == ("stage1",)
