"""No finite input gives a NaN, in value or gradient, and corner cases have their right answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from shared.loss_cases import (
    BY_NAME,
    CASES,
    CASES_AND_INDICES,
    CASES_AND_KINDS,
    INDICES,
    case_id,
    gradients,
)
from softlabels.losses import (
    NKDLoss,
    kd_loss,
    nkd_loss,
    uskd_loss,
    uskd_targets,
    zipf_ls_loss,
    zipf_ls_targets,
)

IGNORING = [case for case in CASES if "ignore_index" in case.settings]
RANDOM = ("random_uniform", "random_gaussian", "random_pareto", "sorted_pareto")

every_case_and_kind = pytest.mark.parametrize(("case", "kind"), CASES_AND_KINDS, ids=case_id)
every_case_once = pytest.mark.parametrize(("case", "kind"), CASES_AND_INDICES, ids=case_id)
every_draw = pytest.mark.parametrize("distribution", RANDOM)


def refuse_nan(tensor: Tensor) -> None:
    assert not bool(tensor.isnan().any())


def outcomes(case, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The loss and its gradients, and the same by the sum of the terms."""
    loss, found = gradients(case, inputs)
    leaves = {
        name: tensor.detach().clone().requires_grad_() if name in case.trained else tensor
        for name, tensor in inputs.items()
    }
    total = sum(case.terms(leaves).values())
    names = case.trained
    of_parts = torch.autograd.grad(total, [leaves[n] for n in names])
    return [loss, *found.values(), total.detach(), *of_parts]


def check_finite(case, inputs: dict[str, Tensor]) -> None:
    for tensor in outcomes(case, inputs):
        assert bool(torch.isfinite(tensor).all())


@every_case_once
@given(data=st.data())
def test_no_finite_float32_logits_give_a_nan(case, kind, data):
    shape = (data.draw(st.integers(1, 3)), data.draw(st.integers(2, 4)))
    extremes = st.sampled_from([3.4e38, -3.4e38, 1e-45, -1e-45, 1.2e-38, 0.0, -0.0, 88.8, 104.0])
    floats = st.one_of(st.floats(width=32, allow_nan=False, allow_infinity=False), extremes)
    inputs = case.make(kind, *shape)
    for name in case.inputs:
        if "logits" in name:
            drawn = data.draw(hnp.arrays(np.float32, shape, elements=floats))
            inputs[name] = torch.from_numpy(drawn)

    for tensor in outcomes(case, inputs):
        refuse_nan(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@every_case_and_kind
def test_a_certain_teacher_student_and_weak_head_are_finite(case, kind, dtype):
    for num_classes in (2, 5):
        for certain in range(num_classes):
            inputs = case.make(kind, 3, num_classes, dtype)
            for number, name in enumerate(name for name in case.inputs if "logits" in name):
                row = torch.full((num_classes,), -200.0)
                row[(certain + number) % num_classes] = 200.0  # one-hot to float precision
                inputs[name] = row.expand(3, -1).to(dtype)
            check_finite(case, inputs)


@every_case_and_kind
def test_subnormal_probabilities_are_finite(case, kind):
    inputs = case.make(kind, 3, 5)
    for number, name in enumerate(name for name in case.inputs if "logits" in name):
        spaced = torch.tensor([0.0, -88.0, -95.0, -103.0, -104.0])  # e^-88 and less, below tiny
        inputs[name] = spaced.roll(number).expand(3, -1).clone()

    check_finite(case, inputs)


@every_case_and_kind
def test_tied_logits_and_equal_labels_are_finite(case, kind):
    for num_classes in (2, 5):
        for value in (0.0, -1e4, 7.5):
            inputs = case.make(kind, 3, num_classes)
            for name in case.inputs:
                if "logits" in name:
                    inputs[name] = torch.full((3, num_classes), value)
                elif name == "target":
                    inputs[name] = inputs[name][:1].expand(3, *inputs[name].shape[1:]).clone()
            check_finite(case, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e4, 1e30])
@pytest.mark.parametrize(
    "name", ["nkd", "nkd_all_labels", "uskd", "uskd_teacher", "zipf_ls_logits"]
)
def test_two_classes_with_two_labels_are_finite(name, scale, dtype):
    case = BY_NAME[name]
    for signs in ([1.0, -1.0], [-1.0, 1.0], [1.0, 1.0], [0.0, 0.0]):
        inputs = case.make(INDICES, 2, 2, dtype)
        inputs["target"] = torch.tensor([[0.7, 0.3], [0.5, 0.5]], dtype=dtype)
        for other in case.inputs:
            if "logits" in other:
                inputs[other] = scale * torch.tensor([signs, signs[::-1]], dtype=dtype)
        check_finite(case, inputs)


