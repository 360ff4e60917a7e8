"""Two processes: heads stay equal on both, and their gradients are those of the joined batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from shared.small_networks import IMAGE_SHAPE, hard_labels, images_of, small_cnn
from shared.toy_method import ToyLoss
from softlabels import Distiller, NKDLoss, Teacher, USKDLoss, ZipfLSLoss

pytestmark = pytest.mark.distributed

NUM_PROCESSES = 2
NUM_SAMPLES = 8
HEAD = "trainable.providers.weak_logits.fc.weight"

# Group norm, so that a batch cut in two gives what the whole one gives.
METHODS = {
    "nkd": lambda: NKDLoss(temperature=2),
    "uskd": lambda: USKDLoss(weak_weight=1.0),
    "uskd without batch mean": lambda: USKDLoss(target_weight=0, weak_weight=1.0),
    "toy": lambda: ToyLoss(num_samples=NUM_SAMPLES),
    "zipf_ls": ZipfLSLoss,
}
WITHOUT_BATCH_STATISTICS = sorted(METHODS.keys() - {"uskd"})


def distiller_of(name: str) -> Distiller:
    torch.manual_seed(3)
    teacher = Teacher(small_cnn(seed=1)) if name == "nkd" else None
    student = small_cnn(norm="group")
    return Distiller(student, METHODS[name](), teacher=teacher, example_shape=IMAGE_SHAPE).double()


def gradients_of(distiller: Distiller, part: slice) -> dict[str, Tensor]:
    """Gradients of the first step on these samples."""
    images, labels = images_of(NUM_SAMPLES).double(), hard_labels(NUM_SAMPLES)
    index = torch.arange(NUM_SAMPLES)
    distiller(images[part], labels[part], index=index[part]).loss.backward()
    # Named by the distiller's own module: a wrapper puts "module." before the names.
    trained = distiller.trainable
    trained = trained.module if isinstance(trained, DistributedDataParallel) else trained
    return {name: p.grad.clone() for name, p in trained.named_parameters()}


def train(distiller: Distiller, part: slice, num_steps: int = 3) -> dict[str, Tensor]:
    """The state after some steps on these samples, with their labels moved on at each step."""
    optimizer = torch.optim.SGD(distiller.parameters(), 0.5, momentum=0.9)
    images, labels = images_of(NUM_SAMPLES).double(), hard_labels(NUM_SAMPLES)
    for step in range(num_steps):
        optimizer.zero_grad()
        distiller(images[part], (labels[part] + step) % 5).loss.backward()
        optimizer.step()
    return distiller.state_dict()


def wrapped(distiller: Distiller) -> Distiller:
    distiller.trainable = DistributedDataParallel(distiller.trainable)
    return distiller


def work(rank: int, folder: str) -> None:
    """All that one process computes, written to a file of its own."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=NUM_PROCESSES
    )
    size = NUM_SAMPLES // NUM_PROCESSES
    part = slice(rank * size, (rank + 1) * size)
    result = {
        "gradients": {name: gradients_of(wrapped(distiller_of(name)), part) for name in METHODS},
        "trained": train(wrapped(distiller_of("uskd")), part),
        "alone": train(distiller_of("uskd"), part),
    }
    torch.save(result, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, Any]]:
    folder = Path(tmp_path_factory.mktemp("two_processes"))
    multiprocessing.spawn(work, (str(folder),), NUM_PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(NUM_PROCESSES)]


def test_the_weak_head_is_equal_on_both_processes_after_three_steps(results):
    first, second = (result["trained"] for result in results)

    assert first.keys() == distiller_of("uskd").state_dict().keys()
    assert HEAD in first
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert not torch.allclose(first[HEAD], distiller_of("uskd").state_dict()[HEAD])


def test_two_processes_that_do_not_talk_would_differ(results):
    """So that equal weights mean something: the processes see different samples."""
    first, second = (result["alone"] for result in results)

    assert not torch.allclose(first[HEAD], second[HEAD])


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_takes_part_and_agrees(results, name):
    first, second = (result["gradients"][name] for result in results)

    for parameter, value in first.items():
        assert value.any(), parameter
        assert torch.equal(value, second[parameter]), parameter


@pytest.mark.parametrize("name", WITHOUT_BATCH_STATISTICS)
def test_gradients_are_those_of_one_process_on_the_joined_batch(results, name):
    expected = gradients_of(distiller_of(name), slice(None))

    for parameter, value in results[0]["gradients"][name].items():
        torch.testing.assert_close(value, expected[parameter], rtol=1e-6, atol=1e-9)


def test_uskds_mean_is_that_of_each_process(results):
    """As in the paper's runs: the soft target's mean runs over the process' own samples."""
    halves = [gradients_of(distiller_of("uskd"), part) for part in (slice(0, 4), slice(4, 8))]
    joined = gradients_of(distiller_of("uskd"), slice(None))

    for parameter, value in results[0]["gradients"]["uskd"].items():
        mean = torch.stack([half[parameter] for half in halves]).mean(0)
        torch.testing.assert_close(value, mean, rtol=1e-6, atol=1e-9)
    name = "student.fc.weight"
    assert not torch.allclose(results[0]["gradients"]["uskd"][name], joined[name], rtol=1e-6)


def test_the_state_has_the_names_of_one_process(results):
    plain = distiller_of("uskd")

    plain.load_state_dict(results[0]["trained"])

    assert isinstance(plain.export(), nn.Module)
    assert torch.equal(plain.state_dict()[HEAD], results[1]["trained"][HEAD])
