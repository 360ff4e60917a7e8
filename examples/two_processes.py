"""Two processes on the CPU: wrap `distiller.trainable`, nothing else.

On real hardware, start it with torchrun in place of `spawn`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from softlabels import Distiller, ZipfLSLoss
from softlabels.models import build_model


def work(rank: int, meeting_point: str) -> None:
    """Train for three steps as one of two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=2)
    torch.manual_seed(0)
    student = build_model("vit_mini_patch4_32", num_classes=10, settings={"depth": 2})
    distiller = Distiller(student, ZipfLSLoss(), example_shape=(3, 32, 32))
    distiller.trainable = DistributedDataParallel(distiller.trainable)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    torch.manual_seed(rank)  # each process has its own data
    for _ in range(3):
        output = distiller(torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,)))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    dist.destroy_process_group()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        meeting_point = (Path(folder) / "meeting").as_uri()
        spawn(work, args=(meeting_point,), nprocs=2)
    print("two processes trained one student with one loss")


if __name__ == "__main__":
    main()
