"""DDGSD: two views of an image, drawn with the augmentation, teach each other, no teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, overload

from torch import Tensor, nn
from torch.nn import functional

from softlabels.inputs import Features, Input, Logits, SecondPass, Target
from softlabels.losses._checks import (
    check_logits,
    check_number,
    check_target,
    check_temperature,
)
from softlabels.losses._features import check_vectors, the_only
from softlabels.losses._non_target import LossOutput, in_float32
from softlabels.losses.kd import kd_loss

__all__ = ["DDGSDLoss", "ddgsd_loss"]


@overload
def ddgsd_loss(
    logits: Tensor,
    features: Tensor,
    second_logits: Tensor,
    second_features: Tensor,
    target: Tensor,
    *,
    temperature: float = 4.0,
    feature_weight: float = 5e-4,
    second_view_weight: float = 0.5,
    return_parts: Literal[False] = False,
) -> Tensor: ...


@overload
def ddgsd_loss(
    logits: Tensor,
    features: Tensor,
    second_logits: Tensor,
    second_features: Tensor,
    target: Tensor,
    *,
    temperature: float = 4.0,
    feature_weight: float = 5e-4,
    second_view_weight: float = 0.5,
    return_parts: Literal[True],
) -> LossOutput: ...


def ddgsd_loss(
    logits: Tensor,
    features: Tensor,
    second_logits: Tensor,
    second_features: Tensor,
    target: Tensor,
    *,
    temperature: float = 4.0,
    feature_weight: float = 5e-4,
    second_view_weight: float = 0.5,
    return_parts: bool = False,
) -> Tensor | LossOutput:
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
    task's own loss: with a task weight of 0.5 (`recommended_task_weight`) both views together
    count as one mean cross-entropy over all images.

    Args:
        logits: [B, C], raw logits of the first view. Gets the gradient.
        features: [B, D], pooled features of the first view. Gets the gradient.
        second_logits: [B, C], raw logits of the second view. Gets the gradient.
        second_features: [B, D], pooled features of the second view. Gets the gradient.
        target: [B] class indices or [B, C] probabilities, the labels of both views.
        temperature: T, above 0; unitless.
        feature_weight: Of the gap between the features; 0 or more.
        second_view_weight: Of the second view's cross-entropy; 0 or more.
        return_parts: Also return the summands, as `LossOutput(loss, parts)`:
            `"first_divergence"` (the first view learns), `"second_divergence"`,
            `"feature_gap"` and `"second_view"`, weighted.

    Returns:
        A scalar, the mean over B; at least float32.

    Raises:
        TypeError: Logits, features or target of a wrong dtype.
        ValueError: A wrong shape, label or setting.

    Deviations: Self-KD-Lib halves the cross-entropy twice, so that each view has a quarter of
    its mean: a `second_view_weight` and a task weight of 0.25 give that. The feature gap is
    between two scalars, as there; in the paper it is between mean vectors.

    Numerics: log-softmax throughout, in float32 or wider, also under autocast.
    Distributed: the means of the feature gap are those of the process.

    Example:
        >>> import torch
        >>> first, second = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.5]])
        >>> features = torch.ones(1, 4)
        >>> ddgsd_loss(first, features, second, features, torch.tensor([0]))
        tensor(0.8720)
    """
    check_logits(logits)
    check_logits(second_logits, "second_logits", like=logits)
    check_vectors(features, logits, ("features", "logits"))
    check_vectors(features, second_features, ("features", "second_features"), same_widths=True)
    check_target(target, logits)
    _check_settings(temperature, feature_weight, second_view_weight)
    second_logits = in_float32(second_logits)
    gap = in_float32(features).mean() - in_float32(second_features).mean()
    labels = target.long() if target.dim() == 1 else target.to(second_logits.dtype)
    parts = {
        "first_divergence": kd_loss(logits, second_logits, temperature=temperature),
        "second_divergence": kd_loss(second_logits, logits, temperature=temperature),
        "feature_gap": feature_weight * gap.square(),
        "second_view": second_view_weight * functional.cross_entropy(second_logits, labels),
    }
    loss = (
        parts["first_divergence"]
        + parts["second_divergence"]
        + parts["feature_gap"]
        + parts["second_view"]
    )
    return LossOutput(loss, parts) if return_parts else loss


def _check_settings(temperature: float, feature_weight: float, second_view_weight: float) -> None:
    check_temperature(temperature)
    check_number("feature_weight", feature_weight)
    check_number("second_view_weight", second_view_weight)


class DDGSDLoss(nn.Module):
    """DDGSD as a module; see `ddgsd_loss` for the equation and the settings.

    Args:
        temperature: Above 0.
        feature_weight: 0 or more.
        second_view_weight: 0 or more.
    """

    inputs: ClassVar[Mapping[str, Input]] = {
        "logits": Logits(),
        "features": Features(stages=("last",), form="pooled"),
        "second_logits": SecondPass("second_view", Logits()),
        "second_features": SecondPass("second_view", Features(stages=("last",), form="pooled")),
        "target": Target(),
    }
    recommended_weight: ClassVar[float] = 1.0
    recommended_task_weight: ClassVar[float] = 0.5

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        feature_weight: float = 5e-4,
        second_view_weight: float = 0.5,
    ) -> None:
        super().__init__()
        _check_settings(temperature, feature_weight, second_view_weight)
        self.temperature = temperature
        self.feature_weight = feature_weight
        self.second_view_weight = second_view_weight

    def forward(
        self,
        logits: Tensor,
        features: list[Tensor],
        second_logits: Tensor,
        second_features: list[Tensor],
        target: Tensor,
        *,
        return_parts: bool = False,
    ) -> Tensor | LossOutput:
        """Compute `ddgsd_loss` with this module's settings; features are lists of one."""
        output = ddgsd_loss(
            logits,
            the_only("features", features),
            second_logits,
            the_only("second_features", second_features),
            target,
            temperature=self.temperature,
            feature_weight=self.feature_weight,
            second_view_weight=self.second_view_weight,
            return_parts=True,
        )
        return output if return_parts else output.loss
