"""What is trained: the student and the learned parts beside it, in one module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from softlabels.inputs import Input, Provider, SecondPass, StudentInput, Value
from softlabels.taps import FeatureTap, Layout

__all__ = ["Outputs", "Pass", "Trainable", "provided"]


class Pass(NamedTuple):
    """One forward of the student.

    Attributes:
        images: Name of the batch's extra with the images; None: the batch's own.
        gradient: Whether it is trained through.
    """

    images: str | None = None
    gradient: bool = True


class Outputs(NamedTuple):
    """What one forward of a `Trainable` gives.

    Attributes:
        logits: The student's, [B, C].
        read: Each value that comes from here, by the method's argument.
        monitored: Scalars that inputs report.
    """

    logits: Tensor
    read: dict[str, Value]
    monitored: dict[str, Tensor]


class Trainable(nn.Module):
    """All that is trained: the student and the learned parts beside it.

    This alone is compiled, wrapped by DDP, copied for EMA and stored.

    Args:
        student: The plain network.
        providers: What provides the inputs from the student, by name.
        passes: The forwards of the student, that on the batch's own images first; the name of the
            provider of each argument that is read in it.
        peer: A second network that is trained along, or None.
        peer_arguments: Arguments of the method that are the peer's logits.

    Attributes:
        adapters: The method's own learned parts, or None.
    """

    def __init__(
        self,
        student: nn.Module,
        providers: Mapping[str, Provider],
        passes: Mapping[Pass, Mapping[str, str]],
        *,
        peer: nn.Module | None = None,
        peer_arguments: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.student = student
        self.providers = nn.ModuleDict(providers)
        self.adapters: nn.Module | None = None
        self.passes = passes
        self.peer = peer
        self.peer_arguments = peer_arguments
        points = {point.key for provider in providers.values() for point in provider.points}
        self.tap = FeatureTap(student, sorted(points), enabled=False)

    def forward(
        self,
        images: Tensor,
        given: Mapping[str, Value] | None = None,
        further: Mapping[str, Tensor] | None = None,
    ) -> Outputs:
        """Run the student and provide what is read of it.

        Args:
            images: [B, C, H, W].
            given: Values from outside, by argument, for the adapters (labels, teachers, extras).
            further: Images of other passes, by their name.
        """
        read: dict[str, Value] = {}
        logits, monitored = self._provide(Pass(), images, read)
        for run in self.passes:
            if run.images is not None and further is not None:
                with torch.set_grad_enabled(run.gradient and torch.is_grad_enabled()):
                    self._provide(run, further[run.images], read)
        if self.peer is not None:
            read.update(dict.fromkeys(self.peer_arguments, self.peer(images)))
        if self.adapters is not None:
            read.update(self.adapters({**(given or {}), **read}))
        return Outputs(logits, read, monitored)

    def _provide(
        self, run: Pass, images: Tensor, read: dict[str, Value]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add what is read in one forward; its logits, and what inputs report of it."""
        logits, features = self.tap.run(self.student, images)
        values: dict[str, Value] = {}
        monitored: dict[str, Tensor] = {}
        for argument, name in self.passes[run].items():
            if name not in values:
                provider = cast("Provider", self.providers[name])
                values[name] = provider(self.student, logits, features)
                monitored.update(provider.monitored(values[name], logits))
            read[argument] = values[name]
        return logits, monitored


def provided(
    inputs: Mapping[str, Input], layout: Callable[[], Layout]
) -> tuple[dict[str, Provider], dict[Pass, dict[str, str]]]:
    """The `providers` and `passes` of a `Trainable` that gives the inputs from the student.

    `layout` gives the student's layout; it is called only if an input needs it.
    """
    providers: dict[str, Provider] = {}
    passes: dict[Pass, dict[str, str]] = {Pass(): {}}
    names: dict[Input, str] = {}
    # The batch's own images first: learned parts are named after the arguments read from them.
    for argument, kind in sorted(inputs.items(), key=lambda item: isinstance(item[1], SecondPass)):
        if not isinstance(kind, StudentInput) or kind.reads_teacher:
            continue
        run = Pass()
        if isinstance(kind, SecondPass):
            run, kind = Pass(kind.images, kind.gradient), kind.of
        if kind not in names:
            names[kind] = argument
            providers[argument] = kind.provider(layout)
        passes.setdefault(run, {})[argument] = names[kind]
    return providers, passes
