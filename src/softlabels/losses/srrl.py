"""SRRL: the student's feature, read by the teacher's own classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, cast, overload

import torch
from torch import Tensor, nn
from torch.nn import functional

from softlabels.inputs import Classifier, Features, Input, TeacherLogits
from softlabels.losses._checks import check_logits, check_number
from softlabels.losses._features import check_maps
from softlabels.losses._non_target import LossOutput, in_float32

__all__ = ["SRRLLoss", "srrl_loss"]


@overload
def srrl_loss(
    student_map: Tensor,
    teacher_map: Tensor,
    classifier_weight: Tensor,
    classifier_bias: Tensor,
    teacher_logits: Tensor,
    *,
    feature_weight: float = 1.0,
    logit_weight: float = 1.0,
    return_parts: Literal[False] = False,
) -> Tensor: ...


@overload
def srrl_loss(
    student_map: Tensor,
    teacher_map: Tensor,
    classifier_weight: Tensor,
    classifier_bias: Tensor,
    teacher_logits: Tensor,
    *,
    feature_weight: float = 1.0,
    logit_weight: float = 1.0,
    return_parts: Literal[True],
) -> LossOutput: ...


def srrl_loss(
    student_map: Tensor,
    teacher_map: Tensor,
    classifier_weight: Tensor,
    classifier_bias: Tensor,
    teacher_logits: Tensor,
    *,
    feature_weight: float = 1.0,
    logit_weight: float = 1.0,
    return_parts: bool = False,
) -> Tensor | LossOutput:
    r"""SRRL: the student's feature is that of the teacher, also to the teacher's classifier.

    Yang et al., "Knowledge Distillation via Softmax Regression Representation Learning",
    ICLR 2021; official code jingyang2017/KD_SRRL.

    .. math::
        L = \frac{\alpha}{D} \big\| \bar f - \bar g \big\|^2
            + \frac{\beta}{C} \big\| W \bar f + b - z \big\|^2

    ==========  ==================================================================
    symbol      meaning
    ==========  ==================================================================
    f, g        `student_map`, brought to the teacher's width, and `teacher_map`; the
                bar is their mean over positions, [D]
    W, b        `classifier_weight`, `classifier_bias`: the teacher's last layer
    z           `teacher_logits`, [C]
    alpha       `feature_weight`
    beta        `logit_weight`
    ==========  ==================================================================

    It is *added* to the task's own loss (cross-entropy), with weight 1.

    Args:
        student_map: [B, D, H, W], after the head that `SRRLLoss.build_adapters` makes. Gets the
            gradient, of both terms.
        teacher_map: [B, D, H', W'], the map that the teacher's classifier reads once pooled.
            Gets none.
        classifier_weight: [C, D]. Gets none, but lets it through to the student.
        classifier_bias: [C]. Gets none.
        teacher_logits: [B, C], raw. Gets none.
        feature_weight: alpha, 0 or more.
        logit_weight: beta, 0 or more. 1 in the official code and on ImageNet, 5 for CIFAR-100
            in yzd-v/cls_KD.
        return_parts: Also return the summands, as `LossOutput(loss, parts)`: `"feature"`,
            `"logit"`, weighted.

    Returns:
        A scalar, the mean over B; at least float32.

    Raises:
        TypeError: A tensor of a wrong dtype.
        ValueError: Shapes that do not fit, or a wrong setting.

    Deviations: none. Both terms are means over channels or classes, as in the published code;
    the maps may differ in size, since only their means are compared.
    Numerics: computed in float32 or wider, also under autocast.
    Distributed: each sample by itself; the head's BatchNorm has the statistics of this process.

    Example:
        >>> import torch
        >>> ones = torch.ones(1, 2, 1, 1)
        >>> srrl_loss(ones, 2 * ones, torch.eye(2), torch.zeros(2), torch.tensor([[3.0, 1.0]]))
        tensor(3.)
    """
    check_maps([student_map], [teacher_map], ("student_map", "teacher_map"), same_widths=True)
    check_logits(teacher_logits, "teacher_logits")
    _check_classifier(classifier_weight, classifier_bias, student_map, teacher_logits)
    check_number("feature_weight", feature_weight)
    check_number("logit_weight", logit_weight)
    pooled = in_float32(student_map).mean((2, 3))

    def constant(tensor: Tensor) -> Tensor:
        return in_float32(tensor.detach()).to(pooled.dtype)

    wanted = in_float32(teacher_map.detach()).mean((2, 3)).to(pooled.dtype)
    with torch.autocast(device_type=pooled.device.type, enabled=False):
        read = functional.linear(pooled, constant(classifier_weight), constant(classifier_bias))
    parts = {
        "feature": feature_weight * (pooled - wanted).square().mean(),
        "logit": logit_weight * (read - constant(teacher_logits)).square().mean(),
    }
    loss = parts["feature"] + parts["logit"]
    return LossOutput(loss, parts) if return_parts else loss


def _check_classifier(
    weight: Tensor, bias: Tensor, student_map: Tensor, teacher_logits: Tensor
) -> None:
    batch_size, num_classes = teacher_logits.shape
    if batch_size != student_map.shape[0]:
        raise ValueError(
            f"teacher_logits must hold {student_map.shape[0]} samples as student_map, "
            f"got {batch_size}"
        )
    wanted = (num_classes, student_map.shape[1])
    if weight.shape != wanted or bias.shape != (num_classes,):
        raise ValueError(
            f"the classifier must have a weight of {wanted} and a bias of ({num_classes},), for "
            f"maps of {student_map.shape[1]} channels and {num_classes} classes, "
            f"got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )


class _Aligned(nn.Module):
    """Brings the student's map to the teacher's width: 1x1 convolution, BatchNorm, ReLU."""

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(student_width, teacher_width, 1, bias=False)
        self.bn = nn.BatchNorm2d(teacher_width)

    def forward(self, values: Mapping[str, Tensor | list[Tensor]]) -> dict[str, list[Tensor]]:
        """Replace `student_map`."""
        (student_map,) = values["student_map"]
        return {"student_map": [self.bn(self.conv(student_map)).relu()]}


class SRRLLoss(nn.Module):
    """SRRL as a module; see `srrl_loss` for the equation.

    The teacher must pool its last map to the vector that its classifier reads, as convolutional
    networks do; a class token would not be compared.

    Args:
        feature_weight: 0 or more.
        logit_weight: 0 or more.
    """

    inputs: ClassVar[Mapping[str, Input]] = {
        "student_map": Features(of="student", stages=("last",), form="map"),
        "teacher_map": Features(of="teacher", stages=("last",), form="map"),
        "classifier": Classifier(),
        "teacher_logits": TeacherLogits(),
    }

    def __init__(self, *, feature_weight: float = 1.0, logit_weight: float = 1.0) -> None:
        super().__init__()
        check_number("feature_weight", feature_weight)
        check_number("logit_weight", logit_weight)
        self.feature_weight = feature_weight
        self.logit_weight = logit_weight

    def build_adapters(
        self, shapes: Mapping[str, tuple[int, ...] | list[tuple[int, ...]]]
    ) -> nn.Module:
        """A 1x1 convolution, BatchNorm and ReLU, to the width of the teacher's map."""
        (student,) = cast("list[tuple[int, ...]]", shapes["student_map"])
        (teacher,) = cast("list[tuple[int, ...]]", shapes["teacher_map"])
        return _Aligned(student[1], teacher[1])

    def forward(
        self,
        student_map: Sequence[Tensor],
        teacher_map: Sequence[Tensor],
        classifier: Sequence[Tensor],
        teacher_logits: Tensor,
        *,
        return_parts: bool = False,
    ) -> Tensor | LossOutput:
        """Compute `srrl_loss` with this module's settings, on an aligned student map."""
        (student,), (teacher,) = student_map, teacher_map
        weight, bias = classifier
        output = srrl_loss(
            student,
            teacher,
            weight,
            bias,
            teacher_logits,
            feature_weight=self.feature_weight,
            logit_weight=self.logit_weight,
            return_parts=True,
        )
        return output if return_parts else output.loss
