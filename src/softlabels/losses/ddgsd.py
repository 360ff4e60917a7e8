"""DDGSD, data-distortion guided: predictions and features of two views of an image agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from softlabels.inputs import Features, Logits, SecondPass, Target
from softlabels.losses._checks import check_logits
from softlabels.losses._features import check_vectors, the_only
from softlabels.losses._method import Defaults, Method, Temperature, Weight
from softlabels.losses._non_target import in_float32
from softlabels.losses.kd import kd_loss
from softlabels.losses.label_smoothing import label_smoothing_loss

__all__ = ["DDGSDLoss"]


class DDGSDLoss(Method, name="ddgsd"):
    r"""DDGSD: predictions and mean features of two views of the same images agree.

    Xu and Liu, "Data-Distortion Guided Self-Distillation for Deep Neural Networks", AAAI 2019;
    no official code. The values are those of winycg/Self-KD-Lib.

    .. math::
        L = T^2 KL(p_b \| p_a) + T^2 KL(p_a \| p_b)
        + \mu (\bar h_a - \bar h_b)^2 + \lambda \, CE(p_b, y)

    =============  ==================================================================
    symbol         here
    =============  ==================================================================
    a, b           the first view (the batch's own images), and the second
    p              softmax of the view's logits / T; in the last term at T = 1
    T              `temperature`
    :math:`\bar h` mean of the view's features over batch and channels, a scalar
    :math:`\mu`    `feature_weight`
    :math:`\lambda` `second_view_weight`
    y              `target`
    =============  ==================================================================

    The first distribution of each KL is constant. The cross-entropy of the first view is the
    task's own loss: with a task weight of 0.5 (`defaults.task_weight`) both views together
    count as one mean cross-entropy over all images.

    Args:
        temperature: T, above 0; unitless.
        feature_weight: Of the gap between the features; 0 or more.
        second_view_weight: Of the second view's cross-entropy; 0 or more.

    Deviations: Self-KD-Lib halves the cross-entropy twice, so that each view has a quarter of
    its mean: a `second_view_weight` and a task weight of 0.25 give that. The feature gap is
    between two scalars, as there; in the paper it is between mean vectors.
    Distributed: the means of the feature gap are those of the process.

    Example:
        >>> import torch
        >>> first, second = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.5]])
        >>> features = torch.ones(1, 4)
        >>> DDGSDLoss()(first, [features], second, [features], torch.tensor([0]))
        tensor(0.8720)
    """

    temperature: Temperature = 4.0
    feature_weight: Weight = 5e-4
    second_view_weight: Weight = 0.5

    inputs: ClassVar = {
        "logits": Logits(),
        "features": Features(stages=("last",), form="pooled"),
        "second_logits": SecondPass("second_view", Logits()),
        "second_features": SecondPass("second_view", Features(stages=("last",), form="pooled")),
        "target": Target(),
    }
    defaults = Defaults(task_weight=0.5)
    of_batch = True

    def terms(
        self,
        logits: Tensor,
        features: Sequence[Tensor],
        second_logits: Tensor,
        second_features: Sequence[Tensor],
        target: Tensor,
    ) -> dict[str, Tensor]:
        """`"first_divergence"`, `"second_divergence"`, `"feature_gap"` and `"second_view"`."""
        first = the_only("features", features)
        second = the_only("second_features", second_features)
        temperature = self.temperature
        check_logits(logits)
        check_logits(second_logits, "second_logits", like=logits)
        check_vectors(first, logits, ("features", "logits"))
        check_vectors(first, second, ("features", "second_features"), same_widths=True)
        gap = in_float32(first).mean() - in_float32(second).mean()
        second_label = label_smoothing_loss(second_logits, target, smoothing=0.0)
        return {
            "first_divergence": kd_loss(logits, second_logits, temperature=temperature),
            "second_divergence": kd_loss(second_logits, logits, temperature=temperature),
            "feature_gap": self.feature_weight * gap.square(),
            "second_view": self.second_view_weight * second_label,
        }
