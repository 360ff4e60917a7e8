"""Laws that hold for every input, on drawn float64 inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from shared.draws import STEP, Batch, batches, ranks_are_clear
from shared.slow_reference import rank_scores
from softlabels.losses import (
    LabelSmoothingLoss,
    Method,
    NKDLoss,
    USKDLoss,
    ZipfLSLoss,
    kd_loss,
    label_smoothing_loss,
    nkd_loss,
    uskd_loss,
    uskd_targets,
    zipf_ls_loss,
    zipf_ls_targets,
)

USKD_WEIGHTS = {"target_weight": 0.9, "non_target_weight": 0.8, "weak_weight": 0.7}

# Name -> the [B] losses of a drawn batch.
LOSSES: dict[str, Callable[[Batch], Tensor]] = {
    "nkd": lambda b: nkd_loss(b.logits, b.other_logits, b.target, reduction="none"),
    "nkd_all_labels": lambda b: nkd_loss(
        b.logits, b.other_logits, b.target, mixed_target="all", temperature=3.0, reduction="none"
    ),
    "kd": lambda b: kd_loss(b.logits, b.other_logits, reduction="none"),
    "uskd_probability": lambda b: uskd_loss(
        b.logits, b.other_logits, b.target, **USKD_WEIGHTS, reduction="none"
    ),
    "uskd_log_probability": lambda b: uskd_loss(
        b.logits,
        b.other_logits,
        b.target,
        **USKD_WEIGHTS,
        rank_by="log_probability",
        reduction="none",
    ),
    "zipf_ls_votes": lambda b: zipf_ls_loss(b.logits, b.target, b.votes, reduction="none"),
    "zipf_ls_logits": lambda b: zipf_ls_loss(b.logits, b.target, reduction="none"),
    "zipf_ls_all_labels": lambda b: zipf_ls_loss(
        b.logits, b.target, b.votes, mixed_target="all", power=0.5, reduction="none"
    ),
    "label_smoothing": lambda b: label_smoothing_loss(b.logits, b.target, reduction="none"),
    "label_smoothing_non_target": lambda b: label_smoothing_loss(
        b.logits, b.target, smooth_over="non_target", reduction="none"
    ),
}

every_loss = pytest.mark.parametrize("name", LOSSES)
both_rankings = pytest.mark.parametrize("rank_by", ["probability", "log_probability"])
shifts = st.lists(st.integers(-1600, 1600), min_size=10, max_size=10)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


def assume_clear(name: str, batch: Batch) -> None:
    if name.startswith("uskd"):
        assume(ranks_are_clear(batch, name.removeprefix("uskd_"), gap=1e-7))


def gradient(loss: Callable[..., Tensor], logits: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_()
    loss(leaf).backward()
    assert leaf.grad is not None
    return leaf.grad


def largest(batch: Batch) -> Tensor:
    """The target class of each row, by torch: the largest label."""
    return batch.labels.argmax(1)


# Symmetries


@every_loss
@given(batch=batches(), steps=shifts)
def test_a_constant_added_to_a_row_of_logits_changes_nothing(name, batch, steps):
    assume_clear(name, batch)
    batch_size = batch.logits.shape[0]
    constants = torch.tensor(steps, dtype=torch.float64).reshape(2, 5, 1)[:, :batch_size] * STEP

    shifted = batch._replace(
        logits=batch.logits + constants[0], other_logits=batch.other_logits + constants[1]
    )

    assert_close(LOSSES[name](shifted), LOSSES[name](batch))


@every_loss
@given(batch=batches(), data=st.data())
def test_the_order_of_samples_does_not_matter(name, batch, data):
    assume_clear(name, batch)
    order = data.draw(st.permutations(range(batch.logits.shape[0])))

    permuted = Batch(*(tensor[order] for tensor in batch))

    assert_close(LOSSES[name](permuted), LOSSES[name](batch)[order])


@every_loss
@given(batch=batches(distinct=True), data=st.data())
def test_the_order_of_classes_does_not_matter_without_ties(name, batch, data):
    assume_clear(name, batch)
    order = data.draw(st.permutations(range(batch.logits.shape[1])))
    new_index = torch.tensor(order).argsort()

    permuted = Batch(
        batch.logits[:, order],
        batch.other_logits[:, order],
        batch.target[:, order] if batch.target.dim() == 2 else new_index[batch.target],
        batch.labels[:, order],
        new_index[batch.votes],
    )

    assert_close(LOSSES[name](permuted), LOSSES[name](batch))


@given(batch=batches(), data=st.data())
def test_the_order_of_votes_does_not_matter(batch, data):
    order = data.draw(st.permutations(range(batch.votes.shape[1])))

    permuted = zipf_ls_targets(batch.logits, batch.target, batch.votes[:, order])

    assert_close(permuted, zipf_ls_targets(batch.logits, batch.target, batch.votes))


@given(batch=batches(most_labels=7))
def test_zipf_ls_from_logits_equals_votes_that_count_the_classes_beaten(batch):
    from_logits = zipf_ls_targets(batch.logits, batch.target)

    for row, values in enumerate(batch.logits.tolist()):
        votes = list(range(len(values)))  # one for each class, which changes no rank
        for index, value in enumerate(values):
            votes += [index] * sum(value > other for other in values)
        one = slice(row, row + 1)
        from_votes = zipf_ls_targets(batch.logits[one], batch.target[one], torch.tensor([votes]))
        assert_close(from_votes, from_logits[one])


# Terms and weights


@given(batch=batches(most_labels=7), temperature=st.sampled_from([1.0, 3.0]))
def test_nkd_without_weight_is_its_target_term(batch, temperature):
    value = nkd_loss(
        batch.logits,
        batch.other_logits,
        batch.target,
        non_target_weight=0,
        temperature=temperature,
        reduction="none",
    )

    rows = torch.arange(len(value))
    student = batch.logits.log_softmax(1)[rows, largest(batch)]
    teacher = batch.other_logits.softmax(1)[rows, largest(batch)]
    assert_close(value, -teacher * student)


@both_rankings
@given(batch=batches(), weights=st.lists(st.sampled_from([0.3, 1.0, 2.0]), min_size=3, max_size=3))
def test_uskd_is_the_weighted_sum_of_three_terms(rank_by, batch, weights):
    names = ("target_weight", "non_target_weight", "weak_weight")

    def value(*given_weights: float) -> Tensor:
        settings = dict(zip(names, given_weights, strict=True))
        return uskd_loss(
            batch.logits, batch.other_logits, batch.target, **settings, rank_by=rank_by
        )

    terms = torch.stack([value(1, 0, 0), value(0, 1, 0), value(0, 0, 1)])

    assert_close(value(*weights), (torch.tensor(weights, dtype=torch.float64) * terms).sum())
    assert float(value(0, 0, 0)) == 0


@given(batch=batches())
def test_a_zero_weight_takes_its_gradient_away(batch):
    logits, weak_logits, target = batch.logits, batch.other_logits, batch.target
    of_final = partial(
        uskd_loss, weak_logits=weak_logits, target=target, target_weight=0, non_target_weight=0
    )

    assert not gradient(of_final, logits).any()
    leaves = logits.clone().requires_grad_(), weak_logits.clone().requires_grad_()
    value = uskd_loss(*leaves, target, weak_weight=0)
    _, of_weak_logits = torch.autograd.grad(value, leaves)
    assert not of_weak_logits.any()  # there, as DDP wants of every parameter, but 0


@given(batch=batches())
def test_the_weak_head_alone_is_label_smoothing(batch):
    value = uskd_loss(
        batch.logits,
        batch.other_logits,
        batch.target,
        target_weight=0,
        non_target_weight=0,
        weak_weight=1,
    )

    assert_close(value, label_smoothing_loss(batch.other_logits, batch.target))


@given(batch=batches(most_labels=7))
def test_label_smoothing_of_zero_is_cross_entropy(batch):
    expected = torch.nn.functional.cross_entropy(batch.logits, batch.target)

    for smooth_over in ("all", "non_target"):
        value = label_smoothing_loss(
            batch.logits, batch.target, smoothing=0, smooth_over=smooth_over
        )
        assert_close(value, expected)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@given(batch=batches())
def test_kd_is_a_divergence(temperature, batch):
    settings = {"temperature": temperature, "reduction": "none"}

    values = kd_loss(batch.logits, batch.other_logits, **settings)

    assert bool((values > -1e-9).all())
    assert_close(kd_loss(batch.logits, batch.logits, **settings), torch.zeros_like(values))


@given(batch=batches(most_labels=7))
def test_zipf_ls_is_a_divergence(batch):
    values = zipf_ls_loss(batch.logits, batch.target, batch.votes, reduction="none")
    soft = zipf_ls_targets(batch.logits, batch.target, batch.votes)

    assert bool((values > -1e-9).all())
    # A student that predicts the soft labels has no loss, whatever its target logit.
    fitted = zipf_ls_loss(soft.clamp(min=1e-300).log(), batch.target, batch.votes)
    assert float(fitted) == pytest.approx(0, abs=1e-9)


# Teacher, student and the parts of KD


@pytest.mark.parametrize("mixed_target", ["largest", "all"])
@given(batch=batches(), temperature=st.sampled_from([0.5, 1.0, 3.0]))
def test_nkd_has_no_non_target_gradient_if_the_teacher_is_the_student(
    mixed_target, batch, temperature
):
    def loss(logits: Tensor, weight: float) -> Tensor:
        return nkd_loss(
            logits,
            batch.logits,
            batch.target,
            temperature=temperature,
            non_target_weight=weight,
            mixed_target=mixed_target,
        )

    with_term = gradient(partial(loss, weight=5.0), batch.logits)
    without_term = gradient(partial(loss, weight=0.0), batch.logits)

    assert_close(with_term, without_term)


@given(batch=batches(), steps=st.integers(-160, 160))
def test_the_target_logit_has_no_influence_on_nkds_non_target_term(batch, steps):
    rows = torch.arange(batch.logits.shape[0])

    def term(logits: Tensor, teacher_logits: Tensor) -> Tensor:
        settings = {"temperature": 2.0, "reduction": "none"}
        both = nkd_loss(logits, teacher_logits, batch.target, non_target_weight=1, **settings)
        one = nkd_loss(logits, teacher_logits, batch.target, non_target_weight=0, **settings)
        return both - one

    changed, changed_teacher = batch.logits.clone(), batch.other_logits.clone()
    changed[rows, largest(batch)] += steps * STEP
    changed_teacher[rows, largest(batch)] -= steps * STEP

    expected = term(batch.logits, batch.other_logits)
    assert_close(term(changed, batch.other_logits), expected)
    assert_close(term(batch.logits, changed_teacher), expected)


@given(batch=batches(), steps=st.integers(-160, 160))
def test_the_target_logit_has_no_influence_on_zipf_ls_by_votes(batch, steps):
    changed = batch.logits.clone()
    changed[torch.arange(changed.shape[0]), largest(batch)] += steps * STEP
    loss = partial(zipf_ls_loss, target=batch.target, votes=batch.votes, reduction="none")

    assert_close(loss(changed), loss(batch.logits))


@pytest.mark.parametrize("name", ["uskd", "zipf_ls_votes", "zipf_ls_logits"])
@given(batch=batches())
def test_the_target_logit_gets_no_gradient_from_a_non_target_term(name, batch):
    loss = {
        "uskd": lambda logits: uskd_loss(
            logits, batch.other_logits, batch.target, target_weight=0, weak_weight=0
        ),
        "zipf_ls_votes": lambda logits: zipf_ls_loss(
            logits, batch.target, batch.votes, mixed_target="all"
        ),
        "zipf_ls_logits": lambda logits: zipf_ls_loss(logits, batch.target, mixed_target="all"),
    }[name]

    found = gradient(loss, batch.logits)

    assert not found[batch.labels > 0].any()
    assert_close(found.sum(1), torch.zeros(len(found), dtype=torch.float64))


@given(batch=batches())
def test_kd_in_cross_entropy_form_is_target_binary_and_non_target_parts(batch):
    """-sum T log S = -T_t log S_t - (1 - T_t) log(1 - S_t) - (1 - T_t) sum N(T) log N(S)."""
    logits, teacher_logits = batch.logits, batch.other_logits
    target = largest(batch)

    def nkd(weight: float) -> Tensor:
        return nkd_loss(logits, teacher_logits, target, non_target_weight=weight, reduction="none")

    target_part = nkd(0)
    non_target_part = nkd(1) - nkd(0)
    rest = torch.ones_like(logits, dtype=torch.bool).scatter(1, target.unsqueeze(1), False)
    log_rest = logits.masked_fill(~rest, -math.inf).logsumexp(1) - logits.logsumexp(1)
    teacher = teacher_logits.softmax(1)
    teacher_rest = teacher.masked_fill(~rest, 0).sum(1)

    entropy = -(teacher * teacher_logits.log_softmax(1)).sum(1)
    cross_entropy = kd_loss(logits, teacher_logits, temperature=1.0, reduction="none") + entropy

    binary_part = -teacher_rest * log_rest
    assert_close(cross_entropy, target_part + binary_part + teacher_rest * non_target_part)


# Soft labels


@both_rankings
@given(batch=batches())
def test_uskds_soft_labels_lie_where_they_belong_and_follow_the_ranks(rank_by, batch):
    assume(ranks_are_clear(batch, rank_by))
    labeled = batch.labels > 0

    soft = uskd_targets(batch.logits, batch.other_logits, batch.target, rank_by=rank_by)

    assert not soft.target[~labeled].any()
    assert not soft.non_target[labeled].any()
    assert bool((soft.non_target[~labeled] > 0).all())
    expected_sums = (~labeled).any(1).double()
    assert_close(soft.non_target.sum(1), expected_sums)
    for row in range(len(labeled)):
        scores = rank_scores(
            batch.logits[row].tolist(),
            batch.other_logits[row].tolist(),
            batch.labels[row].tolist(),
            rank_by,
        )
        free = [index for index in range(len(scores)) if not labeled[row, index]]
        by_score = sorted(free, key=lambda index: (-scores[index], index))
        by_label = sorted(free, key=lambda index: -float(soft.non_target[row, index]))
        assert by_score == by_label


@given(batch=batches())
def test_uskds_target_labels_average_to_the_labels(batch):
    """The batch mean that equation 6 takes off is the mean of what it adds."""
    soft = uskd_targets(batch.logits, batch.other_logits, batch.target).target

    assert_close(soft.sum(), batch.labels.sum())


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("rank_from", ["votes", "logits"])
@given(batch=batches(most_labels=7))
def test_zipfs_soft_labels_sum_to_one_and_follow_the_ranks(rank_from, power, batch):
    votes = batch.votes if rank_from == "votes" else None

    soft = zipf_ls_targets(batch.logits, batch.target, votes, power=power)

    assert_close(soft.sum(1), torch.ones(len(soft), dtype=torch.float64))
    for row, target in enumerate(largest(batch).tolist()):
        assert float(soft[row, target]) == 0
        if votes is None:
            scores = batch.logits[row].tolist()
        else:
            scores = [int((votes[row] == index).sum()) for index in range(soft.shape[1])]
        free = [index for index in range(len(scores)) if index != target]
        for i in free:
            for j in free:
                if scores[i] == scores[j]:
                    assert float(soft[row, i]) == float(soft[row, j])
                elif scores[i] > scores[j]:
                    assert float(soft[row, i]) > float(soft[row, j])


@given(batch=batches(most_labels=7))
def test_a_power_of_zero_gives_uniform_soft_labels(batch):
    soft = zipf_ls_targets(batch.logits, batch.target, batch.votes, power=0)

    num_classes = soft.shape[1]
    expected = torch.full_like(soft, 1 / (num_classes - 1))
    assert_close(soft, expected.scatter(1, largest(batch).unsqueeze(1), 0.0))


# Identities between the methods (spec 1.2 to 1.5)


def entropy(log_probabilities: Tensor) -> Tensor:
    return -(log_probabilities.exp() * log_probabilities).sum(1)


def binary(logits: Tensor, target: Tensor) -> Tensor:
    """log S_t and log(1 - S_t) as columns."""
    rows = torch.arange(len(target))
    rest = logits.scatter(1, target.unsqueeze(1), -math.inf).logsumexp(1)
    return torch.stack((logits[rows, target], rest), 1) - logits.logsumexp(1, keepdim=True)


@given(batch=batches())
def test_nkd_with_all_of_both_terms_is_kd_in_cross_entropy_form(batch):
    target = largest(batch)
    kd = kd_loss(batch.logits, batch.other_logits, temperature=1.0, reduction="none")

    value = nkd_loss(
        batch.logits,
        batch.other_logits,
        target,
        target_term="T1",
        non_target_term="unnormalized",
        non_target_weight=1,
        reduction="none",
    )

    assert_close(value, kd + entropy(batch.other_logits.log_softmax(1)))


@given(batch=batches())
def test_kd_is_nkds_target_terms_and_the_teachers_share_of_the_non_target_term(batch):
    target = largest(batch)
    teacher_rest = binary(batch.other_logits, target)[:, 1].exp()
    kd = kd_loss(batch.logits, batch.other_logits, temperature=1.0, reduction="none")

    method = NKDLoss(target_term="both", non_target_weight=1, reduction="none")
    parts = method.reduced(batch.logits, batch.other_logits, target)

    total = parts["target"] + parts["rest"] + teacher_rest * parts["non_target"]
    assert_close(total, kd + entropy(batch.other_logits.log_softmax(1)))


@given(batch=batches())
def test_unnormalized_is_t2_and_the_teachers_share_of_the_normalized_term(batch):
    target = largest(batch)
    common = {"target_term": "both", "non_target_weight": 1, "reduction": "none"}
    inputs = batch.logits, batch.other_logits, target
    teacher_rest = binary(batch.other_logits, target)[:, 1].exp()

    plain = NKDLoss(**common).reduced(*inputs)
    unnormalized = NKDLoss(**common, non_target_term="unnormalized").reduced(*inputs)

    assert_close(unnormalized["non_target"], plain["rest"] + teacher_rest * plain["non_target"])


@given(batch=batches())
def test_nkds_both_target_terms_are_dkds_up_to_the_teachers_binary_entropy(batch):
    target = largest(batch)
    student, teacher = binary(batch.logits, target), binary(batch.other_logits, target)
    tckd = (teacher.exp() * (teacher - student)).sum(1)

    value = nkd_loss(
        batch.logits,
        batch.other_logits,
        target,
        target_term="both",
        non_target_weight=0,
        reduction="none",
    )

    assert_close(value, tckd + entropy(teacher))


@given(batch=batches(min_classes=3))
def test_nkds_non_target_term_is_dkds_up_to_the_teachers_non_target_entropy(batch):
    target = largest(batch)
    kept = torch.ones_like(batch.logits, dtype=torch.bool)
    kept.scatter_(1, target.unsqueeze(1), False)

    def without_target(logits: Tensor) -> Tensor:
        return logits[kept].reshape(len(logits), -1).log_softmax(1)

    student, teacher = without_target(batch.logits), without_target(batch.other_logits)
    nckd = (teacher.exp() * (teacher - student)).sum(1)

    method = NKDLoss(non_target_weight=1, reduction="none")
    parts = method.reduced(batch.logits, batch.other_logits, target)

    assert_close(parts["non_target"], nckd + entropy(teacher))


@given(batch=batches(most_labels=1))
def test_tf_nkd_weighs_cross_entropy_by_the_centered_confidence(batch):
    target = largest(batch)
    rows = torch.arange(len(target))
    log_s = batch.logits.log_softmax(1)[rows, target]
    weight = log_s.exp() + 1 - log_s.exp().mean()
    leaf = batch.logits.clone().requires_grad_()

    value = uskd_loss(
        leaf, None, target, squared=False, non_target_weight=0, weak_weight=0, reduction="none"
    )
    value.sum().backward()

    assert_close(value, -weight * log_s)
    one_hot = torch.nn.functional.one_hot(target, leaf.shape[1])
    assert_close(leaf.grad, weight.unsqueeze(1) * (batch.logits.softmax(1) - one_hot))


# Terms


@given(batch=batches())
def test_a_teachers_target_labels_make_uskds_target_term_nkds(batch):
    target = largest(batch)

    of_uskd = uskd_loss(
        batch.logits, None, target, batch.other_logits, non_target_weight=0, weak_weight=0
    )

    nkd = nkd_loss(batch.logits, batch.other_logits, target, non_target_weight=0)
    assert_close(of_uskd, nkd)


@given(batch=batches(min_classes=3))
def test_a_weight_of_zero_removes_its_term_and_leaves_the_others(batch):
    inputs = batch.logits, batch.other_logits, batch.target

    def terms(method: type[Method], settings: dict[str, object]) -> dict[str, Tensor]:
        return method(**settings).reduced(*arguments[method])

    nothing = torch.zeros(len(batch.logits), 1, dtype=torch.long)
    arguments = {
        NKDLoss: inputs,
        USKDLoss: (*inputs,),
        ZipfLSLoss: (batch.logits, batch.target, nothing, [batch.other_logits, nothing]),
        LabelSmoothingLoss: (batch.logits, batch.target),
    }
    both = {"target_term": "both"}
    exits = {"exit_taps": ("middle",), "exit_weight": 0.7}
    for method, weight, removed in (
        (NKDLoss, "non_target_weight", {"non_target"}),
        (USKDLoss, "target_weight", {"target", "rest"}),
        (USKDLoss, "non_target_weight", {"non_target"}),
        (USKDLoss, "weak_weight", {"weak"}),
        (LabelSmoothingLoss, "smoothing", {"uniform"}),
    ):
        common = both if method in (NKDLoss, USKDLoss) else {}
        full, zero, double = (terms(method, {**common, weight: w}) for w in (0.5, 0.0, 1.0))
        assert removed <= set(full)
        for name, part in full.items():
            if name in removed:
                assert float(zero.get(name, torch.zeros(()))) == 0
                assert_close(double[name], 2 * part)
            elif weight != "smoothing":
                assert_close(zero[name], part)
        loss = method(**{**common, weight: 0.0})(*arguments[method])
        assert_close(loss, sum(zero.values()))
    once, twice = (terms(ZipfLSLoss, {**exits, "exit_weight": w}) for w in (0.5, 1.0))
    assert_close(twice["exits"], 2 * once["exits"])
    assert_close(twice["non_target"], once["non_target"])


OF_NON_TARGETS: dict[str, Callable[[Tensor, Batch], Tensor]] = {
    "nkd": lambda x, b: part_of(NKDLoss(temperature=2.0), x, b.other_logits, b.target),
    "nkd_all_labels": lambda x, b: part_of(
        NKDLoss(mixed_target="all"), x, b.other_logits, b.target
    ),
    **{
        f"zipf_ls_{distribution}": lambda x, b, distribution=distribution: part_of(
            ZipfLSLoss(distribution=distribution, mixed_target="all"), x, b.target, b.votes
        )
        for distribution in ("zipf", "constant", "exponential_decay", "unbiased_zipf")
    },
    "uskd_weak": lambda x, b: part_of(
        USKDLoss(rank_from="weak", weak_weight=0), x, b.other_logits, b.target
    ),
}


def part_of(method: Method, *arguments: object) -> Tensor:
    return method.terms(*arguments)["non_target"]


@pytest.mark.parametrize("name", OF_NON_TARGETS)
@given(batch=batches(), steps=st.integers(-160, 160))
def test_the_target_logit_has_no_influence_on_any_non_target_term(name, batch, steps):
    removed = batch.labels > 0
    if name == "nkd":  # its default removes the largest label alone
        removed = torch.zeros_like(removed).scatter(1, largest(batch).unsqueeze(1), True)
    leaf = batch.logits.clone().requires_grad_()

    before = OF_NON_TARGETS[name](leaf, batch)
    after = OF_NON_TARGETS[name](batch.logits + steps * STEP * removed, batch)
    before.sum().backward()

    assert_close(after, before.detach())
    assert not leaf.grad[removed].any()
    assert_close(leaf.grad.sum(1), torch.zeros(len(leaf), dtype=torch.float64))
