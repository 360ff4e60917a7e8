"""DKS: all exits of one network learn from each other, without a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Literal, overload

import torch
from torch import Tensor, nn

from softlabels.inputs import AuxBranches, Input, Logits, Target
from softlabels.losses._checks import (
    check_choice,
    check_logits,
    check_number,
    check_temperature,
)
from softlabels.losses._features import check_stages
from softlabels.losses._non_target import LossOutput, Reduction, in_float32, reduce_parts
from softlabels.losses.byot import split_branches
from softlabels.losses.kd import kd_loss
from softlabels.losses.label_smoothing import label_smoothing_loss

__all__ = ["DKSLoss", "dks_loss"]


@overload
def dks_loss(
    logits: Tensor,
    target: Tensor,
    branch_logits: Sequence[Tensor],
    *,
    temperature: float = 1.0,
    smoothing: float = 1e-8,
    branch_weight: float = 1.0,
    kd_weight: float = 1.0,
    reduction: Reduction = "mean",
    return_parts: Literal[False] = False,
) -> Tensor: ...


@overload
def dks_loss(
    logits: Tensor,
    target: Tensor,
    branch_logits: Sequence[Tensor],
    *,
    temperature: float = 1.0,
    smoothing: float = 1e-8,
    branch_weight: float = 1.0,
    kd_weight: float = 1.0,
    reduction: Reduction = "mean",
    return_parts: Literal[True],
) -> LossOutput: ...


def dks_loss(
    logits: Tensor,
    target: Tensor,
    branch_logits: Sequence[Tensor],
    *,
    temperature: float = 1.0,
    smoothing: float = 1e-8,
    branch_weight: float = 1.0,
    kd_weight: float = 1.0,
    reduction: Reduction = "mean",
    return_parts: bool = False,
) -> Tensor | LossOutput:
    r"""DKS: the divergence of each exit from each other one, over all ordered pairs.

    Sun et al., "Deeply-supervised Knowledge Synergy", CVPR 2019 (arXiv 1906.00675), code at
    github.com/sundw2014/DKS.

    .. math::
        L = \alpha \sum_{m=1}^{E} CE(p^m, y)
        + \beta\, T^2 \sum_{m \ne n} KL(\tilde p^n \,\|\, \tilde p^m),
        \qquad \tilde p_i = \frac{p_i + \epsilon}{1 + C \epsilon}

    =========== =========================================================================
    Symbol      Argument
    =========== =========================================================================
    m, n        exits; the pairs include the final one, `logits`, the first sum does not
    p^m         softmax of exit m, at the temperature in the second sum
    p^n         the same of exit n, detached
    E           number of exits, the final one not counted
    y           `target`
    T, epsilon  `temperature`, `smoothing`
    alpha, beta `branch_weight`, `kd_weight`
    =========== =========================================================================

    The final exit's own cross-entropy is the task's.

    Args:
        logits: [B, C], raw logits of the final exit. Gets the gradient.
        target: [B] class indices, or [B, C] probabilities.
        branch_logits: [B, C] each, raw logits of the exits. Get the gradient.
        temperature: T, above 0; unitless.
        smoothing: epsilon, in [0, 1]. Added to each probability before the divergence.
        branch_weight: Of the exits' cross-entropy.
        kd_weight: Of the divergences.
        reduction: `"mean"` over B, `"sum"`, or `"none"`.
        return_parts: Also return the summands, as `LossOutput(loss, parts)`: `"branch"` and
            `"kd"`, each summed over the exits or pairs.

    Returns:
        A scalar, or [B] for `"none"`; in nats, at least float32.

    Raises:
        TypeError: Logits or labels of a wrong dtype.
        ValueError: No exit, a wrong shape or setting.

    Deviations: none from the official loss by default; `temperature=4, smoothing=0` is that of
    github.com/winycg/Self-KD-Lib. Published exits repeat the network's own blocks; those of the
    signal `AuxBranches` are plain convolutions.
    Numerics: computed in float32 or wider, also under autocast. Without smoothing, log-softmax
    throughout.
    Distributed: each sample by itself, no batch statistics.

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 4)
        >>> dks_loss(logits, torch.tensor([2]), [logits])
        tensor(1.3863)
    """
    check_logits(logits)
    _check_settings(temperature, smoothing, branch_weight, kd_weight)
    if not branch_logits:
        raise ValueError("branch_logits must hold the logits of at least one exit, got none")
    for number, exit_logits in enumerate(branch_logits):
        check_logits(exit_logits, f"branch_logits[{number}]", like=logits)
    label = [
        label_smoothing_loss(exit_logits, target, smoothing=0.0, reduction="none")
        for exit_logits in branch_logits
    ]
    every = [*branch_logits, logits]
    divergences = (
        _divergences(every, temperature, smoothing)
        if smoothing
        else [
            kd_loss(learner, source, temperature=temperature, reduction="none")
            for learner, source in permutations(every, 2)
        ]
    )
    output = reduce_parts(
        {
            "branch": branch_weight * torch.stack(label).sum(0),
            "kd": kd_weight * torch.stack(divergences).sum(0),
        },
        reduction,
    )
    return output if return_parts else output.loss


def _divergences(every: Sequence[Tensor], temperature: float, smoothing: float) -> list[Tensor]:
    """Of the smoothed predictions, [B] for each ordered pair."""
    scale = 1 + smoothing * every[0].shape[1]
    # The denominators cancel in the quotients, but not in front of them.
    smoothed = [_softened(logits, temperature) + smoothing for logits in every]
    return [
        temperature**2 / scale * (source.detach() * (source.detach().log() - learner.log())).sum(1)
        for learner, source in permutations(smoothed, 2)
    ]


def _softened(logits: Tensor, temperature: float) -> Tensor:
    """Softmax at a temperature; shifted first, so that a small temperature overflows none."""
    logits = in_float32(logits)
    return ((logits - logits.detach().amax(1, keepdim=True)) / temperature).softmax(1)


def _check_settings(
    temperature: float, smoothing: float, branch_weight: float, kd_weight: float
) -> None:
    check_temperature(temperature)
    check_number("smoothing", smoothing, at_most=1)
    check_number("branch_weight", branch_weight)
    check_number("kd_weight", kd_weight)


class DKSLoss(nn.Module):
    """DKS as a module; see `dks_loss` for the equation and the settings.

    Args:
        temperature: Above 0.
        smoothing: Added to each probability before the divergence.
        branch_weight: Of the exits' cross-entropy.
        kd_weight: Of the divergences.
        stages: Where the exits begin.
        reduction: `"mean"`, `"sum"` or `"none"`.
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        smoothing: float = 1e-8,
        branch_weight: float = 1.0,
        kd_weight: float = 1.0,
        stages: tuple[str, ...] = ("stages",),
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        _check_settings(temperature, smoothing, branch_weight, kd_weight)
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.temperature = temperature
        self.smoothing = smoothing
        self.branch_weight = branch_weight
        self.kd_weight = kd_weight
        self.reduction: Reduction = reduction
        self.inputs: Mapping[str, Input] = {
            "logits": Logits(),
            "target": Target(),
            "branches": AuxBranches(stages=check_stages(stages)),
        }

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        branches: Sequence[Tensor],
        *,
        return_parts: bool = False,
    ) -> Tensor | LossOutput:
        """Compute `dks_loss` with this module's settings.

        `branches` is what the signal `AuxBranches` gives: logits of all exits and then their maps,
        which are not used.
        """
        output = dks_loss(
            logits,
            target,
            split_branches(branches)[0],
            temperature=self.temperature,
            smoothing=self.smoothing,
            branch_weight=self.branch_weight,
            kd_weight=self.kd_weight,
            reduction=self.reduction,
            return_parts=True,
        )
        return output if return_parts else output.loss
