"""Keeps what a run tells: metrics, times, weights and checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from softlabels.io.files import write_json
from softlabels.io.weights import not_finite, save_weights
from softlabels.training.checkpoint import Progress, state_of
from softlabels.training.distributed import gathered
from softlabels.training.engine import Engine
from softlabels.training.errors import NonFiniteLossError
from softlabels.training.run_folder import RunFolder
from softlabels.training.tracking import Tracker

__all__ = ["Recorder", "infinite_parts"]


class Recorder:
    """Writes down what the engine tells, and stores weights and checkpoints.

    Args:
        engine: Whose states are stored.
        tracker: Where scalars and progress go.
        folder: The run's.
        metadata: Header of the student's file.
        progress: Where the run goes on from.
        infinite_before: `infinite_parts` of the network as it was built.
    """

    def __init__(
        self,
        engine: Engine,
        tracker: Tracker,
        folder: RunFolder,
        metadata: Mapping[str, str],
        progress: Progress,
        infinite_before: set[str],
    ) -> None:
        self.engine = engine
        self.tracker = tracker
        self.folder = folder
        self.metadata = metadata
        self.checkpoints = folder.checkpoints(engine.config.checkpoint.keep)
        self.final = dict(progress.final)
        self.best = dict(progress.best)
        self._infinite_before = infinite_before
        self.seconds = progress.seconds
        self._of_epoch = progress.of_epoch
        self._since = time.perf_counter()
        self._images = 0

    def step(
        self, epoch: int, step: int, images: int, seconds: float, scalars: dict[str, float]
    ) -> None:
        """Take down a step."""
        images *= self.engine.accelerator.num_processes
        self._of_epoch = (self._of_epoch[0] + seconds, self._of_epoch[1] + images)
        self._images += images
        now, speed = time.perf_counter(), None
        if now - self._since > 1:
            speed = f"{self._images / (now - self._since):,.0f} images/s"
            self._since, self._images = now, 0
        self.tracker.advance(speed=speed)
        if scalars:
            self.tracker.metrics(epoch, step, scalars)

    def epoch(self, epoch: int, step: int, scalars: dict[str, float]) -> None:
        """Take down an epoch, and store the student; see `Observer`."""
        self._check_weights()
        seconds, images = self._of_epoch
        if scalars:
            self.tracker.metrics(epoch, step, scalars)
            self.final = {name.removeprefix("eval/"): value for name, value in scalars.items()}
        self.tracker.timing(epoch, step, seconds, images / seconds if seconds else 0.0)
        self.seconds += seconds
        self._of_epoch = (0.0, 0)
        improved = bool(scalars) and self.final["top1"] > self.best.get("top1", -math.inf)
        if improved:
            self.best = {**self.final, "epoch": epoch}
        if scalars:
            self.tracker.advance(0, news=f"epoch {epoch}: top-1 {self.final['top1']:.1f} %")
        skipped = self._skipped_images()
        if self.engine.accelerator.is_main_process:
            save_weights(self.engine.network, self.folder.student, metadata=self.metadata)
            if improved:
                save_weights(self.engine.network, self.folder.best_student, metadata=self.metadata)
            if skipped:
                write_json(self.folder.skipped_images, skipped)
        self._since, self._images = time.perf_counter(), 0

    def _skipped_images(self) -> dict[str, str]:
        """Images that some process could not read, with the reasons."""
        own = dict(getattr(self.engine.source, "skipped", {}))
        by_process = gathered(self.engine.accelerator, own)
        return {path: reason for found in by_process for path, reason in sorted(found.items())}

    def _check_weights(self) -> None:
        """Make sure that what is stored can be gone on with: a loss may be finite all the same."""
        by_process = gathered(self.engine.accelerator, infinite_parts(self.engine))
        bad = sorted({name for names in by_process for name in names} - self._infinite_before)
        if bad:
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            raise NonFiniteLossError(
                f"the loss is finite, but {bad[0]}{more} of the network is not, after step "
                f"{self.engine.step}; try a smaller learning rate or other images. The last "
                "checkpoint is from before",
                self.engine.step,
                bad,
            )

    def store(self) -> None:
        """Store a checkpoint; see `Observer`."""
        accelerator = self.engine.accelerator
        parts = self.engine.stateful
        progress = Progress(
            step=self.engine.step,
            finished_epochs=self.engine.finished_epochs,
            final=self.final,
            best=self.best,
            seconds=self.seconds,
            of_epoch=self._of_epoch,
            lengths=self.tracker.lengths(),
        )
        # On every process: this looks at the losses since the last line, which tell more than
        # the weights do.
        state = state_of(progress.model_dump(), parts)
        self._check_weights()
        if accelerator.is_main_process:
            self.checkpoints.save(self.engine.step, state)
        accelerator.wait_for_everyone()


def infinite_parts(engine: Engine) -> set[str]:
    """Names of what is not finite in the trained network, and in the averaged one."""
    names = {*not_finite(engine.core.state_dict())}
    if engine.ema is not None:
        names |= {f"ema.{name}" for name in not_finite(engine.ema.module.state_dict())}
    return names
