"""Every method in two processes: slow."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from shared.method_runs import CNN, VITS, Family, able, batches, built, output_of, source
from softlabels import Distiller
from softlabels.data import Batch
from softlabels.losses import METHODS

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

NUM_PROCESSES = 2
STEPS = 3

# A ViT has no batch statistics, so a batch cut in two can give what the whole one gives.
FAMILY = replace(VITS, teacher=lambda: VITS.student(1))

# What relates the samples of a batch to each other does so within that of a process.
PER_PROCESS = {
    "dist": "correlations over the batch",
    "rkd": "distances and angles between samples",
    "sp": "similarities of samples",
    "pkt": "similarities of samples",
    "bake": "neighbors",
    "tf_fd": "the order of channels",
    "tf_nkd": "a mean target",
    "uskd": "a mean target",
}
# DDGSD compares means over the batch too; LayerNorm makes both 0 for the untrained ViT.
DOCUMENTED = {*PER_PROCESS, "ddgsd", "srrl", "tat", "reviewkd", "fitnet", "frskd"}
# Heads, or for OFD a student, with BatchNorm; and random draws, of each process its own.
OF_HEADS = {"srrl", "tat", "reviewkd", "fitnet", "frskd", "ofd", "mgd", "vitkd", "crd"}
WITH_MEMORY = {
    "ps_kd": ("predictions", "seen"),
    "ols": ("class_sum", "class_count"),
    "crd": ("student_memory", "teacher_memory", "labels"),
}


def family_of(kind: str) -> Family:
    return FAMILY if able(kind, FAMILY) else CNN


def distiller_of(kind: str) -> Distiller:
    return built(kind, family_of(kind), num_samples=source().num_train).double()


def in_double(batch: Batch) -> Batch:
    extras = {k: v.double() if v.is_floating_point() else v for k, v in batch.extras.items()}
    return replace(batch, images=batch.images.double(), extras=extras)


def copied(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in values.items()}


def memory_of(distiller: Distiller) -> dict[str, Tensor]:
    found = [dict(memory.named_buffers()) for memory in distiller.memories()]
    return copied(found[0]) if found else {}


def steps(distiller: Distiller, rank: int, world_size: int, number: int) -> dict[str, Any]:
    """So many steps on a process' share: gradients and memory of the first, and what they end with.

    Args:
        distiller: Its `trainable` may be wrapped.
        rank: Of the process.
        world_size: Number of processes.
        number: Of steps.
    """
    result: dict[str, Any] = {}
    optimizer = torch.optim.AdamW(distiller.parameters(), 1e-3)
    shares = batches(distiller, range(1), rank=rank, world_size=world_size)
    for _, batch in zip(range(number), shares, strict=False):
        torch.manual_seed(rank)
        output_of(distiller, in_double(batch)).loss.backward()
        gradients = {
            name.replace(".module.", "."): p.grad for name, p in distiller.named_parameters()
        }
        optimizer.step()
        distiller.after_step()
        if not result:
            result = {"gradients": copied(gradients), "first_memory": memory_of(distiller)}
        optimizer.zero_grad()
    distiller.after_epoch()
    weights = dict(distiller._core.named_parameters())
    return {**result, "weights": copied(weights), "memory": memory_of(distiller)}


def work(rank: int, folder: str) -> None:
    """All that one process computes, written to a file of its own."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=NUM_PROCESSES
    )
    results = {}
    for kind in METHODS:
        distiller = distiller_of(kind)
        distiller.trainable = DistributedDataParallel(distiller.trainable, broadcast_buffers=False)
        results[kind] = steps(distiller, rank, NUM_PROCESSES, STEPS)
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, Any]]:
    folder = Path(tmp_path_factory.mktemp("two_processes"))
    multiprocessing.spawn(work, (str(folder),), NUM_PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(NUM_PROCESSES)]


@pytest.mark.parametrize("kind", METHODS)
def test_both_processes_end_with_the_same_weights_and_memory(results, kind):
    first, second = (result[kind] for result in results)

    start = dict(distiller_of(kind)._core.named_parameters())
    assert first["weights"].keys() == start.keys()
    assert any(not torch.equal(value, start[name]) for name, value in first["weights"].items())
    for what in ("gradients", "weights", "memory"):
        for name, value in first[what].items():
            assert torch.equal(value, second[what][name]), name
    assert bool(first["memory"]) == (kind in WITH_MEMORY)


@pytest.mark.parametrize("kind", METHODS)
def test_gradients_are_those_of_one_process_where_samples_count_by_themselves(results, kind):
    expected = steps(distiller_of(kind), 0, 1, 1)["gradients"]
    found = results[0][kind]["gradients"]

    gap = max(
        float((found[name] - value).abs().max() / value.abs().max().clamp(min=1e-9))
        for name, value in expected.items()
    )
    if kind in PER_PROCESS or kind in OF_HEADS:
        assert gap > 1e-7  # or it should not be listed
    else:
        assert gap < 1e-10


@pytest.mark.parametrize("kind", sorted(DOCUMENTED))
def test_what_is_of_a_process_is_documented(kind):
    text = inspect.getdoc(METHODS[kind]) or ""
    paragraph = text.partition("Distributed:")[2].partition("\n\n")[0]

    assert "process" in paragraph or "sync_batch_stats" in paragraph


@pytest.mark.parametrize("kind", WITH_MEMORY)
def test_the_memory_holds_what_one_process_would_remember(results, kind):
    expected = steps(distiller_of(kind), 0, 1, 1)["first_memory"]

    for name in WITH_MEMORY[kind]:
        torch.testing.assert_close(results[0][kind]["first_memory"][name], expected[name])
