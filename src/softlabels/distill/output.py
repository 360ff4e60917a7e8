"""What one forward of a `Distiller` gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["StepOutput"]


@dataclass
class StepOutput:
    """What one forward of a `Distiller` gives.

    Attributes:
        loss: Scalar to call `backward()` on.
        logits: [B, C], the student's.
        terms: The summands of `loss`, after their weights, with their gradient: `"task"` and
            `"method"`, or, from a detailed distiller, `"method/NAME"` for each term of the method.
        monitored: Detached scalars that inputs report, such as the agreement of votes.
        heads: The student's logits, and those of other heads that the method reads: what the
            terms pull at.
    """

    loss: Tensor
    logits: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    monitored: dict[str, Tensor] = field(default_factory=dict)
    heads: tuple[Tensor, ...] = ()

    def totals(self) -> dict[str, Tensor]:
        """Detached scalars of any step, detailed or not: `"task"`, `"method"`, and `monitored`."""
        totals: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            of, term = name.partition("/")[0], term.detach()
            totals[of] = totals[of] + term if of in totals else term
        return {**totals, **self.monitored}

    def gradient_shares(self) -> dict[str, Tensor]:
        """Each term's share of the gradient norms on the logits, detached scalars in [0, 1].

        The norm of a term is that of its gradient with respect to all of `heads` together; a
        share is that norm over the sum of all terms' norms. So weights can be set by looking.
        Call it before `loss.backward()`.
        """
        norms: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            found: Sequence[Tensor | None] = (None,)
            if term.requires_grad:
                found = torch.autograd.grad(term, self.heads, retain_graph=True, allow_unused=True)
            squares = [
                gradient.float().square().sum() for gradient in found if gradient is not None
            ]
            norms[name] = torch.stack(squares).sum().sqrt() if squares else term.new_zeros(())
        total = torch.stack(list(norms.values())).sum()
        tiny = torch.finfo(total.dtype).tiny
        return {name: norm / total.clamp(min=tiny) for name, norm in norms.items()}
