"""SRRL, softmax regression representation learning: L2 of features, and of what is read of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from softlabels.inputs import Classifier, Features, TeacherLogits
from softlabels.losses._checks import check_logits
from softlabels.losses._features import LevelAdapters, check_maps
from softlabels.losses._method import Method, Shapes, Weight
from softlabels.losses._non_target import in_float32

__all__ = ["SRRLLoss"]


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


class SRRLLoss(Method, name="srrl"):
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
    W, b        `classifier`: the teacher's last layer
    z           `teacher_logits`, [C]
    alpha       `feature_weight`
    beta        `logit_weight`
    ==========  ==================================================================

    The teacher must pool its last map to the vector that its classifier reads, as convolutional
    networks do; a class token would not be compared.

    Args:
        feature_weight: alpha, 0 or more.
        logit_weight: beta, 0 or more. 1 in the official code and on ImageNet, 5 for CIFAR-100
            in yzd-v/cls_KD.

    Deviations: none. Both terms are means over channels or classes, as in the published code;
    the maps may differ in size, since only their means are compared.
    Distributed: each sample by itself; the adapter's BatchNorm has the statistics of this process.

    Example:
        >>> import torch
        >>> ones = torch.ones(1, 2, 1, 1)
        >>> classifier = [torch.eye(2), torch.zeros(2)]
        >>> SRRLLoss()([ones], [2 * ones], classifier, torch.tensor([[3.0, 1.0]]))
        tensor(3.)
    """

    feature_weight: Weight = 1.0
    logit_weight: Weight = 1.0

    inputs: ClassVar = {
        "student_map": Features(of="student", stages=("last",), form="map"),
        "teacher_map": Features(of="teacher", stages=("last",), form="map"),
        "classifier": Classifier(),
        "teacher_logits": TeacherLogits(),
    }
    of_batch = True

    def build_adapters(self, shapes: Shapes) -> nn.Module:
        """A 1x1 convolution, BatchNorm and ReLU, to the width of the teacher's map."""
        (student,) = cast("list[tuple[int, ...]]", shapes["student_map"])
        (teacher,) = cast("list[tuple[int, ...]]", shapes["teacher_map"])
        convolution = nn.Conv2d(student[1], teacher[1], 1, bias=False)
        aligned = nn.Sequential(convolution, nn.BatchNorm2d(teacher[1]), nn.ReLU())
        return LevelAdapters([aligned], "student_map")

    def terms(
        self,
        student_map: Sequence[Tensor],
        teacher_map: Sequence[Tensor],
        classifier: Sequence[Tensor],
        teacher_logits: Tensor,
    ) -> dict[str, Tensor]:
        """`"feature"` and `"logit"`, weighted scalars.

        Args:
            student_map: List of one [B, D, H, W], aligned by the adapters. Gets the gradient, of
                both terms.
            teacher_map: List of one [B, D, H', W'], the map that the teacher's classifier reads
                once pooled. Gets none.
            classifier: Weight, [C, D], and bias, [C]. Get none, but let it through to the student.
            teacher_logits: [B, C], raw. Gets none.
        """
        (ours,), (theirs,) = student_map, teacher_map
        weight, bias = classifier
        check_maps([ours], [theirs], ("student_map", "teacher_map"), same_widths=True)
        check_logits(teacher_logits, "teacher_logits")
        _check_classifier(weight, bias, ours, teacher_logits)
        pooled = in_float32(ours).mean((2, 3))

        def constant(tensor: Tensor) -> Tensor:
            return in_float32(tensor.detach()).to(pooled.dtype)

        wanted = in_float32(theirs.detach()).mean((2, 3)).to(pooled.dtype)
        with torch.autocast(device_type=pooled.device.type, enabled=False):
            read = functional.linear(pooled, constant(weight), constant(bias))
        return {
            "feature": self.feature_weight * (pooled - wanted).square().mean(),
            "logit": self.logit_weight * (read - constant(teacher_logits)).square().mean(),
        }
