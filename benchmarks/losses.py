"""Measure what the losses cost in time and memory: `make bench-losses`, two threads.

Forward + backward of each loss, with respect to the logits (USKD: also the weak logits), from
tensors that are there already. Everything of one size runs in turn in one process (A B C C B A
...), and ratios are taken within a round; single times mean little on a shared machine.

Memory is the CPU allocator's, as torch.profiler reports it (`profile_memory=True`, allocation
events with their addresses): the largest sum of live allocations since the start of the forward,
without the gradients that come out. It holds what tensors hold; the scratch that a kernel takes
from the system by itself (a sort's: one row a thread) is not seen. `check_memory_counter` tries it
on a case that is known.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from softlabels import Distiller, ZipfLSLoss
from softlabels.distill.trainable import Trainable
from softlabels.experiments.timing import interleaved, ratio
from softlabels.losses import nkd_loss, uskd_loss, zipf_ls_loss
from softlabels.models import build_model
from softlabels.training.config import resolve
from softlabels.training.run_folder import environment

Function: TypeAlias = Callable[..., Tensor]
Run: TypeAlias = Callable[[], tuple[Tensor, ...]]

THREADS = 2
ROUNDS = 60


@dataclass(frozen=True)
class Size:
    """One [B, C]."""

    batch_size: int
    num_classes: int
    rounds: float  # as a share of those asked for
    calls: int  # in one timing, so that it is long for the clock, and the caches are the step's own

    @property
    def name(self) -> str:
        """B x C."""
        return f"{self.batch_size}x{self.num_classes}"


SIZES = (Size(128, 100, 1, 20), Size(256, 1000, 1, 5), Size(256, 10_000, 0.25, 1),
         Size(64, 50_000, 0.2, 1))  # fmt: skip

# At 256x1000: time over a base's in the same rounds; memory in floats of one [B, C].
BOUNDED_SIZE = "256x1000"
TIME_BOUNDS = (
    ("nkd", "cross_entropy", {"eager": 10.0, "compiled": 3.0}),
    ("uskd", "sort", {"eager": 1.5, "compiled": 1.2}),
    ("zipf_ls_49", "cross_entropy", {"eager": 15.0, "compiled": 6.0}),
    ("zipf_ls_196", "cross_entropy", {"eager": 15.0, "compiled": 6.0}),
)
MEMORY_BOUNDS = (("nkd", 3.0), ("uskd", 6.0))
VOTES_MEGABYTES = 64.0


# Transcriptions of the equations: what one writes with a formula beside the keyboard.


def _without_target(values: Tensor, target: Tensor) -> Tensor:
    mask = torch.ones_like(values, dtype=torch.bool)
    mask[torch.arange(len(target)), target] = False
    return values[mask].reshape(values.shape[0], values.shape[1] - 1)


def transcribed_nkd(logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tensor:
    """NKD with the other classes cut out by a boolean mask, and each softmax by itself."""
    index = target[:, None]
    log_s = functional.log_softmax(logits, 1)
    t = functional.softmax(teacher_logits, 1)
    target_loss = -(t.gather(1, index) * log_s.gather(1, index)).mean()
    others_s = functional.log_softmax(_without_target(logits, target), 1)
    others_t = functional.softmax(_without_target(teacher_logits, target), 1)
    return target_loss - 1.5 * (others_t * others_s).sum(1).mean()


def transcribed_uskd(logits: Tensor, weak_logits: Tensor, target: Tensor) -> Tensor:
    """USKD with ranks from a double argsort."""
    index = target[:, None]
    num_classes = logits.shape[1]
    log_s = functional.log_softmax(logits, 1)
    log_w = functional.log_softmax(weak_logits, 1)
    with torch.no_grad():
        s, w = log_s.exp(), log_w.exp()
        s_t, w_t = s.gather(1, index), w.gather(1, index)
        p_t = s_t**2 + 1 - (s_t**2).mean()
        score = w / (1 - w_t + 1e-6) + s / (1 - s_t + 1e-6)
        rank = score.argsort(dim=1, descending=True).argsort(dim=1) + 1
        z = _without_target(1 / rank, target)
        z = z / z.sum(1, keepdim=True)
        smoothed = 0.9 * functional.one_hot(target, num_classes) + 0.1 / num_classes
    target_loss = -(p_t * log_s.gather(1, index)).mean()
    others = functional.log_softmax(_without_target(logits, target), 1)
    non_target_loss = -(z * others).sum(1).mean()
    weak_loss = -(smoothed * log_w).sum(1).mean()
    return target_loss + 0.1 * non_target_loss + 0.005 * weak_loss


def transcribed_zipf_ls(logits: Tensor, target: Tensor, votes: Tensor) -> Tensor:
    """Zipf's LS with ranks from a sort of all counts, [B, C]; equal counts share the smallest."""
    with torch.no_grad():
        counts = torch.zeros_like(logits).scatter_add(1, votes, torch.ones_like(votes).float())
        ordered, order = counts.sort(dim=1, descending=True)
        place = torch.arange(1, logits.shape[1] + 1).expand_as(order)
        first = torch.ones_like(ordered, dtype=torch.bool)
        first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        shared = torch.where(first, place, 0).cummax(1).values
        rank = torch.empty_like(order).scatter(1, order, shared)
        q = _without_target(1 / rank, target)
        q = q / q.sum(1, keepdim=True)
    others = functional.log_softmax(_without_target(logits, target), 1)
    return functional.kl_div(others, q, reduction="batchmean")


