"""CRD, contrastive representation distillation: each sample is told from many others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from softlabels.inputs import FromBatch, Target
from softlabels.losses._checks import check_floating, check_number, values_can_be_read
from softlabels.losses._features import POOLED_INPUTS, check_vectors, the_only, unit_vectors
from softlabels.losses._memory_bank import MemoryBank, check_memory, known_size
from softlabels.losses._method import Count, Defaults, Method, Positive, Shapes, Share, Value
from softlabels.losses._non_target import in_float32, largest_label

__all__ = ["CRDLoss", "crd_scores", "draw_negatives"]

_EPSILON = 1e-7


def crd_scores(
    embedding: Tensor,
    memory: Tensor,
    index: Tensor,
    negative_index: Tensor,
    *,
    temperature: float = 0.07,
) -> Tensor:
    r"""Logarithms of CRD's scores before normalization: :math:`v \cdot m_j / \tau`.

    Args:
        embedding: [B, D], of unit length (v). Gets the gradient.
        memory: [n, D], what is remembered of each training sample (m). Gets none.
        index: [B], the samples' own places in the memory, the positives.
        negative_index: [B, K], places of the samples that each is told from.
        temperature: tau, above 0.

    Returns:
        [B, 1 + K], the positive first; at least float32.

    Raises:
        TypeError: An embedding of a wrong dtype.
        ValueError: A wrong shape or temperature.

    Numerics: computed in float32 or wider, also under autocast. All n products are made where
    that takes less memory than a copy of K rows for each sample.
    """
    check_number("temperature", temperature, positive=True)
    check_floating(embedding, "embedding")
    if embedding.dim() != 2 or memory.dim() != 2 or memory.shape[1] != embedding.shape[1]:
        raise ValueError(
            "embedding and memory must be [B, D] and [n, D], got "
            f"{tuple(embedding.shape)} and {tuple(memory.shape)}"
        )
    batch_size = len(embedding)
    fits = negative_index.dim() == 2 and negative_index.shape[0] == batch_size
    if index.shape != (batch_size,) or not fits or negative_index.shape[1] < 1:
        raise ValueError(
            f"index and negative_index must be [{batch_size}] and [{batch_size}, K], got "
            f"{tuple(index.shape)} and {tuple(negative_index.shape)}"
        )
    embedding = in_float32(embedding)
    memory = in_float32(memory.detach()).to(embedding.dtype)
    contrast = torch.cat((index.unsqueeze(1), negative_index), 1)
    with torch.autocast(device_type=embedding.device.type, enabled=False):
        if len(memory) <= contrast.shape[1] * memory.shape[1]:
            products = (embedding @ memory.T).gather(1, contrast)
        else:
            products = (memory[contrast] @ embedding.unsqueeze(2)).squeeze(2)
    return products / temperature


def _log_means(scores: Sequence[Tensor]) -> Tensor:
    """Logarithm of each sample's mean of exp(s), [B, 2], without gradient."""
    means = [of_one.detach().logsumexp(1) - math.log(of_one.shape[1]) for of_one in scores]
    return torch.stack(means, 1)


def _log_normalizers(log_means: Tensor, num_samples: int) -> Tensor:
    """Logarithms of Z, [2], of all samples together."""
    return log_means.logsumexp(0) + math.log(num_samples / len(log_means))


def draw_negatives(labels: Tensor, classes: Tensor, index: Tensor, count: int) -> Tensor:
    """Draw samples of other classes, each with the same probability, with torch's generator.

    Args:
        labels: [n] int64, the class of each training sample as far as it is known, else -1.
        classes: [B] int64, the classes of the batch.
        index: [B] int64, the batch's own places, which are left out in any case.
        count: K.

    Returns:
        [B, K] int64. Where all samples are of one class, it is of that.
    """
    ordered, order = labels.scatter(0, index, classes).sort()
    first = torch.searchsorted(ordered, classes).unsqueeze(1)
    own = torch.searchsorted(ordered, classes, right=True).unsqueeze(1) - first
    draws = torch.randint(2**62, (len(classes), count), device=labels.device)
    place = draws % (len(labels) - own).clamp(min=1)
    # The samples of a class lie side by side: step over them.
    place = torch.where(place >= first, place + own, place)
    return order[place.clamp(max=len(labels) - 1)]


