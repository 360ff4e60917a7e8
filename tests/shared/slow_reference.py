"""A second witness: the equations in plain Python, sample by sample and class by class.

It shares no code and no tensor operation with the package. Removed classes are left out of the
lists (the package masks them), P_t and the ranks are made as their definitions read. Inputs are
nested lists of floats; labels are [C] rows. Each loss returns the list of its [B] values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

Rows = Sequence[Sequence[float]]

EPSILON = 1e-6  # added to both rank denominators of USKD by the reference code


class Soft(NamedTuple):
    """Soft labels of a batch as lists [B][C]: P_t, and N(Z), 0 where they do not apply."""

    target: list[list[float]]
    non_target: list[list[float]]


def log_softmax(logits: Sequence[float]) -> list[float]:
    """Logarithm of the softmax of one row."""
    top = max(logits)
    log_sum = top + math.log(sum(math.exp(value - top) for value in logits))
    return [value - log_sum for value in logits]


def softmax(logits: Sequence[float]) -> list[float]:
    """Softmax of one row."""
    return [math.exp(value) for value in log_softmax(logits)]


def one_hot(label: int, num_classes: int) -> list[float]:
    """A class index as a row of labels."""
    return [1.0 if index == label else 0.0 for index in range(num_classes)]


def labeled_classes(labels: Sequence[float], mixed_target: str) -> list[int]:
    """The classes that count as the target: all with a label, or the first with the largest."""
    if mixed_target == "all":
        return [index for index, value in enumerate(labels) if value > 0]
    return [max(range(len(labels)), key=lambda index: (labels[index], -index))]


def others(num_classes: int, removed: Iterable[int]) -> list[int]:
    """The classes that are left."""
    gone = set(removed)
    return [index for index in range(num_classes) if index not in gone]


def kd(logits: Rows, teacher_logits: Rows, temperature: float) -> list[float]:
    """Spec 1.2 in KL form, times the squared temperature."""
    losses = []
    for student, teacher in zip(logits, teacher_logits, strict=True):
        log_s = log_softmax([value / temperature for value in student])
        log_t = log_softmax([value / temperature for value in teacher])
        total = 0.0
        for s, t in zip(log_s, log_t, strict=True):
            total += math.exp(t) * (t - s)
        losses.append(temperature**2 * total)
    return losses


def log_mass(logits: Sequence[float], classes: Sequence[int]) -> float:
    """Logarithm of the probability that some classes have together."""
    log_s = log_softmax(logits)
    top = max(log_s[index] for index in classes)
    return top + math.log(sum(math.exp(log_s[index] - top) for index in classes))


def nkd(
    logits: Rows,
    teacher_logits: Rows,
    labels: Rows,
    temperature: float,
    non_target_weight: float,
    mixed_target: str,
    target_term: str = "T1",
    non_target_term: str = "normalized",
) -> list[float]:
    """Spec 1.4 and its ablations 4.5 and 4.14; targets removed from the non-target part."""
    losses = []
    for student, teacher, label in zip(logits, teacher_logits, labels, strict=True):
        targets = labeled_classes(label, mixed_target)
        rest = others(len(student), targets)
        log_s, t = log_softmax(student), softmax(teacher)
        loss = 0.0
        if target_term in ("T1", "both"):
            for index in targets:
                loss -= t[index] * log_s[index]
        if target_term in ("T2", "both") and rest:
            loss -= sum(t[index] for index in rest) * log_mass(student, rest)
        soft_student = [value / temperature for value in student]
        soft_teacher = [value / temperature for value in teacher]
        weight = non_target_weight * temperature**2
        if non_target_term == "unnormalized":
            log_all, t_all = log_softmax(soft_student), softmax(soft_teacher)
            for index in rest:
                loss -= weight * t_all[index] * log_all[index]
        elif rest:
            log_ns = log_softmax([soft_student[index] for index in rest])
            nt = softmax([soft_teacher[index] for index in rest])
            for believed, value in zip(nt, log_ns, strict=True):
                loss -= weight * believed * value
        losses.append(loss)
    return losses


def competition_ranks(values: Sequence[float]) -> list[int]:
    """Rank of each value, 1 the largest; equal values share the smallest rank."""
    return [1 + sum(1 for other in values if other > value) for value in values]


def integral_of_power(lower: float, upper: float, power: float) -> float:
    """Of x^-power over [lower, upper]."""
    if power == 1:
        return math.log(upper / lower)
    return (upper ** (1 - power) - lower ** (1 - power)) / (1 - power)


def law(ranks: Sequence[int], distribution: str, settings: Mapping[str, float]) -> list[float]:
    """Spec 1.7: the weight of each class by its rank, before the target is removed."""
    num_classes = len(ranks)
    weights = []
    for rank in ranks:
        if distribution == "constant":
            weights.append(1.0)
        elif distribution == "zipf":
            weights.append(rank ** -settings["power"])
        elif distribution == "exponential_decay":
            weights.append(math.exp(-settings["decay"] * (rank - 1)))
        elif distribution == "linear_decay":
            smallest = settings["smallest_probability"]
            gap = 2 * (1 - num_classes * smallest) / (num_classes * (num_classes - 1))
            weights.append((num_classes - rank) * gap + smallest)
        else:
            lower, upper = settings["lower_bound"], settings["upper_bound"]
            cell = (upper - lower) / num_classes
            tied = range(rank, rank + ranks.count(rank))
            areas = [
                integral_of_power(
                    lower + (place - 1) * cell, lower + place * cell, settings["power"]
                )
                for place in tied
            ]
            weights.append(sum(areas) / len(areas))
    return weights


def zipf_ls_targets(
    logits: Rows,
    labels: Rows,
    votes: Sequence[Sequence[int]] | None,
    mixed: str,
    distribution: str,
    settings: Mapping[str, float],
) -> list[list[float]]:
    """Spec 1.7, steps 2 to 5."""
    rows = []
    for number, (student, label) in enumerate(zip(logits, labels, strict=True)):
        num_classes = len(student)
        if votes is None:
            ranks = competition_ranks(student)
        else:
            counts = [0] * num_classes
            for vote in votes[number]:
                counts[vote] += 1
            ranks = competition_ranks(counts)
        weights = law(ranks, distribution, settings)
        rest = others(num_classes, labeled_classes(label, mixed))
        total = sum(weights[index] for index in rest)
        row = [0.0] * num_classes
        for index in rest:
            row[index] = weights[index] / total if total else 0.0
        rows.append(row)
    return rows


def zipf_ls(
    logits: Rows,
    labels: Rows,
    votes: Sequence[Sequence[int]] | None,
    mixed: str,
    distribution: str,
    settings: Mapping[str, float],
) -> list[float]:
    """Spec 1.7, steps 6 and 7."""
    losses = []
    targets = zipf_ls_targets(logits, labels, votes, mixed, distribution, settings)
    for student, label, soft in zip(logits, labels, targets, strict=True):
        rest = others(len(student), labeled_classes(label, mixed))
        loss = 0.0
        if rest:
            log_p = log_softmax([student[index] for index in rest])
            for index, value in zip(rest, log_p, strict=True):
                if soft[index] > 0:
                    loss += soft[index] * (math.log(soft[index]) - value)
        losses.append(loss)
    return losses


def predicted_correctly(logits: Rows, labels: Rows) -> list[bool]:
    """Whether the first largest logit is that of the first largest label."""
    return [
        student.index(max(student)) == label.index(max(label))
        for student, label in zip(logits, labels, strict=True)
    ]


def cross_entropy(logits: Rows, labels: Rows) -> list[float]:
    """Spec 1.1."""
    return label_smoothing(logits, labels, 0.0, "all")


def columns(label: Sequence[float]) -> list[int]:
    """The one or two labeled classes of a row, the major one first (equal: the lower class)."""
    labeled = [index for index, value in enumerate(label) if value > 0]
    assert 1 <= len(labeled) <= 2
    return sorted(labeled, key=lambda index: (-label[index], index))


def rank_scores(
    logits: Sequence[float],
    weak_logits: Sequence[float],
    label: Sequence[float],
    rank_by: str,
    rank_from: str = "both",
) -> list[float]:
    """Equation 10 for one row with the epsilon of the reference code, and spec 4.9's others.

    One network's probabilities are in the order of its logits, which have no near-ties.
    """
    if rank_from in ("weak", "final"):
        return list(weak_logits if rank_from == "weak" else logits)
    labeled = columns(label)
    final = softmax(logits) if rank_by == "probability" else log_softmax(logits)
    weak = softmax(weak_logits)
    final_rest = weak_rest = 1.0
    if rank_from == "both":
        final_rest = 1 - sum(final[index] for index in labeled) + EPSILON
        weak_rest = 1 - sum(weak[index] for index in labeled) + EPSILON
    return [w / weak_rest + f / final_rest for w, f in zip(weak, final, strict=True)]


def uskd_targets(
    logits: Rows,
    weak_logits: Rows,
    labels: Rows,
    rank_by: str,
    rank_from: str = "both",
    squared: bool = True,
    teacher_logits: Rows | None = None,
) -> Soft:
    """Equations 6, 10 and 11; ranks over all classes, the labeled ones removed afterwards."""
    batch_size, num_classes = len(logits), len(logits[0])
    target = [[0.0] * num_classes for _ in range(batch_size)]
    for column in range(2):
        rows = [row for row in range(batch_size) if len(columns(labels[row])) > column]
        beliefs = {}
        for row in rows:
            belief = softmax(logits[row])[columns(labels[row])[column]]
            beliefs[row] = belief**2 if squared else belief
        for row in rows:
            index = columns(labels[row])[column]
            mean = sum(beliefs.values()) / len(rows)
            target[row][index] = beliefs[row] + labels[row][index] - mean
            if teacher_logits is not None:
                target[row][index] = softmax(teacher_logits[row])[index]

    non_target = []
    for row in range(batch_size):
        scores = rank_scores(logits[row], weak_logits[row], labels[row], rank_by, rank_from)
        order = sorted(range(num_classes), key=lambda index: (-scores[index], index))
        zipf = [0.0] * num_classes
        for rank, index in enumerate(order, start=1):
            zipf[index] = 1 / rank
        rest = others(num_classes, columns(labels[row]))
        total = sum(zipf[index] for index in rest)
        non_target.append(
            [zipf[index] / total if index in rest else 0.0 for index in range(num_classes)]
        )
    return Soft(target, non_target)


def uskd(
    logits: Rows,
    weak_logits: Rows,
    labels: Rows,
    soft: Soft,
    target_weight: float,
    non_target_weight: float,
    weak_weight: float,
    target_term: str = "T1",
) -> list[float]:
    """Equations 7, 9 and 12, summed as in 13 without the task's own loss; spec 4.15."""
    losses = []
    for row, (student, weak, label) in enumerate(zip(logits, weak_logits, labels, strict=True)):
        num_classes = len(student)
        loss = 0.0
        log_s, log_w = log_softmax(student), log_softmax(weak)
        rest = others(num_classes, columns(label))
        if target_term in ("T1", "both"):
            for index in columns(label):
                loss -= target_weight * soft.target[row][index] * log_s[index]
        if target_term in ("T2", "both"):
            missing = 1 - sum(soft.target[row][index] for index in columns(label))
            loss -= target_weight * missing * log_mass(student, rest)
        if rest:
            log_ns = log_softmax([student[index] for index in rest])
            for index, value in zip(rest, log_ns, strict=True):
                loss -= non_target_weight * soft.non_target[row][index] * value
        for index in range(num_classes):
            loss -= weak_weight * (0.9 * label[index] + 0.1 / num_classes) * log_w[index]
        losses.append(loss)
    return losses


def label_smoothing(logits: Rows, labels: Rows, smoothing: float, smooth_over: str) -> list[float]:
    """Spec 5.3, LS: over all classes, or over those that a label does not name."""
    losses = []
    for student, label in zip(logits, labels, strict=True):
        num_classes = len(student)
        loss = 0.0
        for value, log_s in zip(label, log_softmax(student), strict=True):
            if smooth_over == "all":
                smoothed = (1 - smoothing) * value + smoothing / num_classes
            else:
                smoothed = (1 - smoothing) * value + (1 - value) * smoothing / (num_classes - 1)
            loss -= smoothed * log_s
        losses.append(loss)
    return losses