# What runs.


@dataclass(frozen=True)
class Case:
    """One loss with its inputs.

    Attributes:
        ours: The package's function.
        transcribed: The same from the transcription.
        arguments: Of both.
        inputs: Those of them that get a gradient.
    """

    ours: Function
    transcribed: Function
    arguments: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]


def _votes(target: Tensor, num_classes: int, num_votes: int) -> Tensor:
    """Half of a sample's positions vote for its class, the others for any; in mixed order."""
    votes = torch.randint(num_classes, (len(target), num_votes))
    votes[:, : num_votes // 2] = target[:, None]
    return votes.gather(1, torch.rand(votes.shape).argsort(1))


def cases(logits: Tensor, target: Tensor) -> dict[str, Case]:
    """The losses on one batch, all with the same logits."""
    num_classes = logits.shape[1]
    teacher_logits = 2 * torch.randn_like(logits)
    weak_logits = torch.randn_like(logits).requires_grad_()
    found = {
        "nkd": Case(nkd_loss, transcribed_nkd, (logits, teacher_logits, target), (logits,)),
        "uskd": Case(
            uskd_loss, transcribed_uskd, (logits, weak_logits, target), (logits, weak_logits)
        ),
    }
    for num_votes in (49, 196):
        arguments = (logits, target, _votes(target, num_classes, num_votes))
        found[f"zipf_ls_{num_votes}"] = Case(
            zipf_ls_loss, transcribed_zipf_ls, arguments, (logits,)
        )
    return found


def _run(function: Function, case: Case) -> Run:
    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*case.arguments), case.inputs)

    return run


def runs_of(logits: Tensor, target: Tensor) -> dict[str, Run]:
    """All that is measured at one size, by name: a base, or loss/provider."""
    plain = Case(functional.cross_entropy, functional.cross_entropy, (logits, target), (logits,))
    values = logits.detach()

    def sort() -> tuple[Tensor, ...]:
        torch.sort(values, dim=1)
        return ()  # its results are no gradients: they count as memory

    runs: dict[str, Run] = {"cross_entropy": _run(plain.ours, plain), "sort": sort}
    for name, case in cases(logits, target).items():
        compiled = cast("Function", torch.compile(case.ours, fullgraph=True, dynamic=False))
        runs[f"{name}/eager"] = _run(case.ours, case)
        runs[f"{name}/compiled"] = _run(compiled, case)
        runs[f"{name}/transcription"] = _run(case.transcribed, case)
        check_same(name, runs)
    return runs


