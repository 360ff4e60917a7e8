"""MixSKD, self-distillation from mixup: what a network says of mixed images, and mixes, agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from softlabels.inputs import AuxBranches, Features, FromBatch, Input, Logits, SecondPass, Target
from softlabels.losses._checks import check_logits, check_range, values_can_be_read
from softlabels.losses._method import Method, Shapes, Stages, Temperature, Weight
from softlabels.losses._mixskd_adapters import Discriminators, MixSKDAdapters, interpolated
from softlabels.losses._non_target import in_float32, label_probabilities
from softlabels.losses.byot import split_branches
from softlabels.losses.kd import kd_loss
from softlabels.losses.label_smoothing import label_smoothing_loss

__all__ = ["MixSKDLoss"]


class MixSKDLoss(Method, name="mixskd"):
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
    z_l, F_l            logits and map of exit l, of the batch's own images
    tilde z_l, tilde F  the same of the mixed images
    a, tilde a          `aggregate_logits`: of the classifier on all exits' features together,
                        interpolated ones and those of the mixed images
    D_l                 binary cross-entropy of `discriminator_logits[l]`, which tell interpolated
                        features, (1, 0), from those of mixed images, (0, 1)
    y, tilde y          `target`, and the labels of the mixed images
    lambda, x'          `mixup_weight`, and what `mixup_index` points to
    T                   `temperature`
    =================== =======================================================================

    The final exit's cross-entropy on the batch's own images is the task's.

    Deviations: the published CIFAR script leaves the cross-entropy on mixed labels out of the
    sum, so that the aggregating classifier stays random (`mixed_label_weight=0`); the ImageNet
    script has it, as here. In both, discriminators stay random too, and pull interpolated and
    mixed features apart; here they are trained and have their gradient reversed, and
    `discriminators="fixed"` is as published. Own and mixed images run in two forwards, so that
    BatchNorm takes statistics of each apart; published exits repeat the network's own blocks.
    Gradients: the squared difference of the maps is not detached on either side.
    Distributed: partners are in the same process's batch.

    Args:
        temperature: T, above 0; unitless.
        branch_weight: Of the exits' cross-entropy on the batch's own images.
        mixed_label_weight: Of all cross-entropy on mixed labels. 0 as in the published CIFAR
            runs, where the aggregating classifier stays as it is drawn.
        mutual_weight: Of the divergences M.
        feature_weight: Of the squared difference of the maps.
        discriminator_weight: Of the discriminators' terms D.
        discriminators: `"adversarial"`: they are trained, and their gradient is reversed on its
            way into the features, which become alike; `"joint"`: it is not reversed; `"fixed"`:
            they stay as they are drawn, nor is it reversed, as in the published runs.
        stages: Where the exits begin.

    Example:
        >>> import torch
        >>> logits, map, told = torch.zeros(2, 4), torch.zeros(2, 3, 2, 2), torch.zeros(4, 2)
        >>> own = mixed = (logits, [logits, map], [map])  # of one exit and the final one
        >>> index, weight = torch.tensor([1, 0]), torch.tensor([0.7, 0.7])
        >>> learned = ([logits, logits], [told, told])
        >>> MixSKDLoss()(own[0], torch.tensor([2, 3]), *own[1:], *mixed, index, weight, *learned)
        tensor(8.3178)
    """

    temperature: Temperature = 3.0
    branch_weight: Weight = 1.0
    mixed_label_weight: Weight = 1.0
    mutual_weight: Weight = 1.0
    feature_weight: Weight = 1.0
    discriminator_weight: Weight = 1.0
    discriminators: Discriminators = "adversarial"
    stages: Stages = ("stages",)

    of_batch = True

    @property
    def inputs(self) -> Mapping[str, Input]:
        """Exits at these stages, for the batch's own images and for mixed ones."""
        branches = AuxBranches(stages=self.stages)
        last_map = Features(of="student", stages=("last",), form="map")
        return {
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

    def build_adapters(self, shapes: Shapes) -> MixSKDAdapters:
        """The aggregating classifier and the discriminators, as wide as the exits' maps."""
        maps = [*split_branches(shapes["branches"])[1], *shapes["last_map"]]
        return MixSKDAdapters(
            [shape[1] for shape in maps],
            shapes["logits"][1],
            discriminators=self.discriminators,
            fixed_classifier=self.mixed_label_weight == 0,
        )

    def terms(
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
        aggregate_logits: Sequence[Tensor],
        discriminator_logits: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """`"branch"`, `"mixed_label"`, `"mutual"`, `"feature"`, `"discriminator"`: means over B.

        Args:
            logits: [B, C], raw logits of the final exit. Get the gradient.
            target: [B] class indices, or [B, C] probabilities, of the batch's own images.
            branches: Raw logits of the other exits, [B, C] each, shallow to deep, then their maps
                before pooling, [B, D, H, W]; exits may differ in D, H and W. Get the gradient.
            last_map: One of [B, D, H, W], the final exit's map. Gets the gradient.
            mixed_logits: As `logits`, of the mixed images. Get the gradient.
            mixed_branches: As `branches`, of the mixed images. Get the gradient.
            mixed_last_map: As `last_map`, of the mixed images. Gets the gradient.
            mixup_index: [B], the position in the batch of the image that each one is mixed with.
            mixup_weight: [B], in [0, 1], each image's own share.
            aggregate_logits: Two of [B, C]. Get the gradient of their labels alone.
            discriminator_logits: [2 B, 2] for each exit: interpolated features first, then those
                of the mixed images. Get the gradient.
        """
        branch_logits, branch_maps = split_branches(branches)
        mixed_branch_logits, mixed_branch_maps = split_branches(mixed_branches)
        # All exits of each kind, shallow to deep: the final one is last.
        own_logits, own_maps = [*branch_logits, logits], [*branch_maps, *last_map]
        tilde_logits = [*mixed_branch_logits, mixed_logits]
        tilde_maps = [*mixed_branch_maps, *mixed_last_map]
        _check_exits(own_logits, own_maps, tilde_logits, tilde_maps, discriminator_logits)
        _check_mixture(mixup_index, mixup_weight, len(logits))
        if len(aggregate_logits) != 2:
            raise ValueError(f"aggregate_logits must hold two tensors, got {len(aggregate_logits)}")
        for number, found in enumerate(aggregate_logits):
            check_logits(found, f"aggregate_logits[{number}]", like=logits)

        # What is compared with the mixed images: the mixtures of what is said of their two.
        def mixture(values: Tensor) -> Tensor:
            return interpolated(values, mixup_index, mixup_weight)

        mixed_labels = mixture(label_probabilities(target, in_float32(logits)))
        bar_logits = [mixture(z) for z in own_logits]
        bar_maps = [mixture(feature) for feature in own_maps]

        def cross_entropy(z: Tensor, labels: Tensor) -> Tensor:
            return label_smoothing_loss(z, labels, smoothing=0.0)

        def learned(learner: Tensor, source: Tensor) -> Tensor:
            return kd_loss(learner, source, temperature=self.temperature)

        # The final exit learns from the aggregating classifier, the others from each other.
        of_bar, of_mixed = aggregate_logits
        mutual = [learned(bar_logits[-1], of_mixed), learned(tilde_logits[-1], of_bar)]
        for bar, tilde in zip(bar_logits[:-1], tilde_logits[:-1], strict=True):
            mutual += [learned(bar, tilde), learned(tilde, bar)]
        terms = {
            "branch": (self.branch_weight, [cross_entropy(z, target) for z in branch_logits]),
            "mixed_label": (
                self.mixed_label_weight,
                [cross_entropy(z, mixed_labels) for z in (*tilde_logits, *aggregate_logits)],
            ),
            "mutual": (self.mutual_weight, mutual),
            "feature": (
                self.feature_weight,
                [
                    (bar - in_float32(tilde)).square().mean()
                    for bar, tilde in zip(bar_maps, tilde_maps, strict=True)
                ],
            ),
            "discriminator": (
                self.discriminator_weight,
                [_told_apart(told) for told in discriminator_logits],
            ),
        }
        zero = bar_logits[-1].new_zeros(())
        return {
            name: weight * (torch.stack(values).sum() if values else zero)
            for name, (weight, values) in terms.items()
        }


def _told_apart(logits: Tensor) -> Tensor:
    """Binary cross-entropy of two outputs against (1, 0) in the first half, (0, 1) in the other."""
    first, second = in_float32(logits).chunk(2)
    right = torch.cat((first[:, 0], second[:, 1]))
    wrong = torch.cat((first[:, 1], second[:, 0]))
    return -(functional.logsigmoid(right) + functional.logsigmoid(-wrong)).mean() / 2


def _check_exits(
    own_logits: Sequence[Tensor],
    own_maps: Sequence[Tensor],
    mixed_logits: Sequence[Tensor],
    mixed_maps: Sequence[Tensor],
    discriminator_logits: Sequence[Tensor],
) -> None:
    """Check what exits give for own and for mixed images, the final one last."""
    lists = (own_logits, own_maps, mixed_logits, mixed_maps, discriminator_logits)
    counts = [len(values) for values in lists]
    if len({*counts}) > 1:
        raise ValueError(
            "logits and maps of own and of mixed images, and discriminator_logits, must be those "
            f"of the same exits, got {counts} exits"
        )
    final = own_logits[-1]
    check_logits(final)
    for kind, exits in (("own", own_logits), ("mixed", mixed_logits)):
        for number, logits in enumerate(exits):
            check_logits(logits, f"the logits of exit {number} for {kind} images", like=final)
    batch_size = len(final)
    for number, (feature, mixed, told) in enumerate(
        zip(own_maps, mixed_maps, discriminator_logits, strict=True)
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
    if values_can_be_read(index):
        check_range(index, "mixup_index", batch_size)
