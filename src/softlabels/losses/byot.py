"""BYOT: exits of one network learn from its deepest one, without a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, overload

import torch
from torch import Tensor, nn

from softlabels.inputs import AuxBranches, Features, Input, Logits, Target
from softlabels.losses._checks import (
    check_choice,
    check_logits,
    check_number,
    check_temperature,
)
from softlabels.losses._features import check_stages
from softlabels.losses._non_target import LossOutput, Reduction, in_float32, reduce_parts
from softlabels.losses.kd import kd_loss
from softlabels.losses.label_smoothing import label_smoothing_loss

__all__ = ["BYOTLoss", "byot_loss", "split_branches"]


@overload
def byot_loss(
    logits: Tensor,
    target: Tensor,
    branch_logits: Sequence[Tensor],
    branch_maps: Sequence[Tensor],
    last_map: Tensor,
    *,
    temperature: float = 4.0,
    branch_weight: float = 1.0,
    kd_weight: float = 1.0,
    feature_weight: float = 0.05,
    reduction: Reduction = "mean",
    return_parts: Literal[False] = False,
) -> Tensor: ...


@overload
def byot_loss(
    logits: Tensor,
    target: Tensor,
    branch_logits: Sequence[Tensor],
    branch_maps: Sequence[Tensor],
    last_map: Tensor,
    *,
    temperature: float = 4.0,
    branch_weight: float = 1.0,
    kd_weight: float = 1.0,
    feature_weight: float = 0.05,
    reduction: Reduction = "mean",
    return_parts: Literal[True],
) -> LossOutput: ...


def byot_loss(
    logits: Tensor,
    target: Tensor,
    branch_logits: Sequence[Tensor],
    branch_maps: Sequence[Tensor],
    last_map: Tensor,
    *,
    temperature: float = 4.0,
    branch_weight: float = 1.0,
    kd_weight: float = 1.0,
    feature_weight: float = 0.05,
    reduction: Reduction = "mean",
    return_parts: bool = False,
) -> Tensor | LossOutput:
    r"""BYOT: each exit learns the label, the final prediction and the final map.

    Zhang et al., "Be Your Own Teacher: Improve the Performance of Convolutional Neural Networks
    via Self Distillation", ICCV 2019 (arXiv 1905.08094). There is no official code; weights and
    reductions are those of github.com/winycg/Self-KD-Lib.

    .. math::
        L = \sum_{i=1}^{E} \Big( \alpha\, CE(q^i, y) + \beta\, T^2\, KL(q^C_T \,\|\, q^i_T)
        + \lambda\, \overline{(F_i - F_C)^2} \Big)

    =================== =======================================================================
    Symbol              Argument
    =================== =======================================================================
    E                   number of exits, the final one not counted
    q^i, q^i_T          softmax of `branch_logits[i]`, and that at the temperature
    q^C                 softmax of `logits`, detached
    F_i, F_C            `branch_maps[i]`, and `last_map`, detached; the bar is the mean over all
                        but the batch
    y                   `target`
    T                   `temperature`
    alpha, beta, lambda `branch_weight`, `kd_weight`, `feature_weight`
    =================== =======================================================================

    The final exit's own cross-entropy is the task's.

    Args:
        logits: [B, C], raw logits of the final exit. Gets no gradient.
        target: [B] class indices, or [B, C] probabilities.
        branch_logits: [B, C] each, raw logits of the exits. Get the gradient.
        branch_maps: One for each exit, in the shape of `last_map`. Get the gradient.
        last_map: [B, D, H, W], the final exit's map before pooling. Gets no gradient.
        temperature: T, above 0; unitless.
        branch_weight: Of the exits' cross-entropy.
        kd_weight: Of their divergence from the final prediction.
        feature_weight: Of the squared difference of the maps.
        reduction: `"mean"` over B, `"sum"`, or `"none"`.
        return_parts: Also return the summands, as `LossOutput(loss, parts)`: `"branch"`, `"kd"`
            and `"feature"`, each summed over the exits.

    Returns:
        A scalar, or [B] for `"none"`; logits in nats, at least float32.

    Raises:
        TypeError: Logits, labels or maps of a wrong dtype.
        ValueError: No exit, unequal numbers of logits and maps, a wrong shape or setting.

    Deviations: the paper weighs the terms of each exit by 1 - alpha, alpha and lambda; the code
    that is followed by 1, 1 and 0.05. Its feature term is an element mean. Its exits repeat the
    network's own blocks; those of the signal `AuxBranches` are plain convolutions.
    Numerics: log-softmax throughout, computed in float32 or wider, also under autocast.
    Distributed: each sample by itself, no batch statistics.

    Example:
        >>> import torch
        >>> logits, last_map = torch.zeros(1, 4), torch.ones(1, 2, 3, 3)
        >>> target = torch.tensor([2])
        >>> byot_loss(logits, target, [logits], [last_map], last_map)
        tensor(1.3863)
    """
    check_logits(logits)
    check_temperature(temperature)
    _check_weights(branch_weight, kd_weight, feature_weight)
    _check_branches(logits, branch_logits, branch_maps, last_map)
    final, final_map = logits.detach(), in_float32(last_map.detach())
    label, divergence, difference = [], [], []
    for exit_logits, exit_map in zip(branch_logits, branch_maps, strict=True):
        label.append(label_smoothing_loss(exit_logits, target, smoothing=0.0, reduction="none"))
        divergence.append(kd_loss(exit_logits, final, temperature=temperature, reduction="none"))
        gap = in_float32(exit_map) - final_map
        difference.append(gap.square().flatten(1).mean(1))
    output = reduce_parts(
        {
            "branch": branch_weight * torch.stack(label).sum(0),
            "kd": kd_weight * torch.stack(divergence).sum(0),
            "feature": feature_weight * torch.stack(difference).sum(0),
        },
        reduction,
    )
    return output if return_parts else output.loss


def _check_weights(branch_weight: float, kd_weight: float, feature_weight: float) -> None:
    check_number("branch_weight", branch_weight)
    check_number("kd_weight", kd_weight)
    check_number("feature_weight", feature_weight)


def _check_branches(
    logits: Tensor,
    branch_logits: Sequence[Tensor],
    branch_maps: Sequence[Tensor],
    last_map: Tensor,
) -> None:
    if not branch_logits or len(branch_logits) != len(branch_maps):
        raise ValueError(
            "branch_logits and branch_maps must hold one tensor for each exit and at least one, "
            f"got {len(branch_logits)} and {len(branch_maps)}"
        )
    for number, exit_logits in enumerate(branch_logits):
        check_logits(exit_logits, f"branch_logits[{number}]", like=logits)
    if last_map.dim() != 4 or len(last_map) != len(logits):
        raise ValueError(
            f"last_map must be [{len(logits)}, D, H, W] as the logits, got {tuple(last_map.shape)}"
        )
    for number, exit_map in enumerate(branch_maps):
        if exit_map.shape != last_map.shape:
            raise ValueError(
                f"branch_maps[{number}] must have the shape of last_map {tuple(last_map.shape)}, "
                f"got {tuple(exit_map.shape)}"
            )


class BYOTLoss(nn.Module):
    """BYOT as a module; see `byot_loss` for the equation and the settings.

    Args:
        temperature: Above 0.
        branch_weight: Of the exits' cross-entropy.
        kd_weight: Of their divergence from the final prediction.
        feature_weight: Of the squared difference of the maps.
        stages: Where the exits begin.
        reduction: `"mean"`, `"sum"` or `"none"`.
    """

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        branch_weight: float = 1.0,
        kd_weight: float = 1.0,
        feature_weight: float = 0.05,
        stages: tuple[str, ...] = ("stages",),
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        _check_weights(branch_weight, kd_weight, feature_weight)
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.temperature = temperature
        self.branch_weight = branch_weight
        self.kd_weight = kd_weight
        self.feature_weight = feature_weight
        self.reduction: Reduction = reduction
        self.inputs: Mapping[str, Input] = {
            "logits": Logits(),
            "target": Target(),
            "branches": AuxBranches(stages=check_stages(stages)),
            "last_map": Features(of="student", stages=("last",), form="map"),
        }

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        branches: Sequence[Tensor],
        last_map: Sequence[Tensor],
        *,
        return_parts: bool = False,
    ) -> Tensor | LossOutput:
        """Compute `byot_loss` with this module's settings.

        `branches` and `last_map` are what the signals `AuxBranches` and `Features` give: logits of
        all exits and then their maps, and a list of one map.
        """
        branch_logits, branch_maps = split_branches(branches)
        output = byot_loss(
            logits,
            target,
            branch_logits,
            branch_maps,
            last_map[0],
            temperature=self.temperature,
            branch_weight=self.branch_weight,
            kd_weight=self.kd_weight,
            feature_weight=self.feature_weight,
            reduction=self.reduction,
            return_parts=True,
        )
        return output if return_parts else output.loss


def split_branches(branches: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """What the signal `AuxBranches` gives, as logits and maps.

    Raises:
        ValueError: The number of tensors is odd.
    """
    half, rest = divmod(len(branches), 2)
    if rest:
        raise ValueError(f"branches must hold logits and a map of each exit, got {len(branches)}")
    return branches[:half], branches[half:]
