"""The loop. It knows a Distiller, batches and things with a state; no method and no file format."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from softlabels.data import Batch, DataSource
from softlabels.data.mixup import MixupCutmix
from softlabels.data.randomness import derive_seed
from softlabels.distiller import Distiller, StepOutput
from softlabels.training.checkpoint import Stateful
from softlabels.training.config import Config
from softlabels.training.evaluate import evaluate
from softlabels.training.guards import InterruptGuard, LossLog

__all__ = ["Engine", "Observer"]


class Observer(Protocol):
    """What the engine tells of a run."""

    def step(self, epoch: int, step: int, images: int, scalars: dict[str, float]) -> None:
        """A step is done; `scalars` is not empty at every `log_every`-th."""
        ...

    def epoch(
        self, epoch: int, step: int, seconds: float, images: int, scalars: dict[str, float]
    ) -> None:
        """An epoch is trained and evaluated; `epoch` counts the finished ones."""
        ...


def _details(output: StepOutput) -> dict[str, Tensor]:
    """The terms of a step's loss after their weights, and their shares of the gradient."""
    terms = {f"term/{name}": term.detach() for name, term in output.terms.items()}
    shares = {f"gradient_share/{name}": share for name, share in output.gradient_shares().items()}
    return {**terms, **shares}


def _averaged(shares: Sequence[tuple[float, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """Scalars of micro-batches, averaged over their samples."""
    return {
        name: torch.stack([share * scalars[name] for share, scalars in shares]).sum()
        for name in shares[0][1]
    }


def _floats(details: Mapping[str, Tensor]) -> dict[str, float]:
    """For the log: one wait for the device."""
    if not details:
        return {}
    values: list[float] = torch.stack([value.float() for value in details.values()]).tolist()
    return {f"train/{name}": value for name, value in zip(details, values, strict=True)}


class Engine:
    """Trains a Distiller on a data source.

    Args:
        distiller: On the accelerator's device; its `trainable` is wrapped here.
        optimizer: Over the distiller's parameters.
        schedule: timm's, per step.
        source: Training and test data.
        accelerator: Device, precision and processes.
        config: The run's settings.
        mixer: Mixup and cutmix, or None.

    Attributes:
        finished_epochs: The place in the run; set it after loading a checkpoint.
    """

    def __init__(
        self,
        distiller: Distiller,
        optimizer: torch.optim.Optimizer,
        schedule: Scheduler,
        source: DataSource,
        accelerator: Accelerator,
        config: Config,
        mixer: MixupCutmix | None,
    ) -> None:
        self.source = source
        self.accelerator = accelerator
        self.config = config
        self.mixer = mixer
        self.schedule = schedule
        self.core = distiller.trainable
        # Before wrapping: the copy must hold plain modules with a tap of their own.
        self.ema = ModelEmaV3(self.core, decay=config.ema_decay) if config.ema_decay else None
        if config.compile:
            distiller.trainable = torch.compile(distiller.trainable)  # type: ignore[assignment]  # a module
        distiller.trainable, self.optimizer = accelerator.prepare(distiller.trainable, optimizer)
        self.distiller = distiller
        self.finished_epochs = 0
        self.steps_per_epoch = source.steps_per_epoch(config.batch_size)

    @property
    def stateful(self) -> dict[str, Stateful | None]:
        """All that a checkpoint must hold; the place in the run is `finished_epochs`."""
        return {
            "trained": self.distiller,
            "optimizer": self.optimizer,
            "ema": self.ema,
            "scaler": self.accelerator.scaler,
        }

    @property
    def network(self) -> nn.Module:
        """The plain network that is evaluated and exported: the averaged one if there is one."""
        if self.ema is not None:
            averaged = self.ema.module.student
            assert isinstance(averaged, nn.Module)
            return averaged
        return self.distiller.student

    def fit(self, observer: Observer, interrupt: InterruptGuard) -> None:
        """Train up to the configured epoch, evaluating after each.

        Args:
            observer: Told of steps and epochs.
            interrupt: Asked before each step.

        Raises:
            NonFiniteLossError: The loss is not finite.
            Interrupted: The user asked to stop.
        """
        for epoch in range(self.finished_epochs, self.config.epochs):
            started = time.perf_counter()
            self.distiller.train()
            log = LossLog(eager=self.accelerator.device.type == "cpu")
            num_images = 0
            for index, batch in enumerate(self._batches(epoch)):
                interrupt.check()
                step = epoch * self.steps_per_epoch + index
                done = step + 1
                due = done % self.config.log_every == 0 or index + 1 == self.steps_per_epoch
                loss, parts, details = self._step(batch, epoch, index, detailed=due)
                log.add(step, loss, parts)
                num_images += len(batch.target)
                scalars = {**self._logged(log), **_floats(details)} if due else {}
                observer.step(epoch, done, len(batch.target), scalars)
            self.distiller.after_epoch()
            seconds = time.perf_counter() - started
            self.finished_epochs = epoch + 1
            observer.epoch(
                epoch + 1,
                (epoch + 1) * self.steps_per_epoch,
                seconds,
                num_images * self.accelerator.num_processes,
                self.evaluate(),
            )

    def _batches(self, epoch: int) -> Iterator[Batch]:
        return self.source.train_batches(
            seed=self.config.seed,
            epoch=epoch,
            batch_size=self.config.batch_size,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            device=self.accelerator.device,
        )

    def _step(
        self, batch: Batch, epoch: int, index: int, *, detailed: bool
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """One update of the weights.

        Returns:
            The loss and its parts, averaged over the micro-batches of this process; and, if
            `detailed`, what is logged of its terms.
        """
        seed, rank = self.config.seed, self.accelerator.process_index
        # Dropout and the like are a function of the place in the run: a resume needs no state.
        torch.manual_seed(derive_seed(seed, "model", epoch, index, rank))
        if self.mixer is not None:
            batch = self.mixer(batch, seed=seed, epoch=epoch, step=index)
        if self.config.channels_last:
            batch.images = batch.images.contiguous(memory_format=torch.channels_last)
        self.distiller.detailed = detailed
        num_samples = len(batch.target)
        num_parts = min(self.config.accumulation, num_samples)
        mean_samples = self._samples_a_process(num_samples)
        shares: list[tuple[float, dict[str, Tensor], dict[str, Tensor]]] = []
        for number, (images, target, sample) in enumerate(
            zip(
                batch.images.tensor_split(num_parts),
                batch.target.tensor_split(num_parts),
                batch.index.tensor_split(num_parts),
                strict=True,
            )
        ):
            is_last = number == num_parts - 1
            waits: Any = (
                nullcontext() if is_last else self.accelerator.no_sync(self.distiller.trainable)
            )
            with waits:
                with self.accelerator.autocast():
                    output = self.distiller(images, target, index=sample)
                details = _details(output) if detailed else {}
                self.accelerator.backward(len(target) / mean_samples * output.loss)
            parts = {"loss": output.loss.detach(), **output.parts}
            shares.append((len(target) / num_samples, parts, details))
        if self.config.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.distiller.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step_update(epoch * self.steps_per_epoch + index + 1)
        self.distiller.after_step()
        if self.ema is not None:
            self.ema.update(self.core)
        parts = _averaged([(share, of_part) for share, of_part, _ in shares])
        details = _averaged([(share, of_part) for share, _, of_part in shares])
        return parts.pop("loss"), parts, details

    def _samples_a_process(self, num_samples: int) -> float | Tensor:
        """The mean number of samples that a process has in this step.

        A loss weighted by its samples over this number counts every sample of all processes the
        same: gradients are averaged over processes, whose batches may differ in size.
        """
        world_size = self.accelerator.num_processes
        if world_size == 1:
            return float(num_samples)
        count = torch.tensor(float(num_samples), device=self.accelerator.device)
        mean: Tensor = cast("Tensor", self.accelerator.reduce(count, "sum")) / world_size
        return mean

    def _logged(self, log: LossLog) -> dict[str, float]:
        means = {f"train/{name}": value for name, value in log.means().items()}
        if means:
            means["train/lr"] = self.optimizer.param_groups[0]["lr"]
        return means

    def evaluate(self) -> dict[str, float]:
        """Metrics of `network` on the test set, the same on every process."""
        batches = self.source.test_batches(
            batch_size=self.config.eval_batch_size,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            device=self.accelerator.device,
        )
        metrics = evaluate(
            self.network,
            batches,
            self.source.info,
            self.accelerator.device,
            self.accelerator.autocast,
        )
        return {f"eval/{name}": value for name, value in metrics.items()}
