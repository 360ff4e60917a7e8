"""DKS, deeply-supervised knowledge synergy: all exits of a network learn from each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations

import torch
from torch import Tensor

from softlabels.inputs import AuxBranches, Input, Logits, Target
from softlabels.losses._method import Method, Share, Stages, Temperature, Weight
from softlabels.losses._soft_target import log_softened
from softlabels.losses.byot import checked_branches
from softlabels.losses.kd import kd_loss
from softlabels.losses.label_smoothing import label_smoothing_loss

__all__ = ["DKSLoss"]


class DKSLoss(Method, name="dks"):
    r"""DKS: the divergence of each exit from each other one, over all ordered pairs.

    Sun et al., "Deeply-supervised Knowledge Synergy", CVPR 2019 (arXiv 1906.00675), code at
    github.com/sundw2014/DKS.

    .. math::
        L = \alpha \sum_{m=1}^{E} CE(p^m, y)
        + \beta\, T^2 \sum_{m \ne n} KL(\tilde p^n \,\|\, \tilde p^m),
        \qquad \tilde p_i = \frac{p_i + \epsilon}{1 + C \epsilon}

    =========== =========================================================================
    Symbol      Argument
    =========== =========================================================================
    m, n        exits; the pairs include the final one, `logits`, the first sum does not
    p^m         softmax of exit m, at the temperature in the second sum
    p^n         the same of exit n, detached
    E           number of exits, the final one not counted
    y           `target`
    T, epsilon  `temperature`, `smoothing`
    alpha, beta `branch_weight`, `kd_weight`
    =========== =========================================================================

    The final exit's own cross-entropy is the task's.

    Deviations: none from the official loss by default; `temperature=4, smoothing=0` is that of
    github.com/winycg/Self-KD-Lib. Published exits repeat the network's own blocks; those of the
    input `AuxBranches` are plain convolutions.
    Numerics: without smoothing, log-softmax throughout.

    Args:
        temperature: T, above 0; unitless.
        smoothing: epsilon, in [0, 1]. Added to each probability before the divergence.
        branch_weight: Of the exits' cross-entropy.
        kd_weight: Of the divergences.
        stages: Where the exits begin.

    Example:
        >>> import torch
        >>> logits, map = torch.zeros(1, 4), torch.zeros(1, 2, 3, 3)
        >>> DKSLoss()(logits, torch.tensor([2]), [logits, map])
        tensor(1.3863)
    """

    temperature: Temperature = 1.0
    smoothing: Share = 1e-8
    branch_weight: Weight = 1.0
    kd_weight: Weight = 1.0
    stages: Stages = ("stages",)

    @property
    def inputs(self) -> Mapping[str, Input]:
        """Exits at these stages, and the final one."""
        return {
            "logits": Logits(),
            "target": Target(),
            "branches": AuxBranches(stages=self.stages),
        }

    def terms(
        self, logits: Tensor, target: Tensor, branches: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """`"branch"` and `"kd"`, summed over the exits and over the pairs.

        Args:
            logits: [B, C], raw logits of the final exit. Get the gradient.
            target: [B] class indices, or [B, C] probabilities.
            branches: Raw logits of all exits, [B, C] each, which get the gradient; then their
                maps, which are not used.
        """
        branch_logits = checked_branches(branches, logits)[0]
        label = [
            label_smoothing_loss(exit_logits, target, smoothing=0.0, reduction="none")
            for exit_logits in branch_logits
        ]
        every = [*branch_logits, logits]
        if self.smoothing:
            divergences = _divergences(every, self.temperature, self.smoothing)
        else:
            divergences = [
                kd_loss(learner, source, temperature=self.temperature, reduction="none")
                for learner, source in permutations(every, 2)
            ]
        return {
            "branch": self.branch_weight * torch.stack(label).sum(0),
            "kd": self.kd_weight * torch.stack(divergences).sum(0),
        }


def _divergences(every: Sequence[Tensor], temperature: float, smoothing: float) -> list[Tensor]:
    """Of the smoothed predictions, [B] for each ordered pair."""
    scale = 1 + smoothing * every[0].shape[1]
    # The denominators cancel in the quotients, but not in front of them.
    smoothed = [log_softened(logits, temperature).exp() + smoothing for logits in every]
    return [
        temperature**2 / scale * (source.detach() * (source.detach().log() - learner.log())).sum(1)
        for learner, source in permutations(smoothed, 2)
    ]
