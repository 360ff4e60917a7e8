"""A teacher's answers as they are stored: the largest logits, and what the others sum to.

Shapes: B samples, C classes, k stored classes.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["FINGERPRINTS", "Answers", "bytes_per_view", "compress", "densify", "unreadable"]

FINGERPRINTS = ("teacher", "data", "augmentation")
"""What a cache must agree in with the run that uses it."""


class Answers(NamedTuple):
    """What is stored of a teacher's logits.

    Attributes:
        values: [B, k] float16, the largest logits, in falling order.
        classes: [B, k] int16, or int32 above 32,767 classes: whose they are; -1 throughout the row
            of an image that could not be read.
        rest: [B] float32, the log-sum-exp of all other logits; -inf if there are none.
    """

    values: Tensor
    classes: Tensor
    rest: Tensor

    def digest(self) -> str:
        """Of all bytes."""
        digest = hashlib.blake2b(digest_size=16)
        for value in self:
            digest.update(value.contiguous().numpy().data)
        return digest.hexdigest()

    def problem(self, num_classes: int) -> str | None:
        """What no builder writes, for so many classes; None for sound answers."""
        none = self.classes < 0
        if int(self.classes.min()) < -1 or int(self.classes.max()) >= num_classes:
            return f"its classes must be in -1..{num_classes - 1}"
        if not bool((none.any(1) == none.all(1)).all()):
            return "a row has answers in part"
        if not bool(self.values.isfinite().all()):
            return "a logit is not finite"
        has_rest = self.rest.isfinite() | none[:, 0]
        if self.values.shape[1] < num_classes and not bool(has_rest.all()):
            return "the rest of a row is not finite"
        return None


def compress(logits: Tensor, top: int) -> Answers:
    """Keep the largest logits of each row, and the log-sum-exp of the others.

    Args:
        logits: [B, C], finite.
        top: How many are kept, k, 1..C.

    Returns:
        The answers, on the device of the logits.

    Raises:
        ValueError: `top` is out of range, or a logit is not finite or beyond half precision.
    """
    num_classes = logits.shape[1]
    if not 1 <= top <= num_classes:
        raise ValueError(f"top must be in 1..{num_classes}, the number of classes, got {top}")
    logits = logits.detach().float()
    values, classes = logits.topk(top, dim=1)
    bad = torch.cat([logits[~logits.isfinite()], values[~values.half().isfinite()]])
    if len(bad):
        raise ValueError(
            "the teacher's logits must be finite and at most 65,504 in size, where half precision "
            f"ends, got {float(bad[0]):g}"
        )
    rest = logits.scatter(1, classes, -math.inf).logsumexp(1)
    return Answers(values.half(), classes.to(_class_type(num_classes)), rest)


def densify(answers: Answers, num_classes: int) -> Tensor:
    """Logits of all classes: those that are stored, and the rest spread evenly.

    Each other class gets `rest - log(C - k)`, so that softmax gives the stored classes the
    probabilities that the full logits gave them, to half precision.

    Args:
        answers: As `compress` gave them, without rows of unreadable images.
        num_classes: C.

    Returns:
        [B, C] float32, on the device of the answers.
    """
    values = answers.values.float()
    others = answers.rest
    if values.shape[1] < num_classes:
        # Rounding must not lift the others above a class that is stored.
        spread = answers.rest - math.log(num_classes - values.shape[1])
        others = torch.minimum(spread, values[:, -1])
    dense = others.unsqueeze(1).expand(-1, num_classes).contiguous()
    return dense.scatter_(1, answers.classes.long(), values)


def unreadable(num_rows: int, num_classes: int, top: int) -> Answers:
    """Rows that say that there is no answer, [num_rows] of them, to be filled in."""
    return Answers(
        torch.zeros(num_rows, top, dtype=torch.float16),
        torch.full((num_rows, top), -1, dtype=_class_type(num_classes)),
        torch.zeros(num_rows),
    )


def bytes_per_view(num_classes: int, top: int) -> int:
    """Bytes that a view of an image takes, k (2 + 2) + 4, or k (2 + 4) + 4 above 32,767 classes."""
    return top * (2 + _class_type(num_classes).itemsize) + 4


def _class_type(num_classes: int) -> torch.dtype:
    return torch.int16 if num_classes <= torch.iinfo(torch.int16).max else torch.int32
