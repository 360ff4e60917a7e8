"""Two processes train what one process trains on the same global batches.

Under torchrun, on one machine and on two, for networks without batch statistics; for a network
with them, what must agree all the same.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from softlabels.cli import main
from softlabels.losses import uskd_loss
from softlabels.training.build import (
    build_distiller,
    build_source,
    with_defaults,
)
from softlabels.training.config import Config, resolve
from softlabels.training.engine import Engine
from softlabels.training.errors import InterruptGuard
from softlabels.training.metrics import evaluate
from softlabels.training.observers import Observer
from softlabels.training.optim import build_optimizer, build_schedule
from softlabels.training.task import ClassificationTask

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]

STEPS, STEPS_PER_EPOCH = 20, 4
# Metrics that are sums of rounded numbers, in another order.
SUMS = ("nll", "ece", "zipf_r2", "zipf_exponent")
NUM_TEST = 21  # odd, so that the processes have unequal shares, and batches of them
NETWORKS = {
    "vit": ("--student.name", "timm:vit_mini_patch4_32", "--student.settings", "depth", "2"),
    "resnet": ("--student.name", "timm:test_resnet", "--student.settings", "norm_layer",
               "groupnorm1"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(image_folder, tmp_path_factory) -> Path:
    """48 training and 21 test images of six classes."""
    root = tmp_path_factory.mktemp("odd") / "data"
    root.mkdir()
    (root / "train").symlink_to(image_folder / "train")
    for name in sorted(path.name for path in (image_folder / "val").iterdir()):
        (root / "val" / name).mkdir(parents=True)
        for image in sorted((image_folder / "val" / name).iterdir()):
            if image.name != "103.png" or name > "columns":
                os.link(image, root / "val" / name / image.name)
    assert len(list(root.glob("val/*/*.png"))) == NUM_TEST
    return root


def arguments(folder: Path, output: Path, *more: str) -> list[str]:
    return [
        "train", "--data.path", str(folder), "--data.image-size", "32", "--data.workers", "0",
        "--epochs", str(STEPS // STEPS_PER_EPOCH), "--batch-size", "12",
        "--eval-batch-size", "10", "--method.kind", "uskd", "--method.sync-batch-stats",
        "--method.weak-weight", "0.1", "--mix.mixup", "0.4", "--mix.probability", "0.5",
        # At higher rates a rounding error that flips a ReLU or a rank grows beyond any tolerance.
        "--ema-decay", "0.9", "--optimizer.lr", "0.005", "--log-every", "1", "--gallery", "0",
        "--no-report", "--device", "cpu", "--precision", "no", "--output", str(output), *more,
    ]  # fmt: skip


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Torchrun:
    """A launcher of processes that is at work; `wait` looks how it ended."""

    def __init__(self, options: list[str], command: list[str], **environment: str) -> None:
        launcher = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "softlabels"]
        self.process = subprocess.Popen(
            [*launcher, *command],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait(self) -> None:
        try:
            text, _ = self.process.communicate(timeout=120)
        finally:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
        assert self.process.returncode == 0, text


def one_machine(command: list[str]) -> None:
    Torchrun(["--standalone", "--nproc_per_node", "2"], command).wait()


def two_machines(command: list[str], elsewhere: list[str], **environment: str) -> None:
    """Two launchers that find each other by a port, each with one process."""
    meeting = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d",
               "--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--rdzv_id", "7"]  # fmt: skip
    first = Torchrun([*meeting, "--node_rank", "0"], command, **environment)
    second = Torchrun([*meeting, "--node_rank", "1"], elsewhere, **environment)
    first.wait()
    second.wait()


@pytest.fixture(scope="module", params=["vit", pytest.param("resnet", marks=pytest.mark.slow)])
def runs(request, folder, tmp_path_factory) -> tuple[Path, Path]:
    """Folders of the same run on one process and on two."""
    root, network = tmp_path_factory.mktemp(request.param), NETWORKS[request.param]
    assert main(arguments(folder, root / "one", *network)) == 0
    one_machine(arguments(folder, root / "two", *network))
    return root / "one", root / "two"


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def checkpoint(run: Path) -> dict[str, Any]:
    newest = max((run / "checkpoints").glob("step-*.pt"))
    content: dict[str, Any] = torch.load(newest, weights_only=True)
    assert content["progress"]["step"] == STEPS
    return content


def test_losses_of_every_step_agree(runs):
    one, two = (
        [line for line in lines(run) if any(key.startswith("train/") for key in line)]
        for run in runs
    )
    assert len(one) == STEPS
    assert {"train/loss", "train/task", "train/method", "train/term/method/weak"} <= one[0].keys()
    for ours, theirs in zip(one, two, strict=True):
        for key, value in ours.items():
            if "gradient_share" in key:  # of norms over a process' own samples, then averaged
                assert theirs[key] == pytest.approx(value, abs=0.02)
            else:
                assert theirs[key] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("part", ["trained", "ema"])
def test_weights_agree(runs, part):
    one, two = (checkpoint(run)["parts"][part] for run in runs)
    assert one.keys() == two.keys()
    assert any("weak_logits.fc" in name for name in one)  # the method's head is among them
    for name, value in one.items():
        # A bias of 1e-6 is itself little more than rounding: it is measured by what counts.
        scale = max(float(value.abs().max()), 1e-3)
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-4 * scale, msg=name)


def test_metrics_agree(runs):
    one, two = (json.loads((run / "summary.json").read_text())["final"] for run in runs)
    for name, value in one.items():
        if name in (
            "nll",
            "ece",
            "zipf_r2",
            "zipf_exponent",
        ):  # sums of rounded numbers, in another order
            assert two[name] == pytest.approx(value, rel=1e-4)
        else:  # each image counted once
            assert two[name] == value
            assert value * NUM_TEST / 100 == pytest.approx(round(value * NUM_TEST / 100), abs=1e-4)
    environments = [json.loads((run / "environment.json").read_text()) for run in runs]
    assert [environment["processes"] for environment in environments] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("runs", ["vit"], indirect=True)
def test_two_machines_equal_one_and_only_the_first_needs_the_folder(runs, folder, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    # What threads of the communication library do now and then while Python is torn down.
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os\nif 'LOCAL_RANK' in os.environ: atexit.register(os.abort)\n"
    )
    two_machines(
        *(arguments(folder, output, *NETWORKS["vit"]) for output in (here, there)),
        PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
    )

    assert not there.exists()
    for name in ("metrics.jsonl", "student.safetensors"):
        assert (here / name).read_bytes() == (runs[1] / name).read_bytes(), name


# A network with batch statistics: its own are those of each process, so its weights differ from
# one process'. What is the same on all processes, and joint, is looked at from inside.


def batch_norm_config(folder: Path) -> Config:
    return resolve(
        {
            "data": {"path": str(folder), "image_size": 32, "workers": 0},
            "student": {"name": "timm:resnet8_glyphs"},
            "method": {"kind": "uskd", "sync_batch_stats": True, "weak_weight": 0.1},
            "method_weight": 1.0,
            "optimizer": {"lr": 0.02},
            "epochs": 2,
            "batch_size": 12,
            "eval_batch_size": 10,
            "ema_decay": 0.9,
            "log_every": 1,
            "device": "cpu",
        }
    )


class Noting(Observer):
    """Keeps what the engine tells."""

    def __init__(self) -> None:
        self.told: list[dict[str, float]] = []

    def step(self, epoch: int, step: int, images: int, seconds: float, scalars: Any) -> None:
        self.told.append(scalars)

    def epoch(self, epoch: int, step: int, scalars: dict[str, float]) -> None:
        self.told.append(scalars)


def batch_norm_run(folder: Path) -> dict[str, Any]:
    """What one process sees of a run."""
    config = batch_norm_config(folder)
    accelerator = Accelerator(cpu=True)
    source = build_source(config)
    config = with_defaults(config, source.info)
    distiller = build_distiller(config, source.info)
    steps = source.steps_per_epoch(config.batch_size)
    optimizer = build_optimizer(config.optimizer, distiller.trainable)
    schedule = build_schedule(
        config.schedule, optimizer, epochs=config.epochs, steps_per_epoch=steps
    )
    task = ClassificationTask(config, source.info, distiller.extras)
    engine = Engine(distiller, optimizer, schedule, source, accelerator, config, task)
    fixed = engine.evaluate()  # of the untrained student, the same everywhere
    noting = Noting()
    engine.fit([noting], InterruptGuard())

    batch = next(
        source.train_batches(
            seed=0,
            epoch=0,
            batch_size=config.batch_size,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            device="cpu",
        )
    )
    averaged = engine.ema.module.state_dict()
    step = distiller(batch.images, batch.target)
    return {
        "fixed": fixed,
        "told": noting.told,
        "state": distiller.state_dict(),
        "averaged": averaged,
        "logits": step.logits.detach(),
        "weak_logits": step.heads[1].detach(),
        "target": batch.target,
        "index": batch.index,
        "method": step.totals()["method"],
    }


def work(rank: int, folder: str, results: str, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    torch.save(batch_norm_run(Path(folder)), f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def inside(folder, tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    results, port = tmp_path_factory.mktemp("inside"), free_port()
    forked = multiprocessing.get_context("forkserver")
    forked.set_forkserver_preload(["softlabels.training.trainer", "softlabels.cli"])
    processes = [
        forked.Process(target=work, args=(rank, str(folder), str(results), port), daemon=True)
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    return [torch.load(results / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_with_batch_norm_both_processes_hold_the_same_parameters_and_heads(inside, folder):
    first, second = inside
    names = [name for name in first["state"] if "running" not in name]
    assert any("weak_logits.fc" in name for name in names)
    for name in names:
        assert torch.equal(first["state"][name], second["state"][name]), name
        averaged = name.removeprefix("trainable.")
        assert torch.equal(first["averaged"][averaged], second["averaged"][averaged]), name
    assert not torch.equal(first["index"], second["index"])  # each had images of its own
    assert any(
        not torch.equal(first["state"][name], second["state"][name])
        for name in first["state"]
        if "running" in name
    )


def test_with_batch_norm_logs_and_metrics_are_joint(inside):
    first, second = inside
    assert first["told"] == second["told"]
    assert len(first["told"]) == 2 * (STEPS_PER_EPOCH + 1)


def test_with_batch_norm_the_methods_statistic_is_joint(inside):
    joined = {
        name: torch.cat([found[name] for found in inside])
        for name in ("logits", "weak_logits", "target")
    }
    mean = sum(float(found["method"]) for found in inside) / 2
    assert mean == pytest.approx(float(uskd_loss(**joined, weak_weight=0.1)), rel=1e-5)
    apart = [uskd_loss(f["logits"], f["weak_logits"], f["target"], weak_weight=0.1) for f in inside]
    assert mean != pytest.approx(float(sum(apart) / 2), rel=1e-5)


def metrics_of_one_process(folder: Path, averaged: dict[str, Tensor] | None) -> dict[str, float]:
    config = batch_norm_config(folder)
    source = build_source(config)
    distiller = build_distiller(with_defaults(config, source.info), source.info)
    if averaged is not None:
        distiller.trainable.load_state_dict(averaged)
    batches = source.test_batches(batch_size=config.eval_batch_size, device="cpu")
    return evaluate(distiller.student, batches, source.info, torch.device("cpu"))


@pytest.mark.parametrize("which", ["untrained", "trained"])
def test_with_batch_norm_metrics_are_those_of_the_first_process_network(inside, folder, which):
    trained = which == "trained"
    averaged = inside[0]["averaged"] if trained else None
    expected = metrics_of_one_process(folder, averaged)
    for found in inside:
        metrics = found["told"][-1] if trained else found["fixed"]
        for name, value in expected.items():
            if name in (
                "nll",
                "ece",
                "zipf_r2",
                "zipf_exponent",
            ):  # sums of rounded numbers, in another order
                assert metrics[f"eval/{name}"] == pytest.approx(value, rel=1e-5)
            else:
                assert metrics[f"eval/{name}"] == value


# The script for SLURM, with stand-ins for its commands that start the tasks on this machine.

SRUN = """#!{python}
import os, signal, subprocess, sys
tasks = []
for rank in map(str, range(int(os.environ["SLURM_NTASKS"]))):
    environment = {{**os.environ, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}}
    tasks.append(subprocess.Popen(sys.argv[1:], env=environment))
