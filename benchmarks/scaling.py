"""Measure what running for long and on several processes costs: `make bench-scaling`.

Ratios of things that ran side by side, medians with quartiles over rounds; see docs/speed.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

import softlabels
from softlabels import Distiller, NKDLoss, TeacherCache
from softlabels.data import Batch, DataSource, open_source
from softlabels.data.sources.folder import FolderSource
from softlabels.experiments.timing import interleaved
from softlabels.models import build_model
from softlabels.training.cache_teacher import CacheOptions, build_cache
from softlabels.training.checkpoint import CheckpointFolder
from softlabels.training.config import load_recipe, resolve
from softlabels.training.run_folder import environment

STUDENT = "timm:resnet8_glyphs"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def _bound(figure: str, values: Sequence[float], bound: float, *, at_least: bool) -> dict[str, Any]:
    spread = _spread(values)
    held = spread["median"] >= bound if at_least else spread["median"] <= bound
    return {
        "figure": figure,
        **spread,
        "bound": bound,
        "at_least": at_least,
        "held": held,
        "rounds": len(values),
    }


def teacher_cache(
    cache: TeacherCache, student: str, batch_size: int, rounds: int
) -> dict[str, Any]:
    """A step of NKD with stored answers over one of cross-entropy, each with its own batches."""
    source = open_source("glyphs100")

    def batches(draw: tuple[int, int] | None) -> Iterator[Batch]:
        for epoch in range(1_000_000):
            yield from source.train_batches(
                seed=0, epoch=epoch, batch_size=batch_size, draw=draw, device="cpu"
            )

    def steps(distiller: Distiller, draw: tuple[int, int] | None) -> Any:
        optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-3, momentum=0.9)
        given = batches(draw)

        def step() -> None:
            batch = next(given)
            extras = {} if batch.draw is None else {"index": batch.index, "draw": batch.draw}
            distiller(batch.images, batch.target, **extras).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    torch.manual_seed(0)
    model = build_model(student, num_classes=100, in_channels=1)
    shape = (1, 32, 32)
    plain = Distiller(model, example_shape=shape).train()
    taught = Distiller(model, NKDLoss(), teacher=cache, example_shape=shape).train()
    seconds = interleaved(
        {"plain": steps(plain, None), "nkd": steps(taught, cache.draw(0))}, rounds=rounds
    )
    ratios = [a / b for a, b in zip(seconds["nkd"], seconds["plain"], strict=True)]
    figure = f"NKD with a teacher cache / cross-entropy, step of {student}, batch {batch_size}"
    return _bound(figure, ratios, 1.05, at_least=False)


def checkpoints(folder: Path, epochs: int) -> dict[str, Any]:
    """Time in the writing of checkpoints over all time of an epoch, in one run."""
    seconds: list[float] = []
    marks: list[float] = []
    save = CheckpointFolder.save

    def timed(self: CheckpointFolder, step: int, content: Any) -> Path:
        started = time.perf_counter()
        path = save(self, step, content)
        marks.append(time.perf_counter())
        seconds.append(marks[-1] - started)
        return path

    with mock.patch.object(CheckpointFolder, "save", timed):
        softlabels.train(
            student=STUDENT,
            epochs=epochs,
            threads=1,
            gallery=0,
            output=folder / "checkpoints",
            progress=False,
        )
    whole = [after - before for before, after in itertools.pairwise(marks)]
    shares = [100 * s / w for s, w in zip(seconds[1:], whole, strict=True)]
    return _bound("a checkpoint each epoch, % of the run's time", shares, 2.0, at_least=False)


def start_up(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds from the start of `softlabels train` to its first step, beyond torch and timm."""
    beyond = []
    for number in range(rounds + 1):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch, timm"], check=True)
        imports = time.perf_counter() - started
        output = folder / f"start{number}"
        command = [
            sys.executable, "-m", "softlabels", "train", "glyphs100/cross_entropy",
            "--log-every", "1", "--threads", "1", "--output", str(output),
        ]  # fmt: skip
        started = time.perf_counter()
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            lines = output / "metrics.jsonl"
            while not (lines.exists() and lines.stat().st_size):
                if process.poll() is not None:
                    raise RuntimeError(f"{' '.join(command)} ended before its first step")
                time.sleep(0.005)
            took = time.perf_counter() - started
            process.kill()
        if number:  # the first one reads files that later ones find in memory
            beyond.append(took - imports)
    return _bound("start-up beyond import torch, timm; seconds", beyond, 3.0, at_least=False)


