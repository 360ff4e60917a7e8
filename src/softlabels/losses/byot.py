"""BYOT, be your own teacher: exits of one network learn from its deepest one, no teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from softlabels.inputs import AuxBranches, Features, Input, Logits, Target
from softlabels.losses._checks import check_logits
from softlabels.losses._features import the_only
from softlabels.losses._method import Method, Stages, Temperature, Weight
from softlabels.losses._non_target import in_float32
from softlabels.losses.kd import kd_loss
from softlabels.losses.label_smoothing import label_smoothing_loss

__all__ = ["BYOTLoss", "checked_branches", "split_branches"]


class BYOTLoss(Method, name="byot"):
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
    q^i, q^i_T          softmax of the logits of exit i, and that at the temperature
    q^C                 softmax of `logits`, detached
    F_i, F_C            map of exit i, and `last_map`, detached; the bar is the mean over all but
                        the batch
    y                   `target`
    T                   `temperature`
    alpha, beta, lambda `branch_weight`, `kd_weight`, `feature_weight`
    =================== =======================================================================

    The final exit's own cross-entropy is the task's.

    Deviations: the paper weighs the terms of each exit by 1 - alpha, alpha and lambda; the code
    that is followed by 1, 1 and 0.05. Its feature term is an element mean. Its exits repeat the
    network's own blocks; those of the input `AuxBranches` are plain convolutions.

    Args:
        temperature: T, above 0; unitless.
        branch_weight: Of the exits' cross-entropy.
        kd_weight: Of their divergence from the final prediction.
        feature_weight: Of the squared difference of the maps.
        stages: Where the exits begin.

    Example:
        >>> import torch
        >>> logits, last_map = torch.zeros(1, 4), torch.ones(1, 2, 3, 3)
        >>> BYOTLoss()(logits, torch.tensor([2]), [logits, last_map], [last_map])
        tensor(1.3863)
    """

    temperature: Temperature = 4.0
    branch_weight: Weight = 1.0
    kd_weight: Weight = 1.0
    feature_weight: Weight = 0.05
    stages: Stages = ("stages",)

    @property
    def inputs(self) -> Mapping[str, Input]:
        """Exits at these stages, and what they learn from."""
        return {
            "logits": Logits(),
            "target": Target(),
            "branches": AuxBranches(stages=self.stages),
            "last_map": Features(of="student", stages=("last",), form="map"),
        }

    def terms(
        self,
        logits: Tensor,
        target: Tensor,
        branches: Sequence[Tensor],
        last_map: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """`"branch"`, `"kd"` and `"feature"`, each summed over the exits.

        Args:
            logits: [B, C], raw logits of the final exit. Get no gradient.
            target: [B] class indices, or [B, C] probabilities.
            branches: Raw logits of all exits, [B, C] each, then their maps in the shape of
                `last_map`. Get the gradient.
            last_map: One of [B, D, H, W], the final exit's map before pooling. Gets no gradient.
        """
        branch_logits, branch_maps = checked_branches(branches, logits)
        final_map = the_only("last_map", last_map)
        _check_maps(logits, branch_maps, final_map)
        final, final_map = logits.detach(), in_float32(final_map.detach())
        label, divergence, difference = [], [], []
        for exit_logits, exit_map in zip(branch_logits, branch_maps, strict=True):
            label.append(label_smoothing_loss(exit_logits, target, smoothing=0.0, reduction="none"))
            divergence.append(
                kd_loss(exit_logits, final, temperature=self.temperature, reduction="none")
            )
            gap = in_float32(exit_map) - final_map
            difference.append(gap.square().flatten(1).mean(1))
        return {
            "branch": self.branch_weight * torch.stack(label).sum(0),
            "kd": self.kd_weight * torch.stack(divergence).sum(0),
            "feature": self.feature_weight * torch.stack(difference).sum(0),
        }


def _check_maps(logits: Tensor, branch_maps: Sequence[Tensor], last_map: Tensor) -> None:
    if last_map.dim() != 4 or len(last_map) != len(logits):
        raise ValueError(
            f"last_map must be [{len(logits)}, D, H, W] as the logits, got {tuple(last_map.shape)}"
        )
    for number, exit_map in enumerate(branch_maps):
        if exit_map.shape != last_map.shape:
            raise ValueError(
                f"the map of exit {number} must have the shape of last_map "
                f"{tuple(last_map.shape)}, got {tuple(exit_map.shape)}"
            )


def checked_branches(
    branches: Sequence[Tensor], logits: Tensor
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """`split_branches`, and a check that there is an exit, with logits in the final one's shape."""
    check_logits(logits)
    branch_logits, branch_maps = split_branches(branches)
    if not branch_logits:
        raise ValueError("branches must hold the tensors of at least one exit, got none")
    for number, exit_logits in enumerate(branch_logits):
        check_logits(exit_logits, f"the logits of exit {number}", like=logits)
    return branch_logits, branch_maps


def split_branches(branches: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """What the input `AuxBranches` gives, as logits and maps.

    Raises:
        ValueError: The number of tensors is odd.
    """
    half, rest = divmod(len(branches), 2)
    if rest:
        raise ValueError(f"branches must hold logits and a map of each exit, got {len(branches)}")
    return branches[:half], branches[half:]
