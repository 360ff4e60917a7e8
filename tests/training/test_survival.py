"""Runs that are killed or stopped at any moment end as if nobody had touched them."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from shared.living_runs import LivingRun, steps_done, unfinished

EPOCHS, STEPS_PER_EPOCH = 12, 3
STEPS = EPOCHS * STEPS_PER_EPOCH
SAME = ("metrics.jsonl", "student.safetensors", "student_best.safetensors", "gallery.json")


def arguments(image_folder: Path, *more: str) -> list[str]:
    """A run with everything that has a state: momentum, averaged weights, a head, dropout."""
    return [
        "--data.path", str(image_folder), "--data.image-size", "32", "--data.workers", "0",
        "--student.name", "timm:resnet8_glyphs", "--student.settings", "drop_rate", "0.2",
        "--method.kind", "uskd", "--epochs", str(EPOCHS), "--batch-size", "16",
        "--optimizer.lr", "0.05", "--ema-decay", "0.9", "--mix.mixup", "0.4", "--gallery", "2",
        "--log-every", "1", "--checkpoint.every", "2", "--device", "cpu", *more,
    ]  # fmt: skip


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(1, id="one process"),
        pytest.param(2, id="two processes", marks=pytest.mark.slow),
    ],
)
def undisturbed(request, image_folder, tmp_path_factory) -> tuple[int, Path]:
    """Number of processes, and the folder of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run = LivingRun(folder, arguments(image_folder), request.param)
    assert set(run.wait()) == {0}, run.text()
    return request.param, folder


def assert_same(folder: Path, expected: Path) -> None:
    for name in SAME:
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    ours, theirs = (json.loads((f / "summary.json").read_text()) for f in (folder, expected))
    for key in ("final", "best", "complete"):
        assert ours[key] == theirs[key]
    epochs = [json.loads(line)["epoch"] for line in (folder / "timings.jsonl").open()]
    assert epochs == list(range(1, EPOCHS + 1))
    assert not list(unfinished(folder))


def go_on_to_the_end(folder: Path, command: list[str], num_processes: int) -> str:
    run = LivingRun(folder, command, num_processes)
    assert set(run.wait()) == {0}, run.text()
    return run.text()