class _Adapters(MemoryBank):
    """Embeddings of both networks' features, and what is remembered of each sample."""

    memory_inputs = ("student_features", "teacher_features", "target", "index", "log_means")
    student_memory: Tensor
    teacher_memory: Tensor
    labels: Tensor
    log_normalizers: Tensor
    begun: Tensor

    def __init__(self, widths: tuple[int, int], num_samples: int, settings: CRDLoss) -> None:
        super().__init__()
        self.num_negatives = max(min(settings.num_negatives, num_samples - 1), 1)
        self.temperature = settings.temperature
        self.momentum = settings.momentum
        width = settings.width
        self.student_embedding = nn.Linear(widths[0], width)
        self.teacher_embedding = nn.Linear(widths[1], width)
        reach = math.sqrt(3 / width)  # rows of about unit length
        for name in ("student_memory", "teacher_memory"):
            self.register_buffer(name, torch.empty(num_samples, width).uniform_(-reach, reach))
        self.register_buffer("labels", torch.full((num_samples,), -1))
        self.register_buffer("log_normalizers", torch.zeros(2))
        self.register_buffer("begun", torch.zeros((), dtype=torch.bool))

    def forward(self, values: Mapping[str, Value]) -> dict[str, Value]:
        student_features = the_only("student_features", values["student_features"])
        teacher_features = the_only("teacher_features", values["teacher_features"])
        target, index = cast("Tensor", values["target"]), cast("Tensor", values["index"])
        num_samples = len(self.labels)
        if values_can_be_read(index) and not bool(((index >= 0) & (index < num_samples)).all()):
            raise ValueError(
                f"index must lie in [0, {num_samples}) for num_samples={num_samples}, got values "
                f"from {int(index.min())} to {int(index.max())}"
            )
        student = unit_vectors(in_float32(self.student_embedding(student_features)))
        teacher = unit_vectors(in_float32(self.teacher_embedding(teacher_features.detach())))
        negatives = draw_negatives(self.labels, largest_label(target), index, self.num_negatives)
        scores = [
            crd_scores(own, memory, index, negatives, temperature=self.temperature)
            for own, memory in ((student, self.teacher_memory), (teacher, self.student_memory))
        ]
        log_means = _log_means(scores)
        log_normalizers = torch.where(
            self.begun, self.log_normalizers, _log_normalizers(log_means, num_samples)
        )
        return {
            "student_features": [student],
            "teacher_features": [teacher],
            "scores": scores,
            "log_normalizers": log_normalizers,
            "log_means": log_means,
        }

    def after_step(self, values: Mapping[str, Value]) -> None:
        """Draw the samples' rows to the new embeddings; the first batch sets the normalizers."""
        index = cast("Tensor", values["index"])
        # Of a sample that is there twice the last one counts, whatever the device's order.
        places = torch.arange(len(index), device=index.device)
        last = torch.where(index.unsqueeze(1) == index, places, 0).amax(1)
        self.labels[index] = largest_label(cast("Tensor", values["target"]))[last]
        for name, memory in (
            ("student_features", self.student_memory),
            ("teacher_features", self.teacher_memory),
        ):
            new = the_only(name, values[name]).to(memory)
            moved = self.momentum * memory[index] + (1 - self.momentum) * new[last]
            memory[index] = unit_vectors(moved)
        first = _log_normalizers(cast("Tensor", values["log_means"]), len(self.labels))
        self.log_normalizers.copy_(torch.where(self.begun, self.log_normalizers, first))
        self.begun.fill_(True)


