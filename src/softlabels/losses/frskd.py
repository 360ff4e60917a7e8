"""FRSKD, feature refinement by self-distillation: a branch that refines the maps teaches them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from softlabels.inputs import Features, Input, Logits, Target
from softlabels.losses._checks import check_logits
from softlabels.losses._features import check_maps, paired_maps
from softlabels.losses._frskd_adapters import FRSKDAdapters
from softlabels.losses._method import Count, Method, Shapes, Stages, Temperature, Weight
from softlabels.losses.at import attention
from softlabels.losses.kd import kd_loss
from softlabels.losses.label_smoothing import label_smoothing_loss

__all__ = ["FRSKDLoss"]


class FRSKDLoss(Method, name="frskd"):
    r"""FRSKD: the network learns the predictions and the attention of a branch on its own maps.

    Ji et al., "Refine Myself by Teaching Myself: Feature Refinement via Self-Knowledge
    Distillation", CVPR 2021 (arXiv 2103.08273), code at github.com/MingiJi/FRSKD.

    .. math::
        L = \gamma\, CE(\hat z, y) + \alpha\, T^2\, KL(\sigma(\hat z / T) \,\|\, \sigma(z / T))
        + \beta \sum_{l} \overline{(A(F_l) - A(\hat F_l))^2}

    =================== =======================================================================
    Symbol              Argument
    =================== =======================================================================
    z, F_l              `logits`, `maps`
    hat z, hat F_l      `branch_logits`, `branch_maps`; detached but for the first term
    A                   mean square over the channels, L2-normalized over the positions; the bar
                        is the mean over positions
    y                   `target`
    T                   `temperature`
    gamma, alpha, beta  `branch_weight`, `kd_weight`, `attention_weight`
    =================== =======================================================================

    The final exit's own cross-entropy is the task's.

    Deviations: weights 2 and 100 are those of the published commands for CIFAR-100; the code's
    own defaults are 1 and 0. The branch, `FRSKDAdapters`, is the published one, but takes maps of
    any sizes, and no ReLU comes before it.
    Distributed: each sample by itself; the BatchNorms of the branch are those of the process.

    Args:
        temperature: T, above 0; unitless.
        branch_weight: Of the branch's cross-entropy.
        kd_weight: Of the divergence from the branch's prediction.
        attention_weight: Of the squared difference of attention.
        branch_width: Channels of the branch's maps over those of the network's.
        branch_depth: Depthwise separable convolutions in each of the branch's blocks.
        stages: Whose maps the branch refines.

    Example:
        >>> import torch
        >>> logits, maps = torch.zeros(1, 4), [torch.ones(1, 2, 3, 3)]
        >>> FRSKDLoss()(logits, torch.tensor([2]), maps, logits, maps)
        tensor(1.3863)
    """

    temperature: Temperature = 4.0
    branch_weight: Weight = 1.0
    kd_weight: Weight = 2.0
    attention_weight: Weight = 100.0
    branch_width: Count = 2
    branch_depth: Count = 2
    stages: Stages = ("stages",)

    of_batch = True

    @property
    def inputs(self) -> Mapping[str, Input]:
        """The network's own maps at these stages."""
        return {
            "logits": Logits(),
            "target": Target(),
            "maps": Features(of="student", stages=self.stages, form="map"),
        }

    def build_adapters(self, shapes: Shapes) -> FRSKDAdapters:
        """The branch, whose widths follow from those of `maps`."""
        return FRSKDAdapters(
            [shape[1] for shape in shapes["maps"]],
            shapes["logits"][1],
            width=self.branch_width,
            depth=self.branch_depth,
        )

    def terms(
        self,
        logits: Tensor,
        target: Tensor,
        maps: Sequence[Tensor],
        branch_logits: Tensor,
        branch_maps: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """`"branch"`, `"kd"` and `"attention"`, means over B.

        Args:
            logits: [B, C], the network's raw logits. Get the gradient of the divergence.
            target: [B] class indices, or [B, C] probabilities.
            maps: [B, D, H, W] of each stage. Get the gradient of the attention.
            branch_logits: [B, C], raw logits of the branch. Get the gradient of the label.
            branch_maps: One for each stage, as large as that of `maps` but for the channels. Get
                no gradient.
        """
        check_logits(logits)
        check_logits(branch_logits, "branch_logits", like=logits)
        _check_maps(maps, branch_maps, len(logits))
        gaps = [
            (attention(own) - attention(refined)).square().mean()
            for own, refined in paired_maps(maps, branch_maps)
        ]
        label = label_smoothing_loss(branch_logits, target, smoothing=0.0)
        divergence = kd_loss(logits, branch_logits, temperature=self.temperature)
        return {
            "branch": self.branch_weight * label,
            "kd": self.kd_weight * divergence,
            "attention": self.attention_weight * torch.stack(gaps).sum(),
        }


def _check_maps(maps: Sequence[Tensor], branch_maps: Sequence[Tensor], batch_size: int) -> None:
    check_maps(maps, branch_maps, ("maps", "branch_maps"), same_sizes=True)
    if len(maps) != len(branch_maps) or len(maps[0]) != batch_size:
        raise ValueError(
            f"maps and branch_maps must hold a map of {batch_size} samples for each stage, got "
            f"{len(maps)} and {len(branch_maps)} maps of {len(maps[0])} samples"
        )
