"""The loop. It knows a Distiller, batches and things with a state; no method and no file format."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, nullcontext
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast, gather_object
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from softlabels.data import Batch, DataSource
from softlabels.data.randomness import derive_seed
from softlabels.distill.distiller import Distiller
from softlabels.losses import MemoryBank
from softlabels.training.checkpoint import OptimizerState, Stateful
from softlabels.training.config import Config
from softlabels.training.epoch_weights import set_weights
from softlabels.training.errors import Interrupted, InterruptGuard
from softlabels.training.loss_log import GRADIENT, LossLog
from softlabels.training.observers import Observer
from softlabels.training.precise_bn import recompute_statistics
from softlabels.training.task import StepLoss, Task

__all__ = ["Engine"]

_STOP = "stop"


def _averaged(shares: Sequence[tuple[float, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """Scalars of micro-batches, averaged over their samples."""
    return {
        name: torch.stack([share * scalars[name] for share, scalars in shares]).sum()
        for name in shares[0][1]
    }


class Engine:
    """Trains a Distiller on a data source.

    Args:
        distiller: On the accelerator's device; its `trainable` is wrapped here.
        optimizer: Over the distiller's parameters.
        schedule: timm's, per step.
        source: Training and test data.
        accelerator: Device, precision and processes.
        config: The run's settings.
        task: What a batch, a step and an evaluation are.

    Attributes:
        step: Optimizer steps so far.
        finished_epochs: Epochs that are trained and evaluated. With `step` the place in the run:
            set both after loading a checkpoint.
    """

    def __init__(
        self,
        distiller: Distiller,
        optimizer: torch.optim.Optimizer,
        schedule: Scheduler,
        source: DataSource,
        accelerator: Accelerator,
        config: Config,
        task: Task,
    ) -> None:
        self.source = source
        self.accelerator = accelerator
        self.config = config
        self.task = task
        self.schedule = schedule
        self.core = distiller.trainable
        # Before wrapping: the copy must hold plain modules with a tap of their own.
        self.ema = ModelEmaV3(self.core, decay=config.ema_decay) if config.ema_decay else None
        if config.compile is True:
            distiller.trainable = torch.compile(distiller.trainable)  # type: ignore[assignment]  # a module
        # A method's memory takes in what all processes saw, so it is the same on each. Batch
        # statistics need not be, until an evaluation: sending them in every step costs more than
        # the gradients of a small student.
        accelerator.ddp_handler = DistributedDataParallelKwargs(broadcast_buffers=False)
        # What a forward may change, and a skipped step puts back.
        memories = [part for part in self.core.modules() if isinstance(part, MemoryBank)]
        kept = {id(buffer) for memory in memories for buffer in memory.buffers()}
        self._buffers = [buffer for buffer in self.core.buffers() if id(buffer) not in kept]
        distiller.trainable, self.optimizer = accelerator.prepare(distiller.trainable, optimizer)
        self.distiller = distiller
        self.step = 0
        self.finished_epochs = 0
        self.steps_per_epoch = source.steps_per_epoch(config.batch_size)
        self._is_shared = accelerator.num_processes > 1
        most_skipped = config.max_skipped_steps or 0
        self._may_skip = most_skipped > 0
        self.log = LossLog(
            eager=self._may_skip or accelerator.device.type == "cpu",
            most_skipped=most_skipped,
            gather=lambda found: gather_object([found]),
        )

    @property
    def stateful(self) -> dict[str, Stateful | None]:
        """All that a checkpoint must hold besides the place in the run.

        The learning rate and all random draws are functions of that place.
        """
        return {
            "trained": self.distiller,
            "optimizer": OptimizerState(self.optimizer),
            "ema": self.ema,
            "scaler": self.accelerator.scaler,
            "log": self.log,
        }

    @property
    def network(self) -> nn.Module:
        """The plain network that is evaluated and exported: the averaged one if there is one."""
        if self.ema is not None:
            averaged = self.ema.module.student
            assert isinstance(averaged, nn.Module)
            return averaged
        return self.distiller.student

    def fit(self, observers: Sequence[Observer], interrupt: InterruptGuard) -> None:
        """Train up to the configured epoch, evaluating as often as configured and at the end.

        Observers are told of steps and epochs, and when to store the state.

        Raises:
            NonFiniteLossError: The loss or the gradient is not finite.
            Interrupted: The user asked to stop; the state is stored.
        """
        while self.finished_epochs < self.config.epochs:
            self._train_epoch(self.finished_epochs, observers, interrupt)
            scalars: dict[str, float] = {}
            epoch = self.finished_epochs + 1
            if epoch == self.config.epochs or epoch % self.config.eval_every == 0:
                self._recompute_statistics(self.finished_epochs)
                scalars = self.evaluate()
            self.distiller.after_epoch()
            self.finished_epochs += 1
            for observer in observers:
                observer.epoch(self.finished_epochs, self.step, scalars)
            _store(observers)

    def _train_epoch(
        self, epoch: int, observers: Sequence[Observer], interrupt: InterruptGuard
    ) -> None:
        """Train from the present step to the end of an epoch."""
        self.distiller.train()
        set_weights(self.distiller, self.config, epoch)
        first = self.step - epoch * self.steps_per_epoch
        since = time.perf_counter()
        with closing(self._batches(self.config.seed, epoch, first, self.task.extras)) as batches:
            for index, batch in enumerate(batches, first):
                ends = index + 1 == self.steps_per_epoch
                due = (self.step + 1) % self.config.log_every == 0 or ends
                details, any_asked = self._step(
                    batch, epoch, index, detailed=due, asked=bool(interrupt.asked)
                )
                self.step += 1
                scalars = self._logged(details) if due else {}
                now, num_samples = time.perf_counter(), self.task.num_samples(batch)
                for observer in observers:
                    observer.step(epoch, self.step, num_samples, now - since, scalars)
                since = now
                if self._stops(interrupt, any_asked, due):
                    _store(observers)
                    raise Interrupted(number=interrupt.asked or signal.SIGTERM)
                every = self.config.checkpoint.every
                if every is not None and self.step % every == 0 and not ends:
                    _store(observers)

    def _stops(self, interrupt: InterruptGuard, any_asked: Tensor, due: bool) -> bool:
        """Whether a signal came; on several processes all must stop at the same step."""
        if not self._is_shared:
            return bool(interrupt.asked)
        # On an accelerator a wait for the device: only where there is one anyway.
        return (due or any_asked.device.type == "cpu") and bool(any_asked)

    def _batches(
        self, seed: int, epoch: int, first: int, further: Sequence[str] = ()
    ) -> Generator[Batch]:
        draw = getattr(self.distiller.teacher, "draw", None)
        # A source of one's own need not know of them.
        extras: dict[str, Any] = {"extras": further} if further else {}
        yield from self.source.train_batches(
            seed=seed,
            epoch=epoch,
            batch_size=self.config.batch_size,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            start_step=first,
            device=self.accelerator.device,
            # Answers that are stored belong to views that are shown again.
            draw=None if draw is None else draw(epoch),
            **extras,
        )

    def _recompute_statistics(self, epoch: int) -> None:
        """PreciseBN for the network that is evaluated, over whole batches, at most an epoch's.

        They are not those that the epoch was trained with, and not mixed.
        """
        if self.config.precise_bn is None:
            return
        seed = derive_seed(self.config.seed, "precise_bn")
        wanted = max(1, self.config.precise_bn // self.config.batch_size)
        mean = partial(self.accelerator.reduce, reduction="mean") if self._is_shared else None
        with closing(self._batches(seed, epoch, 0)) as batches:
            recompute_statistics(
                self.network,
                (self.task.inputs(batch) for batch in islice(batches, wanted)),
                cast("Callable[[Tensor], Tensor] | None", mean),
                self.accelerator.autocast,
            )

    def _step(
        self, batch: Batch, epoch: int, index: int, *, detailed: bool, asked: bool
    ) -> tuple[dict[str, Tensor], Tensor]:
        """One update of the weights.

        Returns:
            What is logged of the loss's terms, if `detailed`; and whether any process was `asked`
            to stop.
        """
        seed, rank = self.config.seed, self.accelerator.process_index
        # Dropout and the like are a function of the place in the run: a resume needs no state.
        torch.manual_seed(derive_seed(seed, "model", epoch, index, rank))
        batch = self.task.prepare(batch, epoch=epoch, step=index)
        # A forward changes buffers too; a step that is skipped puts them back.
        before = [b.clone() for b in self._buffers] if self._may_skip else []
        parts, details, finite, share = self._backward(batch, detailed=detailed)
        if self.config.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self.distiller.parameters(), self.config.max_grad_norm)
        else:
            self.accelerator.unscale_gradients()
        parts[_STOP] = torch.full((), float(asked), device=self.accelerator.device)
        logged = self._over_processes(parts, share)
        any_asked = logged.pop(_STOP) > 0
        gradients = [p.grad for p in self.distiller.parameters() if p.grad is not None]
        # Not finite if any of them is not.
        logged[GRADIENT] = get_total_norm(gradients, norm_type=math.inf)
        healthy = self.log.add(self.step, logged, index=batch.index, finite=finite)
        if not healthy:
            # Without gradients a step does nothing, but a scaler lowers its scale.
            self.optimizer.zero_grad(set_to_none=True)
            self.distiller.forget_step()
            for buffer, value in zip(self._buffers, before, strict=True):
                buffer.copy_(value)
        if healthy or self.accelerator.scaler is not None:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step_update(self.step + 1)
        self.distiller.after_step()
        if self.ema is not None and healthy:
            self.ema.update(self.core)
        return self._over_processes(details, share), any_asked

    def _backward(
        self, batch: Batch, *, detailed: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, float | Tensor]:
        """Forward and backward of the micro-batches.

        Returns:
            The loss and its parts, and details of its terms, averaged over the micro-batches;
            for each sample whether its predictions are finite, [B]; and how much this process'
            samples count, 1 where all processes have as many.
        """
        num_samples = self.task.num_samples(batch)
        num_parts = min(self.config.grad_accum_steps, num_samples)
        mean_samples = self._samples_a_process(num_samples)
        shares: list[tuple[float, StepLoss]] = []
        for number, part in enumerate(self.task.split(batch, num_parts)):
            is_last = number == num_parts - 1
            waits: Any = (
                nullcontext() if is_last else self.accelerator.no_sync(self.distiller.trainable)
            )
            size = self.task.num_samples(part)
            with waits:
                step = self.task.step(
                    self.distiller, part, self.accelerator.autocast, detailed=detailed
                )
                self.accelerator.backward(size / mean_samples * step.loss)
            shares.append((size / num_samples, step))
        return (
            _averaged([(share, step.scalars) for share, step in shares]),
            _averaged([(share, step.details) for share, step in shares]),
            torch.cat([step.finite for _, step in shares]),
            num_samples / mean_samples,
        )

    def _samples_a_process(self, num_samples: int) -> float | Tensor:
        """The mean number of samples that a process has in this step.

        A loss weighted by its samples over this number counts every sample of all processes the
        same: gradients are averaged over processes, whose batches may differ in size.
        """
        world_size = self.accelerator.num_processes
        if world_size == 1:
            return float(num_samples)
        count = torch.full((), float(num_samples), device=self.accelerator.device)
        mean: Tensor = cast("Tensor", self.accelerator.reduce(count, "sum")) / world_size
        return mean

    def _over_processes(
        self, scalars: Mapping[str, Tensor], share: float | Tensor
    ) -> dict[str, Tensor]:
        """Scalars averaged over the samples of all processes, in one message."""
        if not self._is_shared or not scalars:
            return dict(scalars)
        own = torch.stack([value.detach().float() for value in scalars.values()]) * share
        # Gathered, then summed in the order of ranks: the same bits on every process.
        rows: Tensor = cast("Tensor", self.accelerator.gather(own.unsqueeze(0)))
        return dict(zip(scalars, rows.mean(0).unbind(), strict=True))

    def _logged(self, details: Mapping[str, Tensor]) -> dict[str, float]:
        means = {f"train/{name}": value for name, value in self.log.means().items()}
        if means:
            means["train/lr"] = self.optimizer.param_groups[0]["lr"]
        if self._may_skip:
            means["train/skipped_steps"] = float(self.log.skipped)
        if details:
            # One wait for the device.
            values = torch.stack([value.float() for value in details.values()]).tolist()
            means.update(zip((f"train/{name}" for name in details), values, strict=True))
        return means

    def evaluate(self) -> dict[str, float]:
        """Metrics of `network` on the test set, the same on every process."""
        if self._is_shared:
            # Each process has gathered batch statistics of its own; the first one's are stored.
            for buffer in self.network.buffers():
                broadcast(buffer, from_process=0)
        batches = self.source.test_batches(
            batch_size=self.config.eval_batch_size,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            device=self.accelerator.device,
        )
        metrics = self.task.evaluate(
            self.network, batches, self.accelerator.device, self.accelerator.autocast
        )
        return {f"eval/{name}": value for name, value in metrics.items()}


def _store(observers: Sequence[Observer]) -> None:
    for observer in observers:
        observer.store()