def check_same(name: str, runs: Mapping[str, Run]) -> None:
    """Stop if the providers of a loss do not give the same gradients; it also compiles."""
    wanted = runs[f"{name}/eager"]()
    for provider in ("compiled", "transcription"):
        for gradient, other in zip(runs[f"{name}/{provider}"](), wanted, strict=True):
            gap = float((gradient - other).norm() / other.norm())
            if not gap <= 1e-3:
                raise RuntimeError(f"{name}, {provider}: the gradient differs by {gap:.2g}")


def extra_memory(run: Run) -> int:
    """Bytes at the peak of one call beyond what was live before, without what it returns."""
    run()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        returned = run()
    roots = profiler.profiler.kineto_results.experimental_event_tree()
    events = sorted(_allocations(roots), key=lambda event: event.start_time_ns)
    changes = [(event.extra_fields.ptr, event.extra_fields.alloc_size) for event in events]
    for tensor in returned:  # the last block at its address is the tensor itself
        block = tensor.untyped_storage().data_ptr()
        given = [i for i, (ptr, size) in enumerate(changes) if ptr == block and size > 0]
        if given:
            changes[given[-1]] = (block, 0)
    live = peak = 0
    for _, size in changes:
        live += size
        peak = max(peak, live)
    return peak


def _allocations(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        if event.tag == torch._C._profiler._EventType.Allocation:
            yield event
        yield from _allocations(event.children)


def check_memory_counter() -> None:
    """Stop unless two exponentials take what one can count on one's fingers: 3 x [B, C]."""
    values = torch.randn(256, 1000, requires_grad=True)

    def run() -> tuple[Tensor, ...]:
        # Both results live to the backward, where the first product joins them; the second
        # product is the gradient, which does not count.
        return torch.autograd.grad(values.exp().exp().sum(), values)

    found = extra_memory(run) / values.nbytes
    if not 2.99 < found < 3.01:
        raise RuntimeError(f"the allocator's events give {found:.3f} [B, C] in place of 3")


def measure(size: Size, rounds: int) -> dict[str, Any]:
    """Times and memory of everything at one size."""
    torch.manual_seed(0)
    torch.compiler.reset()
    rounds = max(3, round(size.rounds * rounds))
    target = torch.randint(size.num_classes, (size.batch_size,))
    logits = 2 * torch.randn(size.batch_size, size.num_classes)
    logits[torch.arange(size.batch_size), target] += 4
    runs = runs_of(logits.requires_grad_(), target)

    def repeated(run: Run) -> Callable[[], None]:
        def step() -> None:
            for _ in range(size.calls):
                run()

        return step

    seconds = interleaved(
        {name: repeated(run) for name, run in runs.items()}, rounds=rounds, warmup=2
    )

    def over(base: str) -> dict[str, dict[str, float]]:
        return {name: asdict(ratio(times, seconds[base])) for name, times in seconds.items()}

    one = [1e-3 * size.calls] * rounds
    return {
        "size": size.name,
        "batch_size": size.batch_size,
        "num_classes": size.num_classes,
        "rounds": rounds,
        "calls": size.calls,
        "milliseconds": {name: asdict(ratio(times, one)) for name, times in seconds.items()},
        "over_cross_entropy": over("cross_entropy"),
        "over_sort": over("sort"),
        "extra_memory": {name: extra_memory(run) / logits.nbytes for name, run in runs.items()},
    }


def votes_in_step(
    student: str, num_classes: int, image_size: int, batch_size: int, rounds: int
) -> dict[str, Any]:
    """Making the votes as a share of whole training steps with Zipf's LS, the time in each."""
    torch.manual_seed(0)
    shape = (3, image_size, image_size)
    model = build_model(student, num_classes=num_classes)
    distiller = Distiller(model, ZipfLSLoss(), method_weight=0.1, example_shape=shape)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-3, momentum=0.9)
    distiller.train()
    images = torch.randn(batch_size, *shape)
    target = torch.randint(num_classes, (batch_size,))
    provider = cast("Trainable", distiller.trainable).providers["votes"]
    started, ended = 0.0, 0.0
    given: tuple[Any, ...] = ()
    num_votes = 0

    def before(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        nonlocal started, given
        given, started = arguments, time.perf_counter()

    def after(module: nn.Module, arguments: tuple[Any, ...], votes: Tensor) -> None:
        nonlocal ended, num_votes
        ended, num_votes = time.perf_counter(), votes.shape[1]

    hooks = provider.register_forward_pre_hook(before), provider.register_forward_hook(after)
    of_step, of_votes = [], []
    for number in range(-2, rounds):
        begin = time.perf_counter()
        distiller(images, target).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if number >= 0:
            of_step.append(time.perf_counter() - begin)
            of_votes.append(ended - started)
    for hook in hooks:
        hook.remove()
    milliseconds = [1e-3] * rounds
    return {
        "student": student,
        "num_classes": num_classes,
        "image_size": image_size,
        "batch_size": batch_size,
        "votes": num_votes,
        "rounds": rounds,
        "step_milliseconds": asdict(ratio(of_step, milliseconds)),
        "votes_milliseconds": asdict(ratio(of_votes, milliseconds)),
        "share": asdict(ratio(of_votes, of_step)),
        "extra_megabytes": extra_memory(lambda: (provider(*given),)) / 1e6,
    }


def bounds(sizes: list[dict[str, Any]], steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What issue 3 bounds, beside what was measured."""
    (at,) = (part for part in sizes if part["size"] == BOUNDED_SIZE)
    found: list[dict[str, Any]] = []
    for name, base, limits in TIME_BOUNDS:
        for provider, limit in limits.items():
            value = at[f"over_{base}"][f"{name}/{provider}"]
            found.append(
                {"name": name, "provider": provider, "figure": f"time / {base}", "size": at["size"],
                 "at_most": limit, "measured": value["median"], "low": value["low"],
                 "high": value["high"]}
            )  # fmt: skip
    for name, limit in MEMORY_BOUNDS:
        found += [
            {"name": name, "provider": provider, "figure": "extra memory / [B, C] floats",
             "size": at["size"], "at_most": limit,
             "measured": at["extra_memory"][f"{name}/{provider}"]}
            for provider in ("eager", "compiled")
        ]  # fmt: skip
    found += [
        {"name": "votes", "provider": step["student"], "figure": "extra memory / MB",
         "size": f"{step['batch_size']}x{step['num_classes']}", "at_most": VOTES_MEGABYTES,
         "measured": step["extra_megabytes"]}
        for step in steps
    ]  # fmt: skip
    return [{**bound, "held": bound["measured"] <= bound["at_most"]} for bound in found]


def main() -> None:
    """Run all measurements and write one file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("results/losses.json"))
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help="at the small sizes; fewer at the large ones"
    )
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    rounds: int = options.rounds
    check_memory_counter()
    begin = time.perf_counter()

    def told(what: str) -> None:
        print(f"{time.perf_counter() - begin:4.0f} s  {what}", flush=True)

    sizes, steps = [], []
    for size in SIZES:
        sizes.append(measure(size, rounds))
        told(size.name)
    for student, num_classes, image_size, batch_size, share in (
        ("resnet18", 1000, 224, 32, 8),
        ("resnet8x4", 100, 32, 64, 2),
    ):
        steps.append(
            votes_in_step(student, num_classes, image_size, batch_size, max(3, rounds // share))
        )
        told(f"votes of {student}")
    held = bounds(sizes, steps)
    results = {
        "command": "make bench-losses",
        "environment": environment(resolve({"threads": THREADS}), torch.device("cpu"), 1).dump(),
        "rounds": {part["size"]: part["rounds"] for part in sizes},
        "memory": "torch.profiler, allocation events of the CPU allocator",
        "bounds": held,
        "sizes": sizes,
        "votes": steps,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for bound in held:
        print(
            f"{'held' if bound['held'] else 'NOT held':9} {bound['name']}, {bound['provider']}, "
            f"{bound['figure']}: {bound['measured']:.2f}, bound {bound['at_most']:g}"
        )
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
