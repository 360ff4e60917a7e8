"""What the processes of a run do together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list

from softlabels.training.config import Config
from softlabels.training.errors import LostProcessError, RunError

__all__ = ["from_main", "lost_processes", "start"]

Result = TypeVar("Result")


def start(config: Config) -> Accelerator:
    """Device, precision, threads and processes, as a configuration and torchrun say.

    Where the precision is still to be decided (auto), it is float32: call it again after that.

    Raises:
        ValueError: Half precision without an accelerator, which would be float32 in silence.
    """
    # Where there is no accelerator, it has to be told: else each process would run alone.
    on_cpu = config.device == "cpu" or not torch.accelerator.is_available()
    if on_cpu and config.precision == "fp16":
        raise ValueError(
            "precision must be bf16 or no on a CPU, which has no gradient scaler, got fp16"
        )
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    # accelerate keeps the first precision of a process; a second run may want another.
    AcceleratorState._reset_state()
    return Accelerator(
        cpu=on_cpu,
        mixed_precision="no" if config.precision == "auto" else config.precision,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=config.process_timeout))],
    )


def from_main(accelerator: Accelerator, make: Callable[[], Result]) -> Result:
    """Run something on the main process, and give every process its result or its error.

    So a mistake that only the main process can see ends all of them alike, and none waits.
    """
    if accelerator.num_processes == 1:
        return make()
    found: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            found[0] = make()
        except (ValueError, TypeError, OSError, RunError) as error:
            found[1] = error
    broadcast_object_list(found, from_process=0)
    if found[1] is not None:
        raise found[1]
    return cast("Result", found[0])


@contextmanager
def lost_processes(accelerator: Accelerator, timeout: float) -> Iterator[None]:
    """Tell in one line if a collective failed because another process is gone.

    Raises:
        LostProcessError: In place of the error of the communication library.
    """
    try:
        yield
    except RunError:
        raise
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors: only their text tells them apart.
        words = ("gloo", "nccl", "connection", "process group", "timed out")
        is_told = isinstance(error, torch.distributed.DistError) or any(
            word in str(error).lower() for word in words
        )
        if accelerator.num_processes == 1 or not is_told:
            raise
        raise LostProcessError(
            f"process {accelerator.process_index} of {accelerator.num_processes} lost another "
            f"process of this run: it died, or did not answer for {timeout:g} s "
            "(process_timeout). Its own message tells more; the same command goes on from the "
            f"last checkpoint ({' '.join(str(error).split()):.200})"
        ) from error
