"""What methods remember: in one process, in two, over skipped steps and stored states."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from shared.small_networks import IMAGE_SHAPE, NUM_CLASSES, hard_labels, images_of, small_cnn
from softlabels import Distiller
from softlabels.inputs import Features, FromBatch, Logits
from softlabels.losses import CRDLoss, KDLoss, MemoryBank, Method, OLSLoss, PSKDLoss, WeightedSum

NUM_PROCESSES = 2
NUM_SAMPLES = 8
BATCHES = (torch.tensor([6, 1, 3, 0, 5, 2]), torch.tensor([4, 7, 1, 5, 2, 4]))  # 4 comes twice

METHODS = {
    "ps_kd": lambda: PSKDLoss(num_samples=NUM_SAMPLES),
    "ols": lambda: OLSLoss(initial="uniform"),
    "crd": lambda: CRDLoss(num_samples=NUM_SAMPLES, num_negatives=4, width=6),
    "sum": lambda: WeightedSum(
        {"ols": OLSLoss(), "ps_kd": PSKDLoss(num_samples=NUM_SAMPLES)}, {"ols": 0.5}
    ),
}
# CRD draws its negatives, each process its own: they make the gradient, and no bank.
WITHOUT_DRAWS = sorted(METHODS.keys() - {"crd"})


def distiller_of(name: str, *, seed: int = 3) -> Distiller:
    torch.manual_seed(seed)
    teacher = small_cnn(seed=1) if name == "crd" else None
    student = small_cnn(norm="group", seed=seed)  # a batch cut in two gives what the whole gives
    return Distiller(student, METHODS[name](), teacher=teacher, example_shape=IMAGE_SHAPE).double()


def batch_of(index: Tensor) -> tuple[Tensor, Tensor]:
    """Images and labels of samples."""
    images, labels = images_of(NUM_SAMPLES).double(), hard_labels(NUM_SAMPLES)
    return images[index], labels[index]


def memory_of(distiller: Distiller) -> dict[str, Tensor]:
    """All buffers of the method's memory."""
    return {
        f"{number}.{name}": buffer.clone()
        for number, memory in enumerate(distiller.memories())
        for name, buffer in memory.named_buffers()
    }


def trained(distiller: Distiller, part: slice, *, lr: float = 0.5) -> list[dict[str, Tensor]]:
    """What is remembered after each of two steps and after the epoch."""
    optimizer = torch.optim.SGD(distiller.parameters(), lr)
    found = []
    for index in BATCHES:
        index = index[part]
        optimizer.zero_grad()
        distiller(*batch_of(index), index=index).loss.backward()
        optimizer.step()
        distiller.after_step()
        found.append(memory_of(distiller))
    distiller.after_epoch()
    return [*found, memory_of(distiller)]


