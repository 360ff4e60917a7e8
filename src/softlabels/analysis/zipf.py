"""How a network's sorted softmax decays with the rank, and whether that is a power law."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor
from torchmetrics import Metric

__all__ = ["FITTED_RANKS", "MeanSortedSoftmax", "ZipfFit", "zipf_fit"]

FITTED_RANKS = 32  # as many as the Zipf's LS paper shows
_SHOWN_RANKS = 100
_EQUAL = 1e-6  # a softmax in float32 knows no smaller differences of log p


@dataclass(frozen=True)
class ZipfFit:
    """A straight line through log p over log rank.

    Attributes:
        exponent: Minus its slope: p is proportional to rank^-exponent.
        r2: Share of the variance of log p that the line explains, at most 1.
    """

    exponent: float
    r2: float


def zipf_fit(mean_sorted_softmax: Tensor) -> ZipfFit:
    """Fit a power law to the first 32 ranks by least squares in log-log.

    Probabilities below the smallest normal float32 count as that. Where log p is the same at all
    ranks the line goes through all of them, so R^2 is 1, as it always is of two classes.

    Args:
        mean_sorted_softmax: [R], R >= 2: the probability at each rank, the largest first.

    Returns:
        Exponent and R^2, not finite where the probabilities are not.

    Raises:
        ValueError: Not a vector of two or more.
    """
    if mean_sorted_softmax.dim() != 1 or len(mean_sorted_softmax) < 2:
        raise ValueError(
            f"mean_sorted_softmax must be [R] with R >= 2, got {tuple(mean_sorted_softmax.shape)}"
        )
    p = mean_sorted_softmax[:FITTED_RANKS].cpu().double()
    y = p.clamp(min=torch.finfo(torch.float32).tiny).log()
    x = torch.arange(1, len(y) + 1, dtype=torch.float64).log()
    line = stats.linregress(x.numpy(), y.numpy())
    equal = float(y.var(correction=0)) <= _EQUAL**2
    return ZipfFit(exponent=-float(line.slope), r2=1.0 if equal else float(line.rvalue) ** 2)


class MeanSortedSoftmax(Metric):
    """Mean over images of their class probabilities, each image's own sorted.

    It is updated with probabilities [B, C], and computes [min(C, 100)], the largest first.

    Args:
        num_classes: C.
        device: Where it is kept. Sums are in float64 where the device knows that.
        sync_on_compute: Whether the mean is over the images of all processes.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(
        self, num_classes: int, device: torch.device, *, sync_on_compute: bool = True
    ) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.num_ranks = min(num_classes, _SHOWN_RANKS)
        dtype = torch.float32 if device.type == "mps" else torch.float64
        total = torch.zeros(self.num_ranks, dtype=dtype)
        self.add_state("total", total, dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.to(device)

    def update(self, probabilities: Tensor) -> None:
        """Take in the probabilities of a batch, [B, C]."""
        ranked = probabilities.topk(self.num_ranks, dim=1).values
        self.total += ranked.to(self.total).sum(0)
        self.count += len(probabilities)

    def compute(self) -> Tensor:
        """The mean so far, [min(C, 100)]."""
        return self.total / self.count
