"""A method's loss beside its terms, of one call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from softlabels.losses import Method


class LossAndTerms(NamedTuple):
    """What a call and `reduced` give for the same inputs and the same draws."""

    loss: Tensor
    terms: dict[str, Tensor]


def loss_and_terms(method: Method, *inputs: Any, **named: Any) -> LossAndTerms:
    """Call a method both ways; of `named` with what its terms take."""
    named = method.arguments_of(named)
    state = torch.get_rng_state()
    loss = method(*inputs, **named)
    torch.set_rng_state(state)
    return LossAndTerms(loss, method.reduced(*inputs, **named))
