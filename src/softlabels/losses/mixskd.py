"""MixSKD: a network's answers to mixed images and its mixed answers learn from each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, cast, overload

import torch
from torch import Tensor, nn
from torch.nn import functional

from softlabels.inputs import (
    AuxBranches,
    Features,
    FromBatch,
    Input,
    Logits,
    SecondPass,
    Target,
)
from softlabels.losses._checks import (
    check_choice,
    check_logits,
    check_number,
    check_temperature,
    values_can_be_read,
)
from softlabels.losses._features import Shapes, check_stages
from softlabels.losses._mixskd_adapters import Discriminators, MixSKDHeads, interpolated
from softlabels.losses._non_target import LossOutput, in_float32, label_probabilities
from softlabels.losses.byot import split_branches
from softlabels.losses.kd import kd_loss
from softlabels.losses.label_smoothing import label_smoothing_loss

__all__ = ["MixSKDLoss", "mixskd_loss"]


@overload
def mixskd_loss(
    exit_logits: Sequence[Tensor],
    target: Tensor,
    exit_maps: Sequence[Tensor],
    mixed_exit_logits: Sequence[Tensor],
    mixed_exit_maps: Sequence[Tensor],
    mixup_index: Tensor,
    mixup_weight: Tensor,
    aggregate_logits: Sequence[Tensor],
    discriminator_logits: Sequence[Tensor],
    *,
    temperature: float = 3.0,
    branch_weight: float = 1.0,
    mixed_label_weight: float = 1.0,
    mutual_weight: float = 1.0,
    feature_weight: float = 1.0,
    discriminator_weight: float = 1.0,
    return_parts: Literal[False] = False,
) -> Tensor: ...


@overload
def mixskd_loss(
    exit_logits: Sequence[Tensor],
    target: Tensor,
    exit_maps: Sequence[Tensor],
    mixed_exit_logits: Sequence[Tensor],
    mixed_exit_maps: Sequence[Tensor],
    mixup_index: Tensor,
    mixup_weight: Tensor,
    aggregate_logits: Sequence[Tensor],
    discriminator_logits: Sequence[Tensor],
    *,
    temperature: float = 3.0,
    branch_weight: float = 1.0,
    mixed_label_weight: float = 1.0,
    mutual_weight: float = 1.0,
    feature_weight: float = 1.0,
    discriminator_weight: float = 1.0,
    return_parts: Literal[True],
) -> LossOutput: ...


def mixskd_loss(
    exit_logits: Sequence[Tensor],
    target: Tensor,
    exit_maps: Sequence[Tensor],
    mixed_exit_logits: Sequence[Tensor],
    mixed_exit_maps: Sequence[Tensor],
    mixup_index: Tensor,
    mixup_weight: Tensor,
    aggregate_logits: Sequence[Tensor],
    discriminator_logits: Sequence[Tensor],
    *,
    temperature: float = 3.0,
    branch_weight: float = 1.0,
    mixed_label_weight: float = 1.0,
    mutual_weight: float = 1.0,
    feature_weight: float = 1.0,
    discriminator_weight: float = 1.0,
    return_parts: bool = False,
) -> Tensor | LossOutput:
    r"""MixSKD: what exits say of a mixed image, against the mixture of what they say of its two.

    Yang et al., "MixSKD: Self-Knowledge Distillation from Mixup for Image Recognition", ECCV 2022
    (arXiv 2208.05768), code at github.com/winycg/Self-KD-Lib.

    .. math::
        L = \sum_{l<L} CE(z_l, y) + \Big[\sum_{l} CE(\tilde z_l, \tilde y) + CE(a, \tilde y)
        + CE(\tilde a, \tilde y)\Big] + \sum_l M_l + \sum_l \overline{(\bar F_l - \tilde F_l)^2}
        + \sum_l D_l

    .. math::
        M_l = K(\bar z_l, \tilde z_l) + K(\tilde z_l, \bar z_l) \;(l < L), \qquad
        M_L = K(\bar z_L, \tilde a) + K(\tilde z_L, a), \qquad
        K(p, q) = T^2\, KL(\sigma(q / T) \,\|\, \sigma(p / T))

    with :math:`\bar x = \lambda x + (1 - \lambda) x'`, x' the value of the partner, and q detached.

    =================== =======================================================================
    Symbol              Argument
    =================== =======================================================================
    l, L                an exit, and the final one
    z_l, F_l            `exit_logits[l]` and `exit_maps[l]`, of the batch's own images
    tilde z_l, tilde F  `mixed_exit_logits[l]` and `mixed_exit_maps[l]`, of the mixed images
    a, tilde a          `aggregate_logits`: of the classifier on all exits' features together,
                        interpolated ones and those of the mixed images
    D_l                 binary cross-entropy of `discriminator_logits[l]`, which tell interpolated
                        features, (1, 0), from those of mixed images, (0, 1)
    y, tilde y          `target`, and the labels of the mixed images
    lambda, x'          `mixup_weight`, and what `mixup_index` points to
    T                   `temperature`
    =================== =======================================================================

    The final exit's cross-entropy on the batch's own images is the task's.

    Args:
        exit_logits: [B, C] each, raw logits of the exits, shallow to deep; the final one is last.
            Get the gradient.
        target: [B] class indices, or [B, C] probabilities, of the batch's own images.
        exit_maps: [B, D, H, W], the exits' maps before pooling; exits may differ in D, H and W.
            Get the gradient.
        mixed_exit_logits: As `exit_logits`, of the mixed images. Get the gradient.
        mixed_exit_maps: As `exit_maps`, of the mixed images. Get the gradient.
        mixup_index: [B], the position in the batch of the image that each one is mixed with.
        mixup_weight: [B], in [0, 1], each image's own share.
        aggregate_logits: Two of [B, C]. Get the gradient of their labels alone.
        discriminator_logits: [2 B, 2] for each exit: interpolated features first, then those of
            the mixed images. Get the gradient.
        temperature: T, above 0; unitless.
        branch_weight: Of the exits' cross-entropy on the batch's own images.
        mixed_label_weight: Of all cross-entropy on mixed labels. 0 as in the published CIFAR runs.
        mutual_weight: Of the divergences M.
        feature_weight: Of the squared difference of the maps.
        discriminator_weight: Of the discriminators' terms D.
        return_parts: Also return the summands, as `LossOutput(loss, parts)`: `"branch"`,
            `"mixed_label"`, `"mutual"`, `"feature"` and `"discriminator"`.

    Returns:
        A scalar, the mean over B; logits in nats, at least float32.

    Raises:
        TypeError: Logits, labels or indices of a wrong dtype.
        ValueError: Lists of unequal length, a wrong shape, setting or index.

    Deviations: the published CIFAR script leaves the cross-entropy on mixed labels out of the
    sum, so that the aggregating classifier stays random (`mixed_label_weight=0`); the ImageNet
    script has it, as here. In both, discriminators stay random too, and pull interpolated and
    mixed features apart; `MixSKDLoss` trains them and has their gradient reversed, and
    `discriminators="fixed"` is as published. Own and mixed images run in two forwards, so that
    BatchNorm takes statistics of each apart; published exits repeat the network's own blocks.
    Gradients: the squared difference of the maps is not detached on either side.
    Numerics: log-softmax throughout, computed in float32 or wider, also under autocast.
    Distributed: partners are in the same process's batch.

    Example:
        >>> import torch
        >>> logits, maps = [torch.zeros(2, 4)] * 2, [torch.zeros(2, 3, 2, 2)] * 2
        >>> told = [torch.zeros(4, 2)] * 2
        >>> index, weight = torch.tensor([1, 0]), torch.tensor([0.7, 0.7])
        >>> target = torch.tensor([2, 3])
        >>> mixskd_loss(logits, target, maps, logits, maps, index, weight, logits, told)
        tensor(8.3178)
    """
    _check_settings(
        temperature,
        branch_weight,
        mixed_label_weight,
        mutual_weight,
        feature_weight,
        discriminator_weight,
    )
    lists = (exit_logits, exit_maps, mixed_exit_logits, mixed_exit_maps, discriminator_logits)
    _check_lists(*lists)
    final = exit_logits[-1]
    _check_mixture(mixup_index, mixup_weight, len(final))
    if len(aggregate_logits) != 2:
        raise ValueError(f"aggregate_logits must hold two tensors, got {len(aggregate_logits)}")
    for number, logits in enumerate((*exit_logits, *mixed_exit_logits, *aggregate_logits)):
        check_logits(logits, f"logits {number}", like=final if number else None)

    labels = label_probabilities(target, in_float32(final))
    mixed_labels = interpolated(labels, mixup_index, mixup_weight)
    bar = [interpolated(logits, mixup_index, mixup_weight) for logits in exit_logits]
    bar_maps = [interpolated(feature, mixup_index, mixup_weight) for feature in exit_maps]
    of_bar, of_mixed = aggregate_logits

    def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
        return label_smoothing_loss(logits, labels, smoothing=0.0)

    def learned(learner: Tensor, source: Tensor) -> Tensor:
        return kd_loss(learner, source, temperature=temperature)

    mutual = [learned(bar[-1], of_mixed), learned(mixed_exit_logits[-1], of_bar)]
    for own, mixed in zip(bar[:-1], mixed_exit_logits[:-1], strict=True):
        mutual += [learned(own, mixed), learned(mixed, own)]
    terms = {
        "branch": (branch_weight, [cross_entropy(z, target) for z in exit_logits[:-1]]),
        "mixed_label": (
            mixed_label_weight,
            [cross_entropy(z, mixed_labels) for z in (*mixed_exit_logits, *aggregate_logits)],
        ),
        "mutual": (mutual_weight, mutual),
        "feature": (
            feature_weight,
            [
                (own - in_float32(mixed)).square().mean()
                for own, mixed in zip(bar_maps, mixed_exit_maps, strict=True)
            ],
        ),
        "discriminator": (discriminator_weight, [_told_apart(d) for d in discriminator_logits]),
    }
    zero = bar[-1].new_zeros(())
    parts = {
        name: weight * (torch.stack(values).sum() if values else zero)
        for name, (weight, values) in terms.items()
    }
    output = LossOutput(torch.stack([*parts.values()]).sum(), parts)
    return output if return_parts else output.loss


def _told_apart(logits: Tensor) -> Tensor:
    """Binary cross-entropy of two outputs against (1, 0) in the first half, (0, 1) in the other."""
    first, second = in_float32(logits).chunk(2)
    right = torch.cat((first[:, 0], second[:, 1]))
    wrong = torch.cat((first[:, 1], second[:, 0]))
    return -(functional.logsigmoid(right) + functional.logsigmoid(-wrong)).mean() / 2


def _check_settings(temperature: float, *weights: float) -> None:
    check_temperature(temperature)
    names = ("branch", "mixed_label", "mutual", "feature", "discriminator")
    for name, weight in zip(names, weights, strict=True):
        check_number(f"{name}_weight", weight)


def _check_lists(
    exit_logits: Sequence[Tensor],
    exit_maps: Sequence[Tensor],
    mixed_exit_logits: Sequence[Tensor],
    mixed_exit_maps: Sequence[Tensor],
    discriminator_logits: Sequence[Tensor],
) -> None:
    lists = (exit_logits, exit_maps, mixed_exit_logits, mixed_exit_maps, discriminator_logits)
    counts = [len(values) for values in lists]
    if not exit_logits or len({*counts}) > 1:
        raise ValueError(
            "exit_logits, exit_maps, mixed_exit_logits, mixed_exit_maps and discriminator_logits "
            f"must hold one tensor for each exit and at least one, got {counts}"
        )
    batch_size = len(exit_logits[0])
    for number, (feature, mixed, told) in enumerate(
        zip(exit_maps, mixed_exit_maps, discriminator_logits, strict=True)
    ):
        if feature.dim() != 4 or len(feature) != batch_size or mixed.shape != feature.shape:
            raise ValueError(
                f"maps of exit {number} must be [{batch_size}, D, H, W] and equal in shape, got "
                f"{tuple(feature.shape)} and {tuple(mixed.shape)}"
            )
        if told.shape != (2 * batch_size, 2):
            raise ValueError(
                f"discriminator_logits[{number}] must be [{2 * batch_size}, 2], got "
                f"{tuple(told.shape)}"
            )


def _check_mixture(index: Tensor, weight: Tensor, batch_size: int) -> None:
    if index.is_floating_point() or index.dtype == torch.bool:
        raise TypeError(f"mixup_index must hold positions in the batch, got {index.dtype}")
    for name, values in (("mixup_index", index), ("mixup_weight", weight)):
        if values.shape != (batch_size,):
            raise ValueError(f"{name} must be [{batch_size}], got {tuple(values.shape)}")
    if values_can_be_read(index) and not 0 <= int(index.min()) <= int(index.max()) < batch_size:
        raise ValueError(f"mixup_index must lie in [0, {batch_size}), got {index.tolist()}")


class MixSKDLoss(nn.Module):
    """MixSKD as a module; see `mixskd_loss` for the equation and the weights.

    Args:
        temperature: Above 0.
        branch_weight: Of the exits' cross-entropy on the batch's own images.
        mixed_label_weight: Of all cross-entropy on mixed labels. 0 as in the published CIFAR
            runs, where the aggregating classifier stays as it is drawn.
        mutual_weight: Of the divergences.
        feature_weight: Of the squared difference of the maps.
        discriminator_weight: Of the discriminators' terms.
        discriminators: `"adversarial"`: they are trained, and their gradient is reversed on its
            way into the features, which become alike; `"joint"`: it is not reversed; `"fixed"`:
            they stay as they are drawn, nor is it reversed, as in the published runs.
        stages: Where the exits begin.
    """

    def __init__(
        self,
        *,
        temperature: float = 3.0,
        branch_weight: float = 1.0,
        mixed_label_weight: float = 1.0,
        mutual_weight: float = 1.0,
        feature_weight: float = 1.0,
        discriminator_weight: float = 1.0,
        discriminators: Discriminators = "adversarial",
        stages: tuple[str, ...] = ("stages",),
    ) -> None:
        super().__init__()
        _check_settings(
            temperature,
            branch_weight,
            mixed_label_weight,
            mutual_weight,
            feature_weight,
            discriminator_weight,
        )
        check_choice("discriminators", discriminators, ("adversarial", "joint", "fixed"))
        self.temperature = temperature
        self.branch_weight = branch_weight
        self.mixed_label_weight = mixed_label_weight
        self.mutual_weight = mutual_weight
        self.feature_weight = feature_weight
        self.discriminator_weight = discriminator_weight
        self.discriminators: Discriminators = discriminators
        branches = AuxBranches(stages=check_stages(stages))
        last_map = Features(of="student", stages=("last",), form="map")
        self.inputs: Mapping[str, Input] = {
            "logits": Logits(),
            "target": Target(),
            "branches": branches,
            "last_map": last_map,
            "mixed_logits": SecondPass("mixup", Logits()),
            "mixed_branches": SecondPass("mixup", branches),
            "mixed_last_map": SecondPass("mixup", last_map),
            "mixup_index": FromBatch("mixup_index"),
            "mixup_weight": FromBatch("mixup_weight"),
        }

    def build_adapters(self, shapes: Shapes) -> MixSKDHeads:
        """Build the aggregating classifier and the discriminators, from the shapes of the values.

        Args:
            shapes: By argument; `"branches"` and `"last_map"` give the widths.
        """
        branches = cast("list[tuple[int, ...]]", shapes["branches"])
        last_map = cast("list[tuple[int, ...]]", shapes["last_map"])
        maps = [*branches[len(branches) // 2 :], *last_map]
        return MixSKDHeads(
            [shape[1] for shape in maps],
            cast("tuple[int, ...]", shapes["logits"])[1],
            discriminators=self.discriminators,
            fixed_classifier=self.mixed_label_weight == 0,
        )

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        branches: Sequence[Tensor],
        last_map: Sequence[Tensor],
        mixed_logits: Tensor,
        mixed_branches: Sequence[Tensor],
        mixed_last_map: Sequence[Tensor],
        mixup_index: Tensor,
        mixup_weight: Tensor,
        aggregate_logits: Sequence[Tensor] | None = None,
        discriminator_logits: Sequence[Tensor] | None = None,
        *,
        return_parts: bool = False,
    ) -> Tensor | LossOutput:
        """Compute `mixskd_loss` with this module's settings.

        The last two come from the module that `build_adapters` gives.

        Raises:
            ValueError: They are missing.
        """
        if aggregate_logits is None or discriminator_logits is None:
            raise ValueError(
                "MixSKD needs aggregate_logits and discriminator_logits, got none: they come from "
                "the module that build_heads gives"
            )
        branch_logits, branch_maps = split_branches(branches)
        mixed_branch_logits, mixed_branch_maps = split_branches(mixed_branches)
        output = mixskd_loss(
            [*branch_logits, logits],
            target,
            [*branch_maps, *last_map],
            [*mixed_branch_logits, mixed_logits],
            [*mixed_branch_maps, *mixed_last_map],
            mixup_index,
            mixup_weight,
            aggregate_logits,
            discriminator_logits,
            temperature=self.temperature,
            branch_weight=self.branch_weight,
            mixed_label_weight=self.mixed_label_weight,
            mutual_weight=self.mutual_weight,
            feature_weight=self.feature_weight,
            discriminator_weight=self.discriminator_weight,
            return_parts=True,
        )
        return output if return_parts else output.loss
