"""PS-KD, progressive self-distillation: each sample's own prediction of an epoch ago."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from softlabels.inputs import FromBatch, Logits, Target
from softlabels.losses._checks import check_logits
from softlabels.losses._memory_bank import MemoryBank, check_memory, known_size
from softlabels.losses._method import Count, Defaults, Method, Positive, Shapes
from softlabels.losses._non_target import SoftLabels, label_probabilities
from softlabels.losses._soft_target import log_softened, soft_target_cross_entropy, taken_apart

__all__ = ["PSKDLoss"]


class _Predictions(MemoryBank):
    """The last prediction of every sample of the training set."""

    memory_inputs = ("logits", "index")

    predictions: Tensor
    seen: Tensor

    def __init__(self, num_samples: int, num_classes: int) -> None:
        super().__init__()
        # float32 whatever the default: half of it would not tell small probabilities apart.
        store = torch.zeros(num_samples, num_classes, dtype=torch.float32)
        self.register_buffer("predictions", store)
        self.register_buffer("seen", torch.zeros(num_samples, dtype=torch.bool))

    def forward(self, values: Mapping[str, Tensor | list[Tensor]]) -> dict[str, Tensor]:
        """Add the `past_prediction` of the batch: of an unseen sample its label."""
        index = cast("Tensor", values["index"]).long()
        past = self.predictions[index]
        label = label_probabilities(cast("Tensor", values["target"]), past)
        return {"past_prediction": torch.where(self.seen[index].unsqueeze(1), past, label)}

    def after_step(self, values: Mapping[str, Tensor | list[Tensor]]) -> None:
        """Overwrite the rows of the batch with its predictions."""
        predictions = log_softened(cast("Tensor", values["logits"])).exp()
        index = cast("Tensor", values["index"]).long()
        # A sample may come twice, where processes fill up the last batch: its last prediction
        # is written both times, since the order of two writes is not defined.
        order = index.argsort(stable=True)
        last = order[torch.searchsorted(index[order], index, right=True) - 1]
        self.predictions[index] = predictions[last].to(self.predictions)
        self.seen.index_fill_(0, index, True)


class PSKDLoss(Method, name="ps_kd"):
    r"""PS-KD: the cross-entropy with the sample's own prediction of an earlier epoch.

    Kim et al., "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021
    (arXiv 2006.12000); official code lgcnsai/PS-KD-Pytorch.

    .. math:: L = -\sum_i P_i \log S_i

    ========  ==================================================================
    symbol    meaning
    ========  ==================================================================
    S         softmax of `logits`
    P         `past_prediction`
    ========  ==================================================================

    The published objective, one cross-entropy with the target
    :math:`(1 - \alpha_t) y + \alpha_t P`, is :math:`(1 - \alpha_t) \cdot` the task's
    cross-entropy :math:`+ \alpha_t L`. There :math:`\alpha_t = 0.8 \, e / E` in epoch e of E,
    counted from 1: a method weight that grows to 0.8 (`PSKDLoss.defaults.weight`), beside a
    task weight of one minus it.

    Its memory holds a prediction of each training sample, taken in training mode when the sample
    was last seen. Predictions of mixed images (mixup, cutmix) are remembered as those of the
    sample whose index they have.

    Args:
        num_samples: Size of the training set; the trainer fills it in.
        most_memory: GiB that the memory may take, above 0.

    Deviations: none in the loss. The memory (`PSKDLoss.build_adapters`) is on the device and in
    each checkpoint; the published code keeps it on the host.

    Example:
        >>> import torch
        >>> PSKDLoss()(torch.zeros(1, 4), torch.tensor([[0.7, 0.1, 0.1, 0.1]]))
        tensor(1.3863)
    """

    num_samples: Count | None = None
    most_memory: Positive = 8.0

    inputs: ClassVar = {"logits": Logits()}
    adapter_inputs: ClassVar = {"target": Target(), "index": FromBatch("index")}
    defaults = Defaults(weight=0.8, task_weight="rest", warmup="run")

    def build_adapters(self, shapes: Shapes) -> nn.Module:
        """The memory, [n, C] in float32 and who of the n samples was seen.

        Raises:
            ValueError: `num_samples` is not known, or the memory would take too much.
        """
        num_classes = shapes["logits"][1]
        num_samples = known_size("PS-KD", self.num_samples)
        what = f"PS-KD's memory of {num_samples} samples of {num_classes} classes"
        check_memory(what, num_samples * (4 * num_classes + 1), self.most_memory)
        return _Predictions(num_samples, num_classes)

    def terms(self, logits: Tensor, past_prediction: Tensor) -> dict[str, Tensor]:
        """`"past"`.

        Args:
            logits: [B, C], raw logits. Gets the gradient.
            past_prediction: [B, C], probabilities; the label where there is no earlier prediction.
                Gets none.
        """
        check_logits(logits)
        check_logits(past_prediction, "past_prediction", like=logits)
        return {"past": soft_target_cross_entropy(logits, past_prediction)}

    def soft_labels(self, logits: Tensor, past_prediction: Tensor, target: Tensor) -> SoftLabels:
        """The sample's earlier prediction, whose share in the target grows with the epochs."""
        return taken_apart(past_prediction, target)