@pytest.mark.parametrize("case", IGNORING, ids=case_id)
def test_ignored_rows_leave_the_loss_of_the_others(case):
    inputs = case.make(INDICES, 7, dtype=torch.float64)
    kept = case.kept(inputs)
    assert 0 < int(kept.sum()) < 7
    alone = {name: tensor[kept] for name, tensor in inputs.items()}

    for reduction in ("mean", "sum"):
        loss, found = gradients(case, inputs, reduction=reduction)
        expected, expected_gradients = gradients(case, alone, reduction=reduction)

        torch.testing.assert_close(loss, expected)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient[kept], expected_gradients[name])
            assert not gradient[~kept].any()


@pytest.mark.parametrize("case", IGNORING, ids=case_id)
def test_ignored_rows_may_hold_anything_finite(case):
    inputs = case.make(INDICES, 7)
    ignored = ~case.kept(inputs)
    expected, expected_gradients = gradients(case, inputs)
    for name in case.inputs:
        if "logits" in name:
            inputs[name][ignored] = torch.tensor([3e38, -3e38, 3e38, 0.0, 1.0, -3e38])

    loss, found = gradients(case, inputs)

    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", IGNORING, ids=case_id)
def test_a_batch_of_ignored_rows_has_a_loss_of_zero_and_no_gradient(case, reduction):
    inputs = case.make(INDICES, 3)
    inputs["target"] = torch.full((3,), case.settings["ignore_index"])

    loss, found = gradients(case, inputs, reduction=reduction)

    assert not loss.any()
    for gradient in found.values():
        assert not gradient.any()


def test_a_class_that_exists_may_be_ignored():
    case = BY_NAME["nkd"]
    inputs = case.make(INDICES, 5, dtype=torch.float64)
    inputs["target"] = torch.tensor([0, 1, 2, 0, 1])

    none = case(inputs, reduction="none")
    mean = case(inputs, ignore_index=0)

    torch.testing.assert_close(mean, none[[1, 2, 4]].mean())


def test_correct_only_without_a_correct_sample_is_zero_without_gradient():
    logits = torch.eye(3, requires_grad=True)

    loss = zipf_ls_loss(logits, torch.tensor([1, 2, 0]), correct_only=True)
    loss.backward()

    assert float(loss.detach()) == 0
    assert not logits.grad.any()


def test_a_certain_teacher_teaches_cross_entropy():
    """T is one-hot: T1 is the cross-entropy, T2 nothing, and the non-target term is even."""
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).double()
    target = torch.tensor([0, 3, 1])
    teacher = torch.zeros(3, 5).double().scatter(1, target.unsqueeze(1), 1e4)

    parts = NKDLoss(target_term="both").reduced(logits, teacher, target)

    torch.testing.assert_close(parts["target"], torch.nn.functional.cross_entropy(logits, target))
    assert float(parts["rest"]) == 0
    others = logits.scatter(1, target.unsqueeze(1), -torch.inf).log_softmax(1)
    even = others.masked_fill(others == -torch.inf, 0.0).sum(1).mean() / 4
    torch.testing.assert_close(parts["non_target"], -1.5 * even)


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 1e3, 1e6])
def test_extreme_temperatures_are_finite(temperature):
    logits = torch.tensor([[1e4, -1e4, 3.0, 0.0], [0.0, 0.0, 1e-3, -2.0]])
    teacher, target = logits.flip(1), torch.tensor([0, 3])
    for loss in (
        lambda x: kd_loss(x, teacher, temperature=temperature),
        lambda x: nkd_loss(x, teacher, target, temperature=temperature),
        lambda x: NKDLoss(temperature=temperature, target_term="both")(x, teacher, target),
        lambda x: nkd_loss(
            x, teacher, target, temperature=temperature, non_target_term="unnormalized"
        ),
    ):
        leaf = logits.clone().requires_grad_()
        value = loss(leaf)
        value.backward()

        assert bool(torch.isfinite(value))
        assert bool(torch.isfinite(leaf.grad).all())


# Distributions that draw


@every_draw
@pytest.mark.parametrize("votes", [None, torch.tensor([[0, 1, 1, 4], [2, 2, 2, 2]])])
def test_draws_are_distributions_that_torchs_seed_repeats(distribution, votes):
    logits, target = torch.randn(2, 6), torch.tensor([0, 5])

    def soft(seed: int | None = None) -> Tensor:
        if seed is not None:
            torch.manual_seed(seed)
        return zipf_ls_targets(logits, target, votes, distribution=distribution)

    one, following, again, other = soft(3), soft(), soft(3), soft(4)

    torch.testing.assert_close(again, one, rtol=0, atol=0)
    assert not torch.equal(following, one)
    assert not torch.equal(other, one)
    torch.testing.assert_close(one.sum(1), torch.ones(2))
    assert one[0, 0] == one[1, 5] == 0
    assert int((one > 0).sum()) == 10


