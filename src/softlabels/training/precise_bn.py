"""PreciseBN: BatchNorm's statistics as true averages, in place of running ones.

Running statistics are of the weights of the last steps, not of the last weights. So they are
recomputed with the weights held, over a given number of training images (Wu and Johnson,
"Rethinking 'Batch' in BatchNorm", 2021, section 3). As in pycls and MMClassification, each mean and
each variance is the average of those of the batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["check_precise_bn", "recompute_statistics"]


def check_precise_bn(network: nn.Module) -> None:
    """Check that a network has statistics to recompute.

    Raises:
        ValueError: It has no BatchNorm that keeps any.
    """
    if not _norms_of(network):
        raise ValueError(
            "precise_bn recomputes statistics of BatchNorm, which the network "
            f"{type(network).__name__} has none of: leave it out"
        )


def recompute_statistics(
    network: nn.Module,
    batches: Iterable[Tensor],
    average: Callable[[Tensor], Tensor] | None = None,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Set the running means and variances of all BatchNorms to averages over batches.

    Nothing else changes: not the mode of any module, nor how many batches a BatchNorm has seen. In
    the meantime the BatchNorms alone are in training mode. Dropout and the like are off, as they
    are when the statistics are used, so that no random number is drawn.

    Args:
        network: [B, C, H, W] -> anything.
        batches: This process' images, [B, C, H, W] on the network's device; at least one batch.
        average: Averages a tensor over processes; None: there is one.
        autocast: Context of the forward.

    Raises:
        ValueError: There is no batch.
    """
    norms = _norms_of(network)
    num_batches = 0
    with torch.no_grad(), _counting(network, norms):
        for images in batches:
            with autocast():
                network(images)
            num_batches += 1
        if not num_batches:
            raise ValueError("precise_bn has no training images to average over")
        if average is not None:
            names = ("running_mean", "running_var")
            statistics = [norm.get_buffer(name) for norm in norms for name in names]
            # One message, whatever the number of layers.
            averaged = average(torch.cat([value.float() for value in statistics]))
            parts = averaged.split([len(value) for value in statistics])
            for value, part in zip(statistics, parts, strict=True):
                value.copy_(part)


def _norms_of(network: nn.Module) -> list[_BatchNorm]:
    """The BatchNorms that keep statistics, each once."""
    return [
        module
        for module in network.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]


@contextmanager
def _counting(network: nn.Module, norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Let BatchNorms average anew over the batches of a block, each batch alike."""
    modes = {module: module.training for module in network.modules()}
    counts = [norm.get_buffer("num_batches_tracked") for norm in norms]
    before = [(norm.momentum, count.clone()) for norm, count in zip(norms, counts, strict=True)]
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's cumulative average
        norm.training = True
    try:
        yield
    finally:
        for norm, count, (momentum, number) in zip(norms, counts, before, strict=True):
            norm.momentum = momentum
            count.copy_(number)
        for module, training in modes.items():
            module.training = training
