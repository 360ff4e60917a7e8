"""FRSKD: a branch that refines a network's own maps teaches it, without a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, cast, overload

from torch import Tensor, nn

from softlabels.inputs import Features, Input, Logits, Target
from softlabels.losses._checks import (
    check_logits,
    check_number,
    check_temperature,
)
from softlabels.losses._features import Shapes, check_maps, check_stages
from softlabels.losses._frskd_adapters import FRSKDHeads
from softlabels.losses._non_target import LossOutput, reduce_parts
from softlabels.losses.at import at_loss
from softlabels.losses.kd import kd_loss
from softlabels.losses.label_smoothing import label_smoothing_loss

__all__ = ["FRSKDLoss", "frskd_loss"]


@overload
def frskd_loss(
    logits: Tensor,
    target: Tensor,
    maps: Sequence[Tensor],
    branch_logits: Tensor,
    branch_maps: Sequence[Tensor],
    *,
    temperature: float = 4.0,
    branch_weight: float = 1.0,
    kd_weight: float = 2.0,
    attention_weight: float = 100.0,
    return_parts: Literal[False] = False,
) -> Tensor: ...


@overload
def frskd_loss(
    logits: Tensor,
    target: Tensor,
    maps: Sequence[Tensor],
    branch_logits: Tensor,
    branch_maps: Sequence[Tensor],
    *,
    temperature: float = 4.0,
    branch_weight: float = 1.0,
    kd_weight: float = 2.0,
    attention_weight: float = 100.0,
    return_parts: Literal[True],
) -> LossOutput: ...


def frskd_loss(
    logits: Tensor,
    target: Tensor,
    maps: Sequence[Tensor],
    branch_logits: Tensor,
    branch_maps: Sequence[Tensor],
    *,
    temperature: float = 4.0,
    branch_weight: float = 1.0,
    kd_weight: float = 2.0,
    attention_weight: float = 100.0,
    return_parts: bool = False,
) -> Tensor | LossOutput:
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

    Args:
        logits: [B, C], the network's raw logits. Get the gradient of the divergence.
        target: [B] class indices, or [B, C] probabilities.
        maps: [B, D, H, W] of each stage. Get the gradient of the attention.
        branch_logits: [B, C], raw logits of the branch. Get the gradient of the label.
        branch_maps: One for each stage, as large as that of `maps` but for the channels. Get no
            gradient.
        temperature: T, above 0; unitless.
        branch_weight: Of the branch's cross-entropy.
        kd_weight: Of the divergence.
        attention_weight: Of the squared difference of attention.
        return_parts: Also return the summands, as `LossOutput(loss, parts)`: `"branch"`, `"kd"`
            and `"attention"`.

    Returns:
        A scalar, the mean over B; logits in nats, at least float32.

    Raises:
        TypeError: Logits, labels or maps of a wrong dtype.
        ValueError: Lists of unequal length, a wrong shape or setting.

    Deviations: weights 2 and 100 are those of the published commands for CIFAR-100; the code's
    own defaults are 1 and 0. The branch, `FRSKDHeads`, is the published one, but takes maps of any
    sizes, and no ReLU comes before it.
    Numerics: log-softmax throughout, computed in float32 or wider, also under autocast.
    Distributed: each sample by itself; the BatchNorms of the heads are those of the process.

    Example:
        >>> import torch
        >>> logits, maps = torch.zeros(1, 4), [torch.ones(1, 2, 3, 3)]
        >>> frskd_loss(logits, torch.tensor([2]), maps, logits, maps)
        tensor(1.3863)
    """
    check_logits(logits)
    check_logits(branch_logits, "branch_logits", like=logits)
    _check_settings(temperature, branch_weight, kd_weight, attention_weight)
    _check_maps(maps, branch_maps, len(logits))
    output = reduce_parts(
        {
            "branch": branch_weight * label_smoothing_loss(branch_logits, target, smoothing=0.0),
            "kd": kd_weight * kd_loss(logits, branch_logits, temperature=temperature),
            "attention": attention_weight * at_loss(maps, branch_maps),
        },
        "sum",
    )
    return output if return_parts else output.loss


def _check_settings(temperature: float, *weights: float) -> None:
    check_temperature(temperature)
    for name, weight in zip(("branch", "kd", "attention"), weights, strict=True):
        check_number(f"{name}_weight", weight)


def _check_maps(maps: Sequence[Tensor], branch_maps: Sequence[Tensor], batch_size: int) -> None:
    check_maps(maps, branch_maps, ("maps", "branch_maps"), same_sizes=True)
    if len(maps) != len(branch_maps) or len(maps[0]) != batch_size:
        raise ValueError(
            f"maps and branch_maps must hold a map of {batch_size} samples for each stage, got "
            f"{len(maps)} and {len(branch_maps)} maps of {len(maps[0])} samples"
        )


class FRSKDLoss(nn.Module):
    """FRSKD as a module; see `frskd_loss` for the equation and the weights.

    Args:
        temperature: Above 0.
        branch_weight: Of the branch's cross-entropy.
        kd_weight: Of the divergence from the branch's prediction.
        attention_weight: Of the squared difference of attention.
        branch_width: Channels of the branch's maps over those of the network's.
        branch_depth: Depthwise separable convolutions in each of the branch's blocks.
        stages: Whose maps the branch refines.
    """

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        branch_weight: float = 1.0,
        kd_weight: float = 2.0,
        attention_weight: float = 100.0,
        branch_width: int = 2,
        branch_depth: int = 2,
        stages: tuple[str, ...] = ("stages",),
    ) -> None:
        super().__init__()
        _check_settings(temperature, branch_weight, kd_weight, attention_weight)
        for name, value in (("branch_width", branch_width), ("branch_depth", branch_depth)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number above 0, got {value!r}")
        self.temperature = temperature
        self.branch_weight = branch_weight
        self.kd_weight = kd_weight
        self.attention_weight = attention_weight
        self.branch_width = branch_width
        self.branch_depth = branch_depth
        self.inputs: Mapping[str, Input] = {
            "logits": Logits(),
            "target": Target(),
            "maps": Features(of="student", stages=check_stages(stages), form="map"),
        }

    def build_adapters(self, shapes: Shapes) -> FRSKDHeads:
        """Build the branch, from the shapes of the values.

        Args:
            shapes: By argument; `"maps"` gives the widths.
        """
        return FRSKDHeads(
            [shape[1] for shape in cast("list[tuple[int, ...]]", shapes["maps"])],
            cast("tuple[int, ...]", shapes["logits"])[1],
            width=self.branch_width,
            depth=self.branch_depth,
        )

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        maps: Sequence[Tensor],
        branch_logits: Tensor | None = None,
        branch_maps: Sequence[Tensor] | None = None,
        *,
        return_parts: bool = False,
    ) -> Tensor | LossOutput:
        """Compute `frskd_loss` with this module's settings.

        The last two come from the module that `build_adapters` gives.

        Raises:
            ValueError: They are missing.
        """
        if branch_logits is None or branch_maps is None:
            raise ValueError(
                "FRSKD needs branch_logits and branch_maps, got none: they come from the module "
                "that build_heads gives"
            )
        output = frskd_loss(
            logits,
            target,
            maps,
            branch_logits,
            branch_maps,
            temperature=self.temperature,
            branch_weight=self.branch_weight,
            kd_weight=self.kd_weight,
            attention_weight=self.attention_weight,
            return_parts=True,
        )
        return output if return_parts else output.loss
