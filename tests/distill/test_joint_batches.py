"""Two processes with 7 and 3 samples give what one process gives on the joined batch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, distributed, multiprocessing, nn

from shared.small_networks import IMAGE_SHAPE, hard_labels, images_of, small_cnn
from softlabels import Distiller, USKDLoss
from softlabels.data import Batch
from softlabels.losses import uskd_loss
from softlabels.training.config import resolve
from softlabels.training.engine import Engine
from softlabels.training.errors import InterruptGuard
from softlabels.training.task import ClassificationTask

pytestmark = pytest.mark.distributed

UNEVEN = (slice(0, 7), slice(7, 10))
HALVES = (slice(0, 5), slice(5, 10))
NUM_SAMPLES = 10
IGNORED = -1


def labels_of(kind: str) -> Tensor:
    indices = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4])
    if kind == "indices":
        return indices
    if kind == "ignored":
        return indices.masked_fill(torch.tensor([0, 1, 0, 0, 0, 1, 0, 1, 1, 0]).bool(), IGNORED)
    mixed = nn.functional.one_hot(indices, 5).double()
    share = torch.linspace(0.5, 1.0, NUM_SAMPLES, dtype=torch.float64).unsqueeze(1)
    return share * mixed + (1 - share) * mixed.roll(2, 1)


def loss_and_gradients(kind: str, part: slice, **settings: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    logits = 2 * torch.randn(NUM_SAMPLES, 5, generator=generator).double()
    weak_logits = torch.randn(NUM_SAMPLES, 5, generator=generator).double()
    logits, weak_logits = (x[part].clone().requires_grad_() for x in (logits, weak_logits))
    loss = uskd_loss(
        logits,
        weak_logits,
        labels_of(kind)[part],
        target_term="both" if kind == "indices" else "T1",
        ignore_index=IGNORED if kind == "ignored" else None,
        reduction="sum",
        **settings,
    )
    loss.backward()
    return {"loss": loss.detach(), "logits": logits.grad, "weak_logits": weak_logits.grad}


class CutSource:
    """One batch a step, cut in two parts for two processes."""

    def __init__(self, parts: tuple[slice, slice]) -> None:
        self.parts = parts

    info = SimpleNamespace(groups=None, num_classes=5, in_channels=3)

    def steps_per_epoch(self, batch_size: int) -> int:
        return 4

    def train_batches(self, *, rank: int, world_size: int, **others: Any) -> Iterator[Batch]:
        part = self.parts[rank] if world_size == 2 else slice(None)
        index = torch.arange(NUM_SAMPLES)[part]
        for step in range(4):
            images = images_of(NUM_SAMPLES)[part]
            yield Batch(images, (hard_labels(NUM_SAMPLES)[part] + step) % 5, index)


def trained(grad_accum_steps: int = 1, parts: tuple[slice, slice] = UNEVEN) -> dict[str, Tensor]:
    """The weights after an epoch of the engine, from the same start on every process."""
    torch.manual_seed(3)
    distiller = Distiller(
        small_cnn(norm="group"),
        USKDLoss(weak_weight=0.5, sync_batch_stats=True),
        example_shape=IMAGE_SHAPE,
    )
    config = resolve(
        {"epochs": 1, "grad_accum_steps": grad_accum_steps, "batch_size": 12, "log_every": 2}
    )
    optimizer = torch.optim.SGD(distiller.parameters(), 0.5, momentum=0.9)
    schedule: Any = SimpleNamespace(step_update=lambda number: None)
    source = CutSource(parts)
    task = ClassificationTask(config, source.info, distiller.extras)
    engine = Engine(distiller, optimizer, schedule, source, Accelerator(cpu=True), config, task)
    engine.evaluate = dict  # what is under test is the training
    engine.fit([], InterruptGuard())
    return distiller.state_dict()


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost",
        MASTER_PORT="0",
    )  # fmt: skip
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    result = {
        kind: {
            sync: loss_and_gradients(kind, UNEVEN[rank], sync_batch_stats=sync)
            for sync in (True, False)
        }
        for kind in ("indices", "mixed", "ignored")
    }
    compiled = torch.compile(uskd_loss, fullgraph=True, backend="aot_eager")
    logits = torch.eye(10, 5).double()[UNEVEN[rank]].requires_grad_()
    compiled(logits, None, labels_of("indices")[UNEVEN[rank]], weak_weight=0, rank_from="final",
             sync_batch_stats=True).backward()  # fmt: skip
    eager = logits.detach().clone().requires_grad_()
    uskd_loss(eager, None, labels_of("indices")[UNEVEN[rank]], weak_weight=0, rank_from="final",
              sync_batch_stats=True).backward()  # fmt: skip
    result["compiled"] = {"compiled": logits.grad, "eager": eager.grad}
    result["trained"] = trained()
    result["accumulated"] = trained(grad_accum_steps=4, parts=HALVES)
    torch.save(result, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, Any]]:
    folder = Path(tmp_path_factory.mktemp("uneven"))
    multiprocessing.spawn(work, (str(folder),), 2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def joined(results: list[dict[str, Any]], kind: str, *, sync: bool) -> dict[str, Tensor]:
    parts = [result[kind][sync] for result in results]
    return {
        "loss": parts[0]["loss"] + parts[1]["loss"],
        **{name: torch.cat([p[name] for p in parts]) for name in ("logits", "weak_logits")},
    }


@pytest.mark.parametrize("kind", ["indices", "mixed", "ignored"])
def test_joint_statistics_give_the_sum_and_gradients_of_the_joined_batch(results, kind):
    expected = loss_and_gradients(kind, slice(None))

    for name, value in joined(results, kind, sync=True).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-8, msg=name)


@pytest.mark.parametrize("kind", ["indices", "mixed", "ignored"])
def test_statistics_of_each_process_give_something_else(results, kind):
    expected = loss_and_gradients(kind, slice(None))

    separate = joined(results, kind, sync=False)

    assert not torch.allclose(separate["loss"], expected["loss"], rtol=1e-6)
    assert not torch.allclose(separate["logits"], expected["logits"], rtol=1e-6)


def test_without_other_processes_joint_statistics_are_the_process_own(results):
    alone = loss_and_gradients("mixed", slice(None), sync_batch_stats=True)

    torch.testing.assert_close(alone, loss_and_gradients("mixed", slice(None)), rtol=0, atol=0)


def test_joint_statistics_compile_to_one_graph(results):
    for result in results:
        torch.testing.assert_close(result["compiled"]["compiled"], result["compiled"]["eager"])


def test_the_engine_counts_every_sample_the_same_though_batches_differ(results):
    expected = trained()

    for name, value in results[0]["trained"].items():
        assert torch.equal(value, results[1]["trained"][name]), name
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_processes_agree_though_their_samples_do_not_divide_by_the_accumulation(results):
    """Five samples in four parts: `chunk` makes three, of which none would be the last."""
    first, second = (result["accumulated"] for result in results)

    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert any(not torch.allclose(value, results[0]["trained"][n]) for n, value in first.items())
