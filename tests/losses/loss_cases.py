"""The table of losses that the common tests run over, and makers of their inputs.

Shapes: B samples, C classes, K votes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from softlabels import losses

NUM_VOTES = 9

INDICES = "indices"  # [B] class indices
ONE_HOT = "one_hot"  # [B, C], a single label of 1
MIXED = "mixed"  # [B, C], two labels a row, but one in every third row
DENSE = "dense"  # [B, C], every class has a label
NO_TARGET = "no_target"


@dataclass(frozen=True)
class LossCase:
    """One loss with one choice of settings.

    Attributes:
        name: Shown as the test's id.
        function: The pure function.
        module: The module around it.
        inputs: Names of the tensor arguments, in order.
        function_settings: Keyword settings of the function; empty for the defaults.
        module_settings: The same settings for the module, with those that it alone has.
        target_kinds: The kinds of labels that the loss takes.
    """

    name: str
    function: Callable[..., Tensor]
    module: type[nn.Module]
    inputs: tuple[str, ...]
    function_settings: dict[str, object] = field(default_factory=dict)
    module_settings: dict[str, object] = field(default_factory=dict)
    target_kinds: tuple[str, ...] = (INDICES, ONE_HOT, MIXED, DENSE)

    def __call__(self, inputs: dict[str, Tensor], **changes: object) -> Tensor:
        """Call the function with the case's settings; `changes` win over them."""
        return self.function(
            *(inputs[name] for name in self.inputs), **{**self.function_settings, **changes}
        )

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the arguments that get a gradient."""
        return tuple(name for name in self.inputs if name in ("logits", "weak_logits"))

    def make(
        self,
        target_kind: str,
        batch_size: int = 4,
        num_classes: int = 6,
        dtype: torch.dtype = torch.float32,
        scale: float = 2.0,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """Draw inputs; the logits are normal with standard deviation `scale`."""
        generator = torch.Generator().manual_seed(seed)
        inputs: dict[str, Tensor] = {}
        for name in self.inputs:
            if name == "target":
                inputs[name] = make_target(target_kind, batch_size, num_classes, generator)
            elif name == "votes":
                shape = (batch_size, NUM_VOTES)
                inputs[name] = torch.randint(num_classes, shape, generator=generator)
            else:
                drawn = torch.randn(batch_size, num_classes, generator=generator).double()
                inputs[name] = (scale * drawn).to(dtype)
        return inputs


def make_target(kind: str, batch_size: int, num_classes: int, generator: torch.Generator) -> Tensor:
    """Labels of one kind; probabilities are float64 and sum to 1."""
    scores = torch.rand(batch_size, num_classes, generator=generator).double()
    order = scores.argsort(1)
    if kind == INDICES:
        return order[:, 0]
    if kind == DENSE:
        return scores.softmax(1)
    target = torch.zeros(batch_size, num_classes, dtype=torch.float64)
    share = 0.55 + 0.4 * torch.rand(batch_size, 1, generator=generator).double()
    if kind == MIXED:
        share[::3] = 1.0
    elif kind == ONE_HOT:
        share[:] = 1.0
    return target.scatter(1, order[:, :2], torch.cat((share, 1 - share), 1))


CASES = (
    LossCase("nkd", losses.nkd_loss, losses.NKDLoss, ("logits", "teacher_logits", "target")),
    LossCase(
        "nkd_all_labels",
        losses.nkd_loss,
        losses.NKDLoss,
        ("logits", "teacher_logits", "target"),
        {"mixed_target": "all", "temperature": 3.0, "non_target_weight": 0.5},
        {"mixed_target": "all", "temperature": 3.0, "non_target_weight": 0.5},
    ),
    LossCase(
        "kd",
        losses.kd_loss,
        losses.KDLoss,
        ("logits", "teacher_logits"),
        target_kinds=(NO_TARGET,),
    ),
    LossCase(
        "kd_unit_temperature",
        losses.kd_loss,
        losses.KDLoss,
        ("logits", "teacher_logits"),
        {"temperature": 1.0},
        {"temperature": 1.0},
        target_kinds=(NO_TARGET,),
    ),
    LossCase(
        "uskd",
        losses.uskd_loss,
        losses.USKDLoss,
        ("logits", "weak_logits", "target"),
        target_kinds=(INDICES, ONE_HOT, MIXED),
    ),
    LossCase(
        "uskd_log_probability",
        losses.uskd_loss,
        losses.USKDLoss,
        ("logits", "weak_logits", "target"),
        {
            "rank_by": "log_probability",
            "target_weight": 0.1,
            "non_target_weight": 0.7,
            "weak_weight": 0.3,
        },
        {
            "rank_by": "log_probability",
            "target_weight": 0.1,
            "non_target_weight": 0.7,
            "weak_weight": 0.3,
        },
        target_kinds=(INDICES, ONE_HOT, MIXED),
    ),
    LossCase(
        "zipf_ls_votes",
        losses.zipf_ls_loss,
        losses.ZipfLSLoss,
        ("logits", "target", "votes"),
    ),
    LossCase(
        "zipf_ls_logits",
        losses.zipf_ls_loss,
        losses.ZipfLSLoss,
        ("logits", "target"),
        {"mixed_target": "all", "power": 0.5},
        {"mixed_target": "all", "power": 0.5, "rank_from": "logits"},
        target_kinds=(INDICES, ONE_HOT, MIXED),  # dense labels leave no class: see test_zipf_ls
    ),
    LossCase(
        "label_smoothing",
        losses.label_smoothing_loss,
        losses.LabelSmoothingLoss,
        ("logits", "target"),
    ),
    LossCase(
        "label_smoothing_non_target",
        losses.label_smoothing_loss,
        losses.LabelSmoothingLoss,
        ("logits", "target"),
        {"smooth_over": "non_target", "smoothing": 0.3},
        {"smooth_over": "non_target", "smoothing": 0.3},
    ),
)

CASES_AND_KINDS = tuple((case, kind) for case in CASES for kind in case.target_kinds)
CASES_AND_INDICES = tuple((case, case.target_kinds[0]) for case in CASES)
CASES_AND_MAIN_KINDS = tuple(
    (case, kind) for case, kind in CASES_AND_KINDS if kind in (INDICES, MIXED, NO_TARGET)
)


def case_id(value: object) -> str | None:
    """Name of a case, for pytest's ids."""
    return value.name if isinstance(value, LossCase) else None


def gradients(
    case: LossCase, inputs: dict[str, Tensor], **changes: object
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its gradients with respect to the trained inputs (fresh leaves)."""
    leaves = {
        name: tensor.detach().clone().requires_grad_() if name in case.trained else tensor
        for name, tensor in inputs.items()
    }
    loss = case(leaves, **changes)
    loss.sum().backward()
    found: dict[str, Tensor] = {}
    for name in case.trained:
        gradient = leaves[name].grad
        assert gradient is not None, f"{name} got no gradient"
        found[name] = gradient
    return loss.detach(), found
