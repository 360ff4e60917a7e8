"""Runs of the command line in processes that can be killed.

The processes are forked from a server that has imported everything, so that a start takes no
seconds; each is a process of its own, with the command line's own exit status.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["softlabels.training.trainer", "softlabels.cli"])
_LIMIT = 240  # seconds that a test waits for anything


def _main(arguments: Sequence[str], environment: dict[str, str], output: str) -> None:
    """A process' work: `softlabels ARGUMENTS`, with what it prints in a file."""
    os.environ.update(environment)
    with open(output, "a", buffering=1) as file:
        sys.stdout = sys.stderr = file
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        import torch

        from softlabels.cli import main

        torch.set_num_threads(1)
        sys.exit(main(list(arguments)))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class LivingRun:
    """`softlabels train` in one or more processes.

    Args:
        folder: The run's folder.
        arguments: Of `softlabels train`, without `--output`.
        num_processes: How many, with gloo between them.
    """

    def __init__(self, folder: Path, arguments: Sequence[str], num_processes: int = 1) -> None:
        self.folder = folder
        self.printed = folder.with_name(f"{folder.name}-printed.txt")
        port = str(_free_port())
        self.processes = []
        for rank in range(num_processes):
            environment = {"OMP_NUM_THREADS": "1"}
            if num_processes > 1:
                environment |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(num_processes),
                    "LOCAL_WORLD_SIZE": str(num_processes),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                    "GLOO_SOCKET_IFNAME": "lo",
                }
            command = ["train", *arguments, "--output", str(folder)]
            process = _CONTEXT.Process(
                target=_main, args=(command, environment, str(self.printed)), daemon=True
            )
            process.start()
            self.processes.append(process)

    @property
    def lives(self) -> bool:
        """Whether all processes do."""
        return all(process.is_alive() for process in self.processes)

    def send(self, number: int, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to all processes, or to some."""
        for rank, process in enumerate(self.processes):
            if ranks is None or rank in ranks:
                assert process.pid is not None
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def kill(self) -> bool:
        """SIGKILL; whether it hit a run whose processes all lived."""
        self.send(signal.SIGKILL)
        return all(status == -signal.SIGKILL for status in self.wait())

    def wait(self, seconds: float = _LIMIT) -> list[int | None]:
        """Exit status of each process; None for one that did not end in time, and is killed."""
        ends = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, ends - time.monotonic()))
        statuses = [process.exitcode for process in self.processes]
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()
        return statuses

    def until(self, happened: Callable[[], bool]) -> bool:
        """Wait for something while the run lives; whether it happened."""
        ends = time.monotonic() + _LIMIT
        while self.lives:
            if happened():
                return True
            assert time.monotonic() < ends, self.text()
        return happened()

    def until_step(self, step: int) -> bool:
        """Wait until that many steps are logged."""
        return self.until(lambda: steps_done(self.folder) >= step)

    def until_writing(self) -> bool:
        """Wait for the write of a checkpoint."""
        return self.until(lambda: next(unfinished(self.folder), None) is not None)

    def text(self) -> str:
        """What all processes printed so far."""
        return self.printed.read_text() if self.printed.exists() else ""


def steps_done(folder: Path) -> int:
    """The last step in metrics.jsonl, where every step is logged."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        with contextlib.suppress(ValueError):  # the last line may be half written
            return int(json.loads(line)["step"])
    return 0


def unfinished(folder: Path) -> Iterator[str]:
    """Hidden files of checkpoints that are being written, or whose writer was killed."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder / "checkpoints") as entries:
        for entry in entries:
            if entry.name.startswith(".step-"):
                yield entry.name
