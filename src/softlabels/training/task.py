"""What a network is trained for: a batch, a step's loss, an evaluation, as the engine sees them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from softlabels.analysis.analyze import Analyzed, analyze
from softlabels.analysis.gallery import make_gallery
from softlabels.data import Batch, DataInfo
from softlabels.data.mixup import MIXUP_EXTRAS, MixupCutmix, mixup_extras
from softlabels.distill.distiller import Distiller
from softlabels.distill.teacher import Teacher, Teachers
from softlabels.training.config import Config
from softlabels.training.metrics import Autocast, evaluate
from softlabels.training.teacher_check import teacher_name

if TYPE_CHECKING:
    from softlabels.training.engine import Engine

__all__ = ["ClassificationTask", "StepLoss", "Task"]

_OF_EVERY_BATCH = ("index", "draw")


@dataclass(frozen=True)
class StepLoss:
    """What a forward of one micro-batch gives.

    Attributes:
        loss: Scalar to call `backward()` on, the mean over the samples.
        scalars: Detached scalars that are logged as means over steps: the loss and its parts.
        details: Detached scalars of this step alone; empty unless they were asked for.
        finite: [B] bool, whether a sample's predictions are finite.
    """

    loss: Tensor
    scalars: dict[str, Tensor]
    details: dict[str, Tensor]
    finite: Tensor


class Task(ABC):
    """What the engine and the trainer ask of the kind of problem that is solved.

    Attributes:
        metric: Name of the evaluation's metric by which epochs are compared; higher is better.
        extras: What the training batches must bring beside images, targets and indices.
    """

    metric: ClassVar[str]
    extras: Sequence[str] = ()

    @abstractmethod
    def num_samples(self, batch: Batch) -> int:
        """The number of samples in a batch."""

    @abstractmethod
    def inputs(self, batch: Batch) -> Any:
        """What the network is called with."""

    @abstractmethod
    def prepare(self, batch: Batch, *, epoch: int, step: int) -> Batch:
        """A training batch of a step of an epoch, mixed and laid out in memory as configured."""

    @abstractmethod
    def split(self, batch: Batch, num_parts: int) -> Iterator[Batch]:
        """The micro-batches of a prepared batch."""

    @abstractmethod
    def step(
        self, distiller: Distiller, batch: Batch, autocast: Autocast, *, detailed: bool
    ) -> StepLoss:
        """The loss of a micro-batch that `split` gave, with `details` if it is `detailed`."""

    @abstractmethod
    def evaluate(
        self,
        network: nn.Module,
        batches: Iterable[Batch],
        device: torch.device,
        autocast: Autocast,
    ) -> dict[str, float]:
        """Metrics of a plain network on a test set, the same on every process.

        `batches` are this process' share of it.
        """

    @abstractmethod
    def headline(self, metrics: dict[str, float]) -> str:
        """An evaluation in a few words, for the progress bar."""

    @abstractmethod
    def gallery(self, engine: Engine) -> dict[str, Any]:
        """Some images with targets and predictions, after the last epoch."""

    @abstractmethod
    def analyze(self, engine: Engine) -> Analyzed:
        """A look at the trained network's answers to the test set."""


class ClassificationTask(Task):
    """One class for each image.

    Args:
        config: The run's settings.
        info: Facts about the data.
        extras: Of the distiller: what it reads from a batch beside images and targets.
    """

    metric = "top1"

    def __init__(self, config: Config, info: DataInfo, extras: Sequence[str]) -> None:
        self.config = config
        self.info = info
        mix, self.mixer = config.mix, None
        if mix.mixup or mix.cutmix:
            self.mixer = MixupCutmix(
                mixup_alpha=mix.mixup,
                cutmix_alpha=mix.cutmix,
                probability=mix.probability,
                switch_probability=mix.switch_probability,
                num_classes=info.num_classes,
            )
        self.extras = [n for n in extras if n not in _OF_EVERY_BATCH and n not in MIXUP_EXTRAS]
        self._mixes_pairs = bool(MIXUP_EXTRAS & {*extras})

    def num_samples(self, batch: Batch) -> int:
        """See `Task`."""
        return len(batch.target)

    def inputs(self, batch: Batch) -> Tensor:
        """The images, [B, C, H, W]."""
        if self.config.channels_last is not True:
            return batch.images
        return batch.images.contiguous(memory_format=torch.channels_last)

    def prepare(self, batch: Batch, *, epoch: int, step: int) -> Batch:
        """See `Task`."""
        seed = self.config.seed
        if self.mixer is not None:
            batch = self.mixer(batch, seed=seed, epoch=epoch, step=step)
        if self._mixes_pairs:
            alpha = self.config.mix.further_alpha
            batch = mixup_extras(batch, alpha=alpha, seed=seed, epoch=epoch, step=step)
        batch.images = self.inputs(batch)
        return batch

    def split(self, batch: Batch, num_parts: int) -> Iterator[Batch]:
        """See `Task`."""
        own = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
        split = {n: v.tensor_split(num_parts) for n, v in (own | batch.extras).items()}
        for part in range(num_parts):
            extras = {name: split[name][part] for name in batch.extras}
            yield Batch(**{name: split[name][part] for name in own}, extras=extras)

    def step(
        self, distiller: Distiller, batch: Batch, autocast: Autocast, *, detailed: bool
    ) -> StepLoss:
        """See `Task`; `details` are the weighted terms, and their shares of the gradient."""
        distiller.detailed = detailed
        extras = {"index": batch.index, **({} if batch.draw is None else {"draw": batch.draw})}
        with autocast():
            output = distiller(batch.images, batch.target, **{**extras, **batch.extras})
        details: dict[str, Tensor] = {}
        if detailed:
            shares = output.gradient_shares()
            details.update({f"term/{name}": term.detach() for name, term in output.terms.items()})
            details.update({f"gradient_share/{name}": share for name, share in shares.items()})
        return StepLoss(
            output.loss,
            {"loss": output.loss.detach(), **output.totals()},
            details,
            output.logits.detach().isfinite().all(1),
        )

    def evaluate(
        self,
        network: nn.Module,
        batches: Iterable[Batch],
        device: torch.device,
        autocast: Autocast,
    ) -> dict[str, float]:
        """See `softlabels.training.metrics.evaluate`."""
        return evaluate(network, batches, self.info, device, autocast)

    def headline(self, metrics: dict[str, float]) -> str:
        """The accuracy."""
        return f"top-1 {metrics['top1']:.1f} %"

    def gallery(self, engine: Engine) -> dict[str, Any]:
        """Images with the soft labels that they were trained towards."""
        return make_gallery(
            engine.distiller,
            engine.network,
            engine.source,
            num_images=self.config.gallery,
            batch_size=self.config.eval_batch_size,
            device=engine.accelerator.device,
        )

    def analyze(self, engine: Engine) -> Analyzed:
        """Calibration, confusions, and what the teacher says, where a live one taught."""
        asked = engine.distiller.teacher
        live = asked if isinstance(asked, Teacher | Teachers) else None  # a cache has no answers
        return analyze(
            engine.network,
            engine.source,
            batch_size=self.config.eval_batch_size,
            device=engine.accelerator.device,
            autocast=engine.accelerator.autocast,
            teacher=live,
            teacher_name=teacher_name(self.config, live),
        )