def work(rank: int, folder: str) -> None:
    """All that one process computes, written to a file of its own."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=NUM_PROCESSES
    )
    size = len(BATCHES[0]) // NUM_PROCESSES
    result = {}
    for name in METHODS:
        distiller = distiller_of(name)
        # As the trainer does it: the memory is not sent around, it is the same anyway.
        distiller.trainable = DistributedDataParallel(distiller.trainable, broadcast_buffers=False)
        torch.manual_seed(rank)
        lr = 0.5 if name in WITHOUT_DRAWS else 0.0
        result[name] = trained(distiller, slice(rank * size, (rank + 1) * size), lr=lr)
    torch.save(result, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, Any]]:
    folder = Path(tmp_path_factory.mktemp("two_processes"))
    multiprocessing.spawn(work, (str(folder),), NUM_PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(NUM_PROCESSES)]


# Two processes


@pytest.mark.distributed
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_remember_the_same_to_the_last_bit(results, name):
    for first, second in zip(results[0][name], results[1][name], strict=True):
        assert first.keys() == second.keys()
        for buffer, value in first.items():
            assert torch.equal(value, second[buffer]), buffer
    assert any(not torch.equal(value, results[0][name][1][key])
               for key, value in results[0][name][0].items())  # fmt: skip


@pytest.mark.distributed
@pytest.mark.parametrize("name", WITHOUT_DRAWS)
def test_two_processes_remember_what_one_with_the_whole_batch_does(results, name):
    expected = trained(distiller_of(name), slice(None))

    for found, wanted in zip(results[0][name], expected, strict=True):
        for buffer, value in found.items():
            torch.testing.assert_close(value, wanted[buffer], rtol=1e-6, atol=1e-9, msg=buffer)


@pytest.mark.distributed
def test_two_processes_have_the_banks_that_one_with_the_whole_batch_has(results):
    expected = trained(distiller_of("crd"), slice(None), lr=0.0)

    for found, wanted in zip(results[0]["crd"], expected, strict=True):
        assert {*found} == {"0.student_memory", "0.teacher_memory", "0.labels", "0.begun",
                            "0.log_normalizers"}  # fmt: skip
        for buffer in ("student_memory", "teacher_memory", "labels", "begun"):
            torch.testing.assert_close(found[f"0.{buffer}"], wanted[f"0.{buffer}"])
    normalizers = [of_step["0.log_normalizers"] for of_step in results[0]["crd"]]
    assert normalizers[0].isfinite().all()
    assert torch.equal(normalizers[0], normalizers[1])  # those of the first batch stay


# What is remembered, by hand


def test_ps_kd_remembers_the_last_prediction_of_each_sample():
    distiller = distiller_of("ps_kd")
    (index, later), student = BATCHES, distiller.student
    distiller(*batch_of(index), index=index)
    before = memory_of(distiller)
    distiller.after_step()
    first = student(batch_of(index)[0]).softmax(1).detach()
    after = memory_of(distiller)

    assert not before["0.seen"].any()
    assert after["0.seen"].tolist() == [True, True, True, True, False, True, True, False]
    torch.testing.assert_close(after["0.predictions"][index], first)
    assert not after["0.predictions"][[4, 7]].any()

    with torch.no_grad():
        student.fc.weight.mul_(-1)
    distiller(*batch_of(later), index=later)
    distiller.after_step()
    changed = memory_of(distiller)["0.predictions"]
    torch.testing.assert_close(changed[later], student(batch_of(later)[0]).softmax(1).detach())
    assert torch.equal(changed[[6, 3, 0]], after["0.predictions"][[6, 3, 0]])


def test_ols_replaces_its_labels_at_the_end_of_an_epoch():
    distiller = distiller_of("ols")
    with torch.no_grad():
        distiller.student.fc.bias[2] += 10  # all are predicted as class 2
    index = BATCHES[0]
    distiller(*batch_of(index), index=index)
    distiller.after_step()
    labels = memory_of(distiller)["0.soft_labels"]
    distiller.after_epoch()

    expected = torch.full((NUM_CLASSES, NUM_CLASSES), 1 / NUM_CLASSES).double()
    torch.testing.assert_close(labels, expected)
    of_class_2 = torch.tensor([0, 0, 0, 0, 0, 1]).bool()  # sample 2; sample 7 is not there
    images = batch_of(index)[0]
    expected[2] = distiller.student(images).softmax(1)[of_class_2].mean(0).detach()
    torch.testing.assert_close(memory_of(distiller)["0.soft_labels"], expected)
    assert not memory_of(distiller)["0.class_count"].any()


def test_crd_moves_the_rows_of_its_batch():
    distiller = distiller_of("crd")
    index, before = BATCHES[0], memory_of(distiller)
    distiller(*batch_of(index), index=index)
    distiller.after_step()
    after = memory_of(distiller)

    heads = distiller.trainable.adapters
    student = distiller.student
    maps = student.stage2(student.stage1(student.stem(batch_of(index)[0])))
    new = nn.functional.normalize(heads.student_embedding(maps.mean((2, 3))))
    moved = nn.functional.normalize(0.5 * before["0.student_memory"][index] + 0.5 * new)
    torch.testing.assert_close(after["0.student_memory"][index], moved.detach())
    for buffer in ("0.student_memory", "0.teacher_memory"):
        assert torch.equal(after[buffer][[4, 7]], before[buffer][[4, 7]])
        assert not torch.isclose(after[buffer][index], before[buffer][index]).all(1).any()
    assert after["0.labels"].tolist() == [0, 1, 2, 3, -1, 0, 1, -1]


# Steps


@pytest.mark.parametrize("name", METHODS)
def test_a_forward_changes_nothing_and_a_skipped_step_leaves_no_trace(name):
    distiller = distiller_of(name)
    trained(distiller, slice(None))  # so that there is something to change
    before = memory_of(distiller)
    index = BATCHES[0]

    distiller(*batch_of(index), index=index).loss.backward()
    for key, value in memory_of(distiller).items():
        assert torch.equal(value, before[key]), key
    distiller.forget_step()
    distiller.after_step()

    for key, value in memory_of(distiller).items():
        assert torch.equal(value, before[key]), key
    distiller(*batch_of(index), index=index)
    distiller.after_step()
    assert any(not torch.equal(v, before[k]) for k, v in memory_of(distiller).items())


@pytest.mark.parametrize("name", METHODS)
def test_an_evaluation_leaves_no_trace(name):
    distiller = distiller_of(name)
    before, index = memory_of(distiller), BATCHES[0]

    with torch.no_grad():
        distiller(*batch_of(index), index=index)
    distiller.eval()(*batch_of(index), index=index)
    distiller.train().after_step()

    for key, value in memory_of(distiller).items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", WITHOUT_DRAWS)
def test_micro_batches_are_remembered_as_the_whole_batch(name):
    whole, cut = distiller_of(name), distiller_of(name)
    index = BATCHES[1]

    whole(*batch_of(index), index=index)
    for part in index.split(2):
        cut(*batch_of(part), index=part)
    for distiller in (whole, cut):
        distiller.after_step()
        distiller.after_epoch()

    for key, value in memory_of(cut).items():
        torch.testing.assert_close(value, memory_of(whole)[key], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_a_stored_state_goes_on_as_if_nothing_had_happened(name):
    distiller, other = distiller_of(name), distiller_of(name, seed=4)
    trained(distiller, slice(None))
    state = copy.deepcopy(distiller.state_dict())

    other.load_state_dict(state)

    for key, value in memory_of(other).items():
        assert torch.equal(value, memory_of(distiller)[key]), key
    losses = []
    for each in (distiller, other):
        torch.manual_seed(7)
        losses.append(trained(each, slice(None)))
    for first, second in zip(*losses, strict=True):
        assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("name", METHODS)
def test_memory_is_stored_with_the_rest_and_not_trained_and_not_exported(name):
    distiller = distiller_of(name)
    buffers = {n for n, _ in distiller.named_buffers() if ".adapters." in n}

    assert len(buffers) == len(memory_of(distiller)) > 0
    assert buffers <= distiller.state_dict().keys()
    assert not buffers & {name for name, _ in distiller.named_parameters()}
    assert distiller.export().state_dict().keys() == small_cnn(norm="group").state_dict().keys()


def test_only_what_is_remembered_is_kept_until_the_step_ends():
    class Watching(MemoryBank):
        memory_inputs = ("logits", "index")

        def __init__(self) -> None:
            super().__init__()
            self.given: list[Mapping[str, object]] = []

        def forward(self, values: Mapping[str, object]) -> dict[str, object]:
            return {}

        def after_step(self, values: Mapping[str, object]) -> None:
            assert not torch.is_grad_enabled()
            self.given.append(values)

    class WatchingLoss(Method):
        inputs: ClassVar = {"logits": Logits()}
        adapter_inputs: ClassVar = {"features": Features(), "index": FromBatch()}

        def build_adapters(self, shapes: Mapping[str, object]) -> nn.Module:
            return Watching()

        def terms(self, logits: Tensor) -> dict[str, Tensor]:
            return {"mean": logits.mean(1)}

    distiller = Distiller(small_cnn(), WatchingLoss(), example_shape=IMAGE_SHAPE)
    index = torch.arange(4)
    step = distiller(images_of(), hard_labels(), index=index)
    distiller.after_step()

    (given,) = distiller.trainable.adapters.given
    assert given.keys() == {"logits", "index"}
    assert torch.equal(given["logits"], step.logits)
    assert not given["logits"].requires_grad
    assert torch.equal(given["index"], index)
    distiller.after_step()
    assert len(distiller.trainable.adapters.given) == 1


def test_a_loop_that_never_ends_a_step_is_told():
    distiller = distiller_of("ols")
    batch = batch_of(torch.tensor([0]))
    for _ in range(256):
        distiller(*batch)

    with pytest.raises(RuntimeError, match="OLSLoss has a memory, and 256 batches wait for it"):
        distiller(*batch)


# Size


def test_the_size_of_what_is_kept_is_told():
    of_ps_kd = NUM_SAMPLES * NUM_CLASSES * 8 + NUM_SAMPLES  # in double precision, and a bool each
    of_ols = (2 * NUM_CLASSES**2 + NUM_CLASSES) * 8

    assert [m.num_bytes() for m in distiller_of("ps_kd").memories()] == [of_ps_kd]
    assert [m.num_bytes() for m in distiller_of("sum").memories()] == [of_ols, of_ps_kd]
    distiller = Distiller(small_cnn(), KDLoss(), teacher=small_cnn(seed=1))
    assert distiller.memories() == []


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            PSKDLoss(),
            "PS-KD remembers each training sample: set num_samples to the size of the training",
        ),
        (CRDLoss(), "CRD remembers each training sample: set num_samples"),
        (
            PSKDLoss(num_samples=10**9),
            r"takes \d+ bytes \(19\.6 GiB\) .* most_memory allows 8 GiB: raise",
        ),
        (
            CRDLoss(num_samples=10**8),
            r"takes \d+ bytes .* most_memory allows 8 GiB: raise most_memory or lower width",
        ),
    ],
)
def test_a_memory_of_unknown_size_or_too_large(method, message):
    teacher = small_cnn(seed=1) if isinstance(method, CRDLoss) else None

    with pytest.raises(ValueError, match=message):
        Distiller(small_cnn(), method, teacher=teacher, example_shape=IMAGE_SHAPE)