signal.signal(signal.SIGTERM, lambda number, _: [task.send_signal(number) for task in tasks])
status = max(task.wait() for task in tasks)
open(os.environ["REQUEUED"] + "-after", "w").close()
sys.exit(status)
"""
SCONTROL = """#!/bin/sh
[ "$1 $2" = "show hostnames" ] && echo 127.0.0.1 && exit
[ -e "$REQUEUED-after" ] && echo "$@" >> "$REQUEUED"
"""


def slurm(folder: Path, command: list[str]) -> subprocess.Popen[str]:
    """The script as a job of two tasks on this machine."""
    programs = {
        "srun": SRUN.format(python=sys.executable),
        "scontrol": SCONTROL,
        "softlabels": f'#!/bin/sh\nexec {sys.executable} -m softlabels "$@"\n',
    }
    (folder / "bin").mkdir(exist_ok=True)
    for name, content in programs.items():
        (folder / "bin" / name).write_text(content)
        (folder / "bin" / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "here",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "REQUEUED": str(folder / "requeued"),
    }
    return subprocess.Popen(
        ["bash", str(ROOT / "examples" / "slurm.sh"), *command[1:]],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("runs", ["vit"], indirect=True)
def test_a_slurm_job_that_is_asked_to_go_is_queued_again_and_goes_on(runs, folder, tmp_path):
    output = tmp_path / "run"
    command = arguments(folder, output, *NETWORKS["vit"], "--checkpoint.every", "1000")
    asked = slurm(tmp_path, command)
    written = output / "metrics.jsonl"
    while not written.exists() or len(written.read_text().splitlines()) < STEPS // 2:
        assert asked.poll() is None, asked.communicate()[0]
        time.sleep(0.02)
    asked.terminate()

    text, _ = asked.communicate(timeout=120)
    assert asked.returncode == 143, text
    assert "the same command goes on from there" in text
    assert (tmp_path / "requeued").read_text().split()[0] == "requeue"

    again = slurm(tmp_path, command)
    text, _ = again.communicate(timeout=120)
    assert again.returncode == 0, text
    assert "going on after step" in text
    assert len((tmp_path / "requeued").read_text().splitlines()) == 1
    for name in ("metrics.jsonl", "student.safetensors"):
        assert (output / name).read_bytes() == (runs[1] / name).read_bytes(), name