def _resident(process: int) -> int:
    """Bytes in memory of a process and its children."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(_resident(int(child)) for child in children)


def memory(source: DataSource, folder: Path, epochs: int, batch_size: int) -> dict[str, Any]:
    """Bytes in memory at the end of each epoch of one run."""
    resident: list[int] = []
    read = source.test_batches

    def watched(**where: Any) -> Iterator[Batch]:
        resident.append(_resident(os.getpid()))
        return read(**where)

    with mock.patch.object(source, "test_batches", watched):
        softlabels.train(
            source,
            "timm:resnet8_glyphs",
            "uskd",
            epochs=epochs,
            batch_size=batch_size,
            threads=1,
            ema_decay=0.99,
            gallery=0,
            output=folder,
            progress=False,
        )
    settled = resident[epochs // 4 :]
    slope = statistics.linear_regression(range(len(settled)), settled).slope
    return {
        "source": source.info.name,
        "epochs": epochs,
        "megabytes_first": settled[0] / 1e6,
        "megabytes_last": settled[-1] / 1e6,
        "kilobytes_an_epoch": slope / 1e3,
    }


def _folder(root: Path, number: int, size: tuple[int, int]) -> Path:
    """JPEG files of smooth noise, two classes."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("one", "two"):
            (root / split / label).mkdir(parents=True)
            for index in range(number):
                small = generator.integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
                image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
                image.save(root / split / label / f"{index}.jpg", quality=90)
    return root


def two_processes(
    folder: Path, student: str, fonts: int, batch_size: int, rounds: int
) -> dict[str, Any]:
    """Images per second of two processes of a run over those of two runs side by side."""

    def command(launcher: Sequence[str], batch_size: int, output: Path) -> list[str]:
        return [
            sys.executable, *launcher, "-m", "softlabels", "train", "glyphs100/cross_entropy",
            "--student.name", f"timm:{student}", "--data.num-fonts", str(fonts),
            "--epochs", "3", "--batch-size", str(batch_size), "--threads", "1",
            "--gallery", "0", "--output", str(output),
        ]  # fmt: skip

    def speed(output: Path) -> float:
        lines = (output / "timings.jsonl").read_text().splitlines()
        return float(statistics.median(json.loads(x)["images_per_second"] for x in lines[1:]))

    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    ratios = []
    for number in range(rounds):
        joint = folder / f"{student}-joint{number}"
        apart = [folder / f"{student}-apart{number}{part}" for part in "ab"]
        for commands in (
            [command(torchrun, 2 * batch_size, joint)],
            [command((), batch_size, output) for output in apart],
        ):
            running = [
                subprocess.Popen(c, env={**os.environ, **ONE_THREAD}, stderr=subprocess.DEVNULL)
                for c in commands
            ]
            if any(process.wait() for process in running):
                raise RuntimeError(f"{' '.join(commands[0])} failed")
        ratios.append(speed(joint) / sum(map(speed, apart)))
    figure = f"two processes / two runs side by side, images per second of {student}"
    return _bound(figure, ratios, 0.9, at_least=True)


def decoding(folder: Path, rounds: int) -> dict[str, Any]:
    """Training images of 224 pixels that one core makes of 500x375 JPEGs in a second."""
    source = FolderSource(_folder(folder, 16, (500, 375)), workers=0)
    sizes = [path.stat().st_size for path in folder.glob("train/*/*.jpg")]
    speeds = []
    for number in range(rounds + 1):
        started = time.perf_counter()
        for _ in source.train_views(draw=(0, number), batch_size=16, device="cpu"):
            pass
        speeds.append(source.num_train / (time.perf_counter() - started))
    return {
        "pixels": [500, 375],
        "kilobytes": statistics.mean(sizes) / 1e3,
        "images_per_second": _spread(speeds[1:]),
    }


def main() -> None:
    """Run all measurements and write one file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("results/scaling.json"))
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds: int = options.rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = resolve({**load_recipe("glyphs100/nkd"), "threads": 1})
        cache = build_cache(config, folder / "cache", CacheOptions(draws=1, top=10))
        files = FolderSource(_folder(folder / "images", 24, (48, 36)), image_size=32, workers=1)
        results = {
            "command": "make bench-scaling",
            "environment": environment(resolve({"threads": 1}), torch.device("cpu"), 1).dump(),
            "bounds": [
                teacher_cache(cache, "resnet8x4", 32, 6 * rounds),
                teacher_cache(cache, "resnet8_glyphs", 128, 40 * rounds),
                checkpoints(folder, max(4, rounds)),
                start_up(folder, max(3, rounds)),
                two_processes(folder, "resnet20", 24, 32, max(2, rounds // 2)),
                two_processes(folder, "resnet8_glyphs", 239, 128, max(2, rounds // 2)),
            ],
            "memory": [
                memory(open_source("glyphs100", num_fonts=4), folder / "m1", 20 * rounds, 100),
                memory(files, folder / "m2", 20 * rounds, 16),
            ],
            "decoding": decoding(folder / "large", rounds),
        }
        files.close()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