def test_sorted_draws_follow_the_ranks_and_ties_share_them():
    votes = torch.tensor([[0, 0, 0, 1, 1, 2], [5, 5, 5, 4, 3, 3]])
    logits, target = torch.zeros(2, 8, dtype=torch.float64), torch.tensor([7, 7])
    torch.manual_seed(0)
    for _ in range(20):
        soft = zipf_ls_targets(logits, target, votes, distribution="sorted_pareto")

        assert soft[0, 0] > soft[0, 1] > soft[0, 2] > soft[0, 3]
        assert soft[1, 5] > soft[1, 3] > soft[1, 4] > soft[1, 0]
        assert len({float(value) for value in soft[0, 3:7]}) == 1


def test_sorted_draws_follow_the_logits_in_every_row():
    torch.manual_seed(1)
    logits = torch.randn(50, 9, dtype=torch.float64)
    target = torch.arange(50) % 9

    soft = zipf_ls_targets(logits, target, distribution="sorted_pareto")

    kept = torch.ones(50, 9, dtype=torch.bool).scatter(1, target.unsqueeze(1), False)
    for row in range(50):
        left = soft[row][kept[row]]
        by_logit = logits[row][kept[row]].argsort(descending=True)
        assert left[by_logit].diff().le(0).all()


@pytest.mark.parametrize(
    ("distribution", "mean"), [("random_uniform", 0.5), ("random_gaussian", 0.7979)]
)
def test_draws_have_the_law_of_their_name(distribution, mean):
    # The ratio of mean and root mean square is that of the law, whatever the normalization.
    torch.manual_seed(0)
    soft = zipf_ls_targets(torch.zeros(1, 200_001), torch.tensor([0]), distribution=distribution)[
        0, 1:
    ]

    square = {"random_uniform": 1 / 3, "random_gaussian": 1.0}[distribution]
    assert float(soft.mean() / soft.square().mean().sqrt()) == pytest.approx(
        mean / square**0.5, rel=1e-2
    )


@pytest.mark.parametrize("distribution", ["random_pareto", "sorted_pareto"])
def test_pareto_draws_have_a_median_of_one_quarter_of_their_upper_decile_over_nine(distribution):
    # Quantiles of u / (1 - u): 1 at 0.5, 9 at 0.9.
    torch.manual_seed(0)
    logits = torch.arange(100_001, dtype=torch.float64).unsqueeze(0)
    soft = zipf_ls_targets(logits, torch.tensor([0]), distribution=distribution)[0, 1:]

    quantiles = soft.quantile(torch.tensor([0.5, 0.9], dtype=torch.float64))
    assert float(quantiles[1] / quantiles[0]) == pytest.approx(9, rel=5e-2)


# USKD's batch mean and ranks


def test_signed_zeros_and_negative_scores_rank_as_their_values():
    logits = torch.tensor([[0.0, -0.0, -2.0, 1.0, -1e-45, 1e-45, -3e38, 3e38]])
    target = torch.tensor([6])

    soft = uskd_targets(logits, None, target, rank_from="final").non_target[0]

    order = soft[:6].argsort(descending=True).tolist()
    assert float(soft.max()) == float(soft[7])
    assert order == [3, 5, 0, 1, 4, 2]


@pytest.mark.parametrize("squared", [True, False])
def test_a_single_sample_or_equal_samples_have_their_labels_as_targets(squared):
    logits = torch.tensor([[2.0, 0.5, -1.0]]).double()
    for count in (1, 4):
        target = torch.ones(count, dtype=torch.int64)
        batch = logits.repeat(count, 1)
        soft = uskd_targets(batch, None, target, squared=squared, rank_from="final")
        loss = uskd_loss(batch, None, target, squared=squared, non_target_weight=0, weak_weight=0)

        torch.testing.assert_close(soft.target[:, 1], torch.ones(count).double())
        torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(batch, target))


@pytest.mark.parametrize("votes", [None, torch.tensor([[0, 0, 1, 3], [2, 2, 2, 0]])])
@pytest.mark.parametrize(
    "settings",
    [
        {"distribution": "unbiased_zipf", "power": 30.0},
        {"distribution": "unbiased_zipf", "power": 30.0, "lower_bound": 1e-6},
        {"distribution": "unbiased_zipf", "power": 0.01},
        {"distribution": "exponential_decay", "decay": 30.0},
        {"distribution": "zipf", "power": 30.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("target", [[0, 2], [4, 1]], ids=["top", "elsewhere"])
def test_a_steep_law_leaves_a_distribution_wherever_the_target_ranks(settings, votes, target):
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 4.0, 3.0, 2.0]])

    soft = zipf_ls_targets(logits, torch.tensor(target), votes, **settings)

    torch.testing.assert_close(soft.sum(1), torch.ones(2))
    best = soft.max(1).values
    assert bool((best >= 1 / 4).all())
    if settings.get("power", 30.0) == 30.0 and votes is None:
        assert bool((best > 0.999).all())