@pytest.mark.distributed
def test_killed_twice_ends_like_an_undisturbed_run(undisturbed, image_folder, tmp_path):
    num_processes, expected = undisturbed
    command, folder = arguments(image_folder), tmp_path / "run"

    in_training = LivingRun(folder, command, num_processes)
    assert in_training.until_step(STEPS // 3)
    assert in_training.kill(), in_training.text()

    in_a_write = LivingRun(folder, command, num_processes)
    assert in_a_write.until_step(STEPS // 2)
    assert in_a_write.until_writing()
    assert in_a_write.kill(), in_a_write.text()

    assert "going on after step" in go_on_to_the_end(folder, command, num_processes)
    assert_same(folder, expected)


@pytest.mark.slow
@pytest.mark.distributed
def test_killed_again_and_again_ends_like_an_undisturbed_run(undisturbed, image_folder, tmp_path):
    num_processes, expected = undisturbed
    command, folder = arguments(image_folder), tmp_path / "run"
    draws = random.Random(7)
    hits = in_writes = starts = 0
    while hits < 24 or in_writes < 6:
        starts += 1
        assert starts < 200, (hits, in_writes)
        run = LivingRun(folder, command, num_processes)
        # A third while the process starts or evaluates or trains, a third at a step, a third in
        # a write; and the run must get on, or the last phases would never be hit.
        before, kind = steps_done(folder), draws.choice(("any", "step", "write"))
        if kind == "any":
            time.sleep(draws.uniform(0.0, 4.0))
        else:
            goal = min(before + draws.randint(1, 3), STEPS - 1)
            run.until_step(goal)
            if kind == "write":
                run.until_writing()
            else:
                time.sleep(draws.uniform(0.0, 0.1))
        if run.kill():
            hits += 1
            in_writes += bool(list(unfinished(folder)))
        else:
            # It came to its end first: start over, and go on killing.
            assert_same(folder, expected)
            folder = folder.with_name(f"{folder.name}x")
    print(f"{num_processes} processes: {hits} kills of living runs, {in_writes} inside a write")
    assert hits >= 20
    assert in_writes >= 5
    go_on_to_the_end(folder, command, num_processes)
    assert_same(folder, expected)


@pytest.mark.distributed
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_by_a_signal_it_saves_the_step_and_goes_on(
    undisturbed, image_folder, tmp_path, number, status
):
    num_processes, expected = undisturbed
    command, folder = arguments(image_folder, "--checkpoint.every", "1000"), tmp_path / "run"
    run = LivingRun(folder, command, num_processes)
    assert run.until_step(STEPS // 2)
    run.send(number)

    assert set(run.wait()) == {status}, run.text()
    assert "the same command goes on from there" in run.text()
    assert "Traceback" not in run.text()
    stopped = steps_done(folder)
    assert STEPS // 2 <= stopped < STEPS
    names = [path.name for path in (folder / "checkpoints").glob(f"step-{stopped:08d}-*.pt")]
    assert len(names) == 1  # not one step was lost
    assert f"going on after step {stopped}" in go_on_to_the_end(folder, command, num_processes)
    assert_same(folder, expected)


@pytest.mark.distributed
def test_a_signal_to_one_process_stops_all_at_the_same_step(image_folder, tmp_path):
    command, folder = arguments(image_folder, "--checkpoint.every", "1000"), tmp_path / "run"
    run = LivingRun(folder, command, 2)
    assert run.until_step(STEPS // 3)
    run.send(signal.SIGTERM, [1])
    assert run.wait() == [143, 143], run.text()
    assert "Traceback" not in run.text()
    assert list((folder / "checkpoints").glob(f"step-{steps_done(folder):08d}-*.pt"))


def test_a_second_signal_stops_at_once(image_folder, tmp_path):
    folder = tmp_path / "run"
    # Steps of seconds, so that the second signal comes within the one that the first lets finish.
    run = LivingRun(
        folder, arguments(image_folder, "--data.image-size", "640", "--precision", "no")
    )
    assert run.until_step(1), run.text()
    time.sleep(0.5)  # into the next step
    run.send(signal.SIGTERM)
    time.sleep(1)  # an operation of torch has to end before Python sees it
    assert run.lives
    run.send(signal.SIGTERM)
    assert run.wait(2) == [-signal.SIGTERM]


def test_a_folder_in_use_is_refused_and_free_again_after_a_kill(image_folder, tmp_path):
    command, folder = arguments(image_folder), tmp_path / "run"
    first = LivingRun(folder, command)
    assert first.until_step(1)
    second = LivingRun(folder, command)
    assert second.wait() == [2]
    assert f"{folder} is in use by another run, process {first.processes[0].pid} on " in (
        second.text()
    )
    assert first.kill()
    third = LivingRun(folder, command)
    assert third.until(lambda: "going on after step" in third.text())
    third.kill()


@pytest.mark.distributed
def test_what_only_the_first_process_sees_ends_all_of_them(image_folder, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    run = LivingRun(folder, arguments(image_folder), 2)
    assert run.wait() == [2, 2]
    assert run.text().count("is no run folder") == 2


@pytest.mark.distributed
def test_processes_find_each_other_whatever_the_device(image_folder, tmp_path):
    folder = tmp_path / "run"
    run = LivingRun(folder, arguments(image_folder, "--device", "auto", "--epochs", "1"), 2)
    assert run.wait() == [0, 0], run.text()
    assert json.loads((folder / "environment.json").read_text())["processes"] == 2
    assert run.text().count("everything is in") == 1  # one of them tells


@pytest.mark.distributed
def test_a_loss_that_is_not_finite_ends_all_processes_at_the_same_step(image_folder, tmp_path):
    folder = tmp_path / "run"
    run = LivingRun(folder, arguments(image_folder, "--optimizer.lr", "1e30"), 2)
    assert run.wait() == [1, 1]
    # Of two processes one may write beside the other's bar.
    told = [line.partition("softlabels train: ")[2] for line in run.text().splitlines()]
    first, second = (line for line in told if "not finite" in line)
    assert first == second
    failure = json.loads((folder / "failure.json").read_text())
    assert len(failure["images"]) == 16  # those of both processes
    assert "Traceback" not in run.text()


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_used(image_folder, tmp_path):
    command, folder = arguments(image_folder), tmp_path / "run"
    run = LivingRun(folder, command)
    assert run.until_step(8)
    assert run.kill()
    newest, older = sorted((folder / "checkpoints").glob("step-*.pt"), reverse=True)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)

    text = go_on_to_the_end(folder, command, 1)
    assert f"a checkpoint is left out: {newest.name}: no readable checkpoint: damaged" in text
    assert f"from {older.name}" in text


@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_a_lost_process_ends_the_other_with_an_error(image_folder, tmp_path, number):
    folder = tmp_path / "run"
    run = LivingRun(folder, arguments(image_folder, "--process-timeout", "5"), 2)
    assert run.until_step(3)
    run.send(number, ranks=[1])

    started = time.monotonic()
    run.processes[0].join(60)
    assert run.processes[0].exitcode == 1, run.text()
    assert time.monotonic() - started < 40
    assert "process 0 of 2 lost another process of this run" in run.text()
    assert "Traceback" not in run.text()
    run.send(signal.SIGKILL)
    run.wait()


def test_the_checkpoint_reads_back_without_running_code(undisturbed):
    _, folder = undisturbed
    newest = max((folder / "checkpoints").glob("step-*.pt"))
    content = torch.load(newest, weights_only=True)
    assert content["progress"]["step"] == STEPS
    assert set(content["parts"]) == {"trained", "optimizer", "ema", "log"}
    assert len(list((folder / "checkpoints").glob("step-*.pt"))) == 2
