"""Two processes that hold half of the student's weights each train what one process trains."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.utils import ModelEmaV3
from torch import Tensor, distributed, multiprocessing
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from shared.small_networks import small_cnn
from softlabels import Distiller, NKDLoss, Teacher, USKDLoss, ZipfLSLoss
from softlabels.models import build_model

sys.path.insert(0, str(Path(__file__).parents[1]))
from examples.fsdp import Average, plugin, sharded, whole_weights

pytestmark = pytest.mark.distributed

NUM_SAMPLES, NUM_STEPS, CLASSES = 8, 4, 5
DECAY, LR = 0.7, 0.1
METHODS = {
    "uskd": lambda: USKDLoss(weak_weight=0.5, sync_batch_stats=True),
    "zipf_ls": ZipfLSLoss,  # reads the student's own head, at every position
    "nkd": NKDLoss,
}
CASES = [(method, student) for method in METHODS for student in ("vit", "cnn")]
WAYS = ("torch", "accelerate")


def distiller_of(method: str, student: str) -> Distiller:
    torch.manual_seed(3)
    network = (
        build_model("vit_mini_patch4_32", num_classes=CLASSES, settings={"depth": 3})
        if student == "vit"
        else small_cnn(norm="group")
    )
    teacher = Teacher(small_cnn(seed=1)) if method == "nkd" else None
    return Distiller(network, METHODS[method](), teacher=teacher, example_shape=(3, 32, 32))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(NUM_SAMPLES, 3, 32, 32, generator=generator)
    return images, torch.randint(0, CLASSES, (NUM_SAMPLES,), generator=generator)


def train(
    distiller: Distiller,
    optimizer: torch.optim.Optimizer,
    part: slice,
    after_step: Callable[[], None] = lambda: None,
    steps: range = range(NUM_STEPS),
) -> list[float]:
    """Losses of some steps on a part of each batch."""
    losses = []
    for step in steps:
        images, target = batch(step)
        output = distiller(images[part], target[part])
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after_step()
        losses.append(output.loss.item())
    return losses


def prepared(case: tuple[str, str], way: str) -> tuple[Distiller, Any]:
    distiller, accelerator = distiller_of(*case), Accelerator(cpu=True)
    block = "Block" if case[1] == "vit" else "Conv2d"
    if way == "torch":
        return sharded(distiller, accelerator, LR, block)
    # It shards on accelerators only; told that this is one, it does what it does there.
    accelerator.state.fsdp_plugin = plugin(block)
    with mock.patch.object(AcceleratorState, "is_fsdp2", new=True):
        return sharded(distiller, accelerator, LR, block)


def outcome(case: tuple[str, str], way: str, part: slice) -> dict[str, Any]:
    distiller, optimizer = prepared(case, way)
    parameters = list(distiller.parameters())
    average = Average(distiller, DECAY)
    losses = train(distiller, optimizer, part, lambda: average.update(distiller))
    weights = whole_weights(distiller)
    distiller.eval()
    with torch.no_grad():
        logits = distiller.trainable(batch(0)[0]).logits
    return {
        "losses": losses,
        "weights": weights,
        "average": average.whole(),
        "logits": logits,
        "shares": [p.to_local().numel() / p.numel() for p in parameters],
        "are_sharded": all(isinstance(p, DTensor) for p in parameters),
    }


def gone_on(folder: str, part: slice) -> tuple[list[float], list[float]]:
    """Losses after a checkpoint: of who wrote it, and of who began anew from it."""
    case, more = ("uskd", "vit"), range(NUM_STEPS, NUM_STEPS + 2)
    distiller, optimizer = prepared(case, "torch")
    train(distiller, optimizer, part)
    trained, momentum = get_state_dict(distiller.trainable, optimizer)
    checkpoint.save({"trained": trained, "optimizer": momentum}, checkpoint_id=folder)
    expected = train(distiller, optimizer, part, steps=more)

    distiller, optimizer = prepared(case, "torch")
    trained, momentum = get_state_dict(distiller.trainable, optimizer)
    state = {"trained": trained, "optimizer": momentum}
    checkpoint.load(state, checkpoint_id=folder)
    set_state_dict(
        distiller.trainable,
        optimizer,
        model_state_dict=state["trained"],
        optim_state_dict=state["optimizer"],
    )
    return expected, train(distiller, optimizer, part, steps=more)


def work(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    size = NUM_SAMPLES // 2
    part = slice(rank * size, (rank + 1) * size)
    result = {(way, *case): outcome(case, way, part) for case in CASES for way in WAYS}
    torch.save((result, gone_on(f"{folder}/checkpoint", part)), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[Any]:
    """What each process found."""
    folder = tmp_path_factory.mktemp("sharded")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (str(folder), port), 2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_shards_train_what_one_process_trains(results, case, way):
    one = distiller_of(*case)
    average = ModelEmaV3(one.trainable, decay=DECAY)
    optimizer = torch.optim.SGD(one.parameters(), LR, momentum=0.9)
    before = {name: value.clone() for name, value in one.state_dict().items()}
    losses = train(one, optimizer, slice(None), lambda: average.update(one.trainable))
    first, second = (found[0][(way, *case)] for found in results)

    assert first["are_sharded"]
    assert sum(first["shares"]) / len(first["shares"]) < 0.6  # half, and what cannot be halved
    means = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    assert means == pytest.approx(losses, rel=1e-5)
    assert first["weights"].keys() == one.state_dict().keys()
    for name, value in one.state_dict().items():
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-4, atol=1e-5)
    for name, value in average.module.state_dict().items():
        averaged = first["average"][f"trainable.{name}"]
        torch.testing.assert_close(averaged, value, rtol=1e-4, atol=1e-5)
    assert any(not torch.allclose(first["weights"][n], v, atol=1e-3) for n, v in before.items())
    one.eval()
    torch.testing.assert_close(
        first["logits"], one.student(batch(0)[0]).detach(), rtol=1e-3, atol=1e-4
    )


def test_whole_weights_are_an_ordinary_students(results):
    plain = distiller_of("uskd", "vit")
    plain.load_state_dict(results[0][0]["torch", "uskd", "vit"]["weights"])
    logits = plain.export().eval()(batch(0)[0]).detach()
    torch.testing.assert_close(
        results[0][0]["torch", "uskd", "vit"]["logits"], logits, rtol=1e-4, atol=1e-5
    )
    assert results[1][0]["torch", "uskd", "vit"]["weights"] == {}  # gathered by the first alone


def test_a_sharded_run_goes_on_from_its_checkpoint(results):
    for _, (expected, found) in results:
        assert found == expected
