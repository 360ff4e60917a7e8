"""What is trained: the student and the learned parts beside it, in one module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from softlabels.distill.external_inputs import images_key
from softlabels.distill.provider import Provider, Value
from softlabels.distill.student_inputs import provider_for
from softlabels.inputs import Input, SecondPass
from softlabels.taps import FeatureTap, Layout

__all__ = ["PassOf", "Trainable", "provided"]


@dataclass(frozen=True)
class PassOf:
    """From which forward of the student an argument comes, and who provides it.

    Attributes:
        provider: Name of the provider.
        images: Name of the batch's extra with the images; None: the batch's own.
        gradient: Whether the forward is trained through.
    """

    provider: str
    images: str | None = None
    gradient: bool = True


class Trainable(nn.Module):
    """All that is trained: the student and the learned parts beside it.

    This alone is compiled, wrapped by DDP, copied for EMA and stored. Its forward returns a
    dictionary of tensors: the logits, and each value that the method reads.

    Args:
        student: The plain network.
        providers: What provides the inputs from the student, by name.
        adapters: The method's own learned parts, or None.
        passes: Where each argument of the method comes from; None: each from the provider of its
            name, on the batch's own images.
        peer: A second network that is trained along, or None.
        peer_arguments: Arguments of the method that are the peer's logits.
    """

    def __init__(
        self,
        student: nn.Module,
        providers: Mapping[str, Provider],
        adapters: nn.Module | None = None,
        *,
        passes: Mapping[str, PassOf] | None = None,
        peer: nn.Module | None = None,
        peer_arguments: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.student = student
        self.providers = nn.ModuleDict(providers)
        self.adapters = adapters
        self.peer = peer
        self.peer_arguments = peer_arguments
        self.passes = dict(passes or {name: PassOf(name) for name in providers})
        of_batch = [(pass_of.images, pass_of.gradient) for pass_of in self.passes.values()]
        self._further = [*dict.fromkeys(key for key in of_batch if key[0] is not None)]
        points = {point for p in providers.values() for point in p.points}
        self.tap = FeatureTap(student, sorted({point.key for point in points}))
        self.tap.enabled = False

    def forward(self, images: Tensor, given: Mapping[str, Value] | None = None) -> dict[str, Value]:
        """Run the student and provide what is read of it.

        Args:
            images: [B, C, H, W].
            given: Values from outside, by argument, for the adapters (labels, teachers, extras);
                and further images, by `images_key`.

        Returns:
            `"logits"`, [B, C]; `"read/ARGUMENT"` for each value that comes from here; and
            `"monitored/NAME"`, scalars that inputs report.
        """
        given = given or {}
        values: dict[str, Value] = {}
        monitored: dict[str, Tensor] = {}
        logits, features = self._run(images)
        self._provide(values, monitored, (None, True), logits, features)
        for name, gradient in self._further:
            further = given[images_key(name or "")]
            assert isinstance(further, Tensor)
            with torch.set_grad_enabled(gradient and torch.is_grad_enabled()):
                of_further, features = self._run(further)
                self._provide(values, {}, (name, gradient), of_further, features)
        if self.peer is not None:
            of_peer = self.peer(images)
            values.update(dict.fromkeys(self.peer_arguments, of_peer))
        if self.adapters is not None:
            values.update(self.adapters({**given, **values}))
        return {
            "logits": logits,
            **{f"read/{argument}": value for argument, value in values.items()},
            **{f"monitored/{name}": value for name, value in monitored.items()},
        }

    def _run(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self.tap.enabled = True
        try:
            return self.student(images), self.tap.pop()
        finally:
            self.tap.enabled = False
            self.tap.clear()

    def _provide(
        self,
        values: dict[str, Value],
        monitored: dict[str, Tensor],
        run: tuple[str | None, bool],
        logits: Tensor,
        features: Mapping[str, Tensor],
    ) -> None:
        """Add what one forward of the student gives to `values` and `monitored`."""
        provided: dict[str, Value] = {}
        for argument, pass_of in self.passes.items():
            if (pass_of.images, pass_of.gradient) != run:
                continue
            if pass_of.provider not in provided:
                provider = cast("Provider", self.providers[pass_of.provider])
                value = provider(self.student, logits, features)
                provided[pass_of.provider] = value
                monitored.update(provider.monitored(value, logits))
            values[argument] = provided[pass_of.provider]


def provided(
    inputs: Mapping[str, Input], layout: Callable[[], Layout]
) -> tuple[dict[str, Provider], dict[str, PassOf]]:
    """One provider for each input from the student, and which forward each argument is of.

    Args:
        inputs: What a method reads, by argument.
        layout: Gives the student's layout; called only if an input needs it.
    """
    providers: dict[str, Provider] = {}
    passes: dict[str, PassOf] = {}
    names: dict[Input, str] = {}
    # The batch's own images first: learned parts are named after the arguments read from them.
    for argument, kind in sorted(inputs.items(), key=lambda item: isinstance(item[1], SecondPass)):
        again = kind if isinstance(kind, SecondPass) else SecondPass("", kind)
        if again.of not in names:
            provider = provider_for(again.of, layout)
            if provider is None:
                continue
            names[again.of] = argument
            providers[argument] = provider
        images = again.images if isinstance(kind, SecondPass) else None
        passes[argument] = PassOf(names[again.of], images, again.gradient)
    return providers, {name: passes[name] for name in inputs if name in passes}