class CRDLoss(Method, name="crd"):
    r"""CRD: each sample is told from many others by what the teacher makes of it.

    Tian et al., "Contrastive Representation Distillation", ICLR 2020 (arXiv 1910.10699),
    equations 9-19; code HobbitLong/RepDistiller.

    .. math::
        L = \sum_{v \in \{S, T\}} -\frac{1}{B} \sum_b \Big[ \log \frac{P_{b0}}{P_{b0} + c}
        + \sum_{k=1}^K \log \frac{K / n}{P_{bk} + c} \Big], \quad
        P_{bk} = \frac{e^{s_{bk}}}{Z}, \quad c = \frac{K}{n} + 10^{-7}

    ==========  =====================================================================
    symbol      meaning
    ==========  =====================================================================
    s           scores; 0 is the sample itself, 1 to K the negatives
    v           the student's embedding with the teacher's memory, and the reverse
    n           `num_samples`
    Z           normalizer of each v: n times the mean of exp(s) over the first batch
    ==========  =====================================================================

    The pooled last features of both networks are embedded by a linear layer each, trained with
    the student, and brought to unit length. A memory holds such an embedding of each training
    sample: a step moves those of its batch, `memory = unit(momentum * memory + (1 - momentum) *
    new)`, after they were scored.

    Deviations from the published code: negatives are drawn with replacement from all samples
    that are not known to be of the anchor's class; there, without replacement, from all that are
    of another. Classes are remembered as samples are seen (of mixed labels the largest), so that
    in the first epoch some negatives may be of the anchor's class, never the anchor itself.
    There are at most n - 1 negatives. On several processes Z is of the first batch of all of
    them; in that very step each still uses its own.

    Nor is there another deviation in the value. The published code keeps exp(s) itself, which
    overflows in float32 for temperatures below 0.0113; here everything stays a logarithm.

    Args:
        num_negatives: K; at most one less than the training set.
        temperature: tau of the scores, above 0.
        momentum: What a step keeps of a remembered embedding, in [0, 1].
        width: Features of an embedding.
        num_samples: Size of the training set, n; the trainer fills it in.
        most_memory: GiB that the memory may take.

    Example:
        >>> import torch
        >>> scores = torch.zeros(1, 3)  # Z = n: each P is 1 / n, and c is 2 / n
        >>> CRDLoss(num_samples=8)([scores, scores])  # 2 (log 3 + 2 log(3 / 2))
        tensor(3.8191)
    """

    num_negatives: Count = 16384
    temperature: Positive = 0.07
    momentum: Share = 0.5
    width: Count = 128
    num_samples: Count | None = None
    most_memory: Positive = 8.0

    adapter_inputs: ClassVar = {
        **POOLED_INPUTS,
        "target": Target(),
        "index": FromBatch("index"),
    }
    defaults = Defaults(weight=0.8)
    of_batch = True

    def build_adapters(self, shapes: Shapes) -> nn.Module:
        """The embeddings and the memory.

        Raises:
            ValueError: `num_samples` is not set, or the memory would be too large.
        """
        num_samples = known_size("CRD", self.num_samples)
        what = f"CRD's memory of {num_samples} samples"
        num_bytes = num_samples * (2 * self.width * 4 + 8)
        check_memory(what, num_bytes, self.most_memory, f"or lower width ({self.width})")
        of_student, of_teacher = (
            cast("list[tuple[int, ...]]", shapes[name])[0][1]
            for name in ("student_features", "teacher_features")
        )
        return _Adapters((of_student, of_teacher), num_samples, self)

    def terms(
        self, scores: Sequence[Tensor], log_normalizers: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`"student"` and `"teacher"`, scalars.

        Args:
            scores: Two of [B, 1 + K], as of `crd_scores`, the positive first: the student's
                embedding with the teacher's memory, and the teacher's with the student's. Get
                the gradient, which trains both embeddings.
            log_normalizers: [2], logarithms of Z for the student and the teacher; None: of this
                batch, without gradient.
        """
        if len(scores) != 2:
            raise ValueError(
                f"scores must be those of the student and of the teacher, got {len(scores)}"
            )
        names = ("the student's scores", "the teacher's scores")
        check_vectors(scores[0], scores[1], names, same_widths=True)
        num_samples = known_size("CRD", self.num_samples)
        num_negatives = scores[0].shape[1] - 1
        if num_negatives < 1:
            raise ValueError("scores must hold a positive and at least one negative, got 1")
        both = [in_float32(of_one) for of_one in scores]
        if log_normalizers is None:
            log_normalizers = _log_normalizers(_log_means(both), num_samples)
        elif log_normalizers.shape != (2,):
            raise ValueError(f"log_normalizers must be [2], got {tuple(log_normalizers.shape)}")
        log_noise = math.log(num_negatives / num_samples)
        log_floor = math.log(num_negatives / num_samples + _EPSILON)
        terms = {}
        for name, own, normalizer in zip(
            ("student", "teacher"), both, log_normalizers, strict=True
        ):
            # P / (P + c) is a sigmoid of log P - log c, and so is c / (P + c).
            over = own - normalizer.detach() - log_floor
            found = -functional.logsigmoid(over[:, 0])
            refused = -functional.logsigmoid(-over[:, 1:]) + (log_floor - log_noise)
            terms[name] = (found + refused.sum(1)).mean()
        return terms
