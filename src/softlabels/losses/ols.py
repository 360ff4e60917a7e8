"""OLS, online label smoothing: soft labels of the classes from last epoch's predictions."""

from __future__ import annotations

from typing import ClassVar, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from softlabels.inputs import Logits, Target
from softlabels.losses._checks import check_logits
from softlabels.losses._features import Values
from softlabels.losses._memory_bank import MemoryBank
from softlabels.losses._method import Defaults, Method, Shapes, Share
from softlabels.losses._non_target import SoftLabels, largest_label
from softlabels.losses._soft_target import log_softened, soft_target_cross_entropy, taken_apart

__all__ = ["InitialLabels", "OLSLoss"]

InitialLabels: TypeAlias = Literal["zeros", "uniform"]


class _ClassLabels(MemoryBank):
    """The soft label of every class, and the sums that will replace it."""

    memory_inputs = ("logits", "target")

    soft_labels: Tensor
    class_sum: Tensor
    class_count: Tensor

    def __init__(
        self, num_classes: int, initial: InitialLabels, keep_confident: float | None
    ) -> None:
        super().__init__()
        value = 1 / num_classes if initial == "uniform" else 0.0
        matrix = torch.full((num_classes, num_classes), value, dtype=torch.float32)
        self.register_buffer("soft_labels", matrix)
        self.register_buffer("class_sum", torch.zeros_like(matrix))
        self.register_buffer("class_count", torch.zeros(num_classes, dtype=torch.float32))
        self.keep_confident = keep_confident

    def forward(self, values: Values) -> dict[str, Tensor]:
        """Add the `soft_target` of the batch."""
        target = cast("Tensor", values["target"])
        if target.dim() == 1:
            return {"soft_target": self.soft_labels[target.long()]}
        with torch.autocast(device_type=target.device.type, enabled=False):
            return {"soft_target": target.to(self.soft_labels.dtype) @ self.soft_labels}

    def after_step(self, values: Values) -> None:
        """Add the predictions that are right to the sums of their classes."""
        logits = cast("Tensor", values["logits"])
        probabilities = log_softened(logits).exp().to(self.class_sum)
        target = cast("Tensor", values["target"])
        classes = largest_label(target)
        correct = (logits.argmax(1) == classes).to(probabilities.dtype)
        # Not index_add_, whose order of summation on accelerators is open: all processes must
        # hold the same to the last bit.
        self.class_sum.index_put_((classes,), probabilities * correct.unsqueeze(1), accumulate=True)
        self.class_count.index_put_((classes,), correct, accumulate=True)

    def after_epoch(self) -> None:
        """Replace the soft labels by the means of the epoch."""
        count = self.class_count.unsqueeze(1)
        found = self.class_sum / count.clamp(min=1)
        if self.keep_confident is not None:
            confident = self.soft_labels.amax(1, keepdim=True) >= self.keep_confident
            found = torch.where(confident, self.soft_labels, found)
        self.soft_labels.copy_(torch.where(count > 0, found, 1 / len(count)))
        self.class_sum.zero_()
        self.class_count.zero_()


class OLSLoss(Method, name="ols"):
    r"""OLS: the cross-entropy with what the network predicted for the class an epoch ago.

    Zhang et al., "Delving Deep into Label Smoothing", IEEE Transactions on Image Processing 2021
    (arXiv 2011.12562); official code zhangchbin/OnlineLabelSmoothing.

    .. math:: L = -\sum_i Q_{t,i} \log S_i

    ========  ==================================================================
    symbol    meaning
    ========  ==================================================================
    S         softmax of `logits`
    t         the labeled class
    Q         matrix [C, C] of soft labels, a row for each class; `soft_target` has
              its row t: the mean softmax, in the epoch before, of the samples of
              class t that were predicted correctly, or 1 / C if there was none
    ========  ==================================================================

    The published objective is :math:`\alpha \cdot` the task's cross-entropy
    :math:`+ (1 - \alpha) L`, with alpha 0.5 (the defaults of both weights); the script for
    fine-grained classes has both weights 1.

    The memory is the matrix, used for a whole epoch, and the sums of the present epoch.

    Deviations: labels may be mixed, which the published code does not take: the soft label is then
    the mean of the rows, weighted with the labels, and a prediction counts for the class with the
    largest label.

    Args:
        initial: The matrix of the first epoch. `"zeros"`, as in the script for CIFAR-100 and
            ImageNet: the first epoch has the task's loss alone; `"uniform"`: 1 / C, as in the
            script for fine-grained classes.
        keep_confident: A class whose soft label has a value of at least this keeps it, unless
            none of its samples was predicted correctly; in [0, 1]. None: no such rule. The
            script for fine-grained classes has 0.88.

    Example:
        >>> import torch
        >>> OLSLoss()(torch.zeros(1, 4), torch.tensor([[0.7, 0.1, 0.1, 0.1]]))
        tensor(1.3863)
    """

    initial: InitialLabels = "zeros"
    keep_confident: Share | None = None

    inputs: ClassVar = {"logits": Logits()}
    adapter_inputs: ClassVar = {"target": Target()}
    defaults = Defaults(weight=0.5, task_weight=0.5)

    def build_adapters(self, shapes: Shapes) -> nn.Module:
        """The matrix of soft labels, which makes the `soft_target` of a batch."""
        num_classes = shapes["logits"][1]
        return _ClassLabels(num_classes, self.initial, self.keep_confident)

    def terms(self, logits: Tensor, soft_target: Tensor) -> dict[str, Tensor]:
        """`"soft"`.

        Args:
            logits: [B, C], raw logits. Get the gradient.
            soft_target: [B, C], the soft label of each sample; a row of zeros counts nothing.
                Gets none.
        """
        check_logits(logits)
        check_logits(soft_target, "soft_target", like=logits)
        return {"soft": soft_target_cross_entropy(logits, soft_target)}

    def soft_labels(self, logits: Tensor, soft_target: Tensor, target: Tensor) -> SoftLabels:
        """What the network predicted for the class in the epoch before."""
        return taken_apart(soft_target, target)
