"""A student that is too big for one device: its weights are sharded over the processes (FSDP2).

`torchrun --nproc_per_node 8 examples/fsdp.py` shards over eight GPUs, through accelerate.
`python examples/fsdp.py` starts two processes on the CPU, to see that it works.
"""

from __future__ import annotations

import os
import socket
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

from softlabels import Distiller, USKDLoss
from softlabels.data import open_source
from softlabels.models import build_model

BLOCK = "Block"  # class of the student's blocks: each is gathered for its forward, then let go
DECAY = 0.9


def build() -> Distiller:
    """The same start on every process; a teacher would be passed here, and never be sharded."""
    torch.manual_seed(0)
    student = build_model("vit_mini_patch4_32", num_classes=100, in_channels=1)
    method = USKDLoss(sync_batch_stats=True)
    return Distiller(student, method, example_shape=(1, 32, 32))


def plugin(block: str = BLOCK) -> FullyShardedDataParallelPlugin:
    """How accelerate shards."""
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[block],
        cpu_ram_efficient_loading=False,
    )


def sharded(
    distiller: Distiller, accelerator: Accelerator, lr: float, block: str = BLOCK
) -> tuple[Distiller, torch.optim.Optimizer]:
    """Shard all that is trained, with an optimizer over the shards.

    Blocks inside the student, then `trainable` around student and heads; not the student as a
    whole: its head is also called from outside of the student's forward, for votes.
    """
    if accelerator.is_fsdp2:
        optimizer = torch.optim.SGD(distiller.parameters(), lr, momentum=0.9)
        distiller.trainable, optimizer = accelerator.prepare(distiller.trainable, optimizer)
        return distiller, optimizer
    # On the CPU accelerate does not shard; torch does, by the function that accelerate calls.
    for module in distiller.student.modules():
        if type(module).__name__ == block:
            fully_shard(module)
    fully_shard(distiller.trainable)
    return distiller, torch.optim.SGD(distiller.parameters(), lr, momentum=0.9)


class Average:
    """Averaged weights (EMA): each process averages its shards.

    Sharded modules cannot be copied, which is what timm's and torch's averages begin with.
    """

    def __init__(self, distiller: Distiller, decay: float) -> None:
        self.decay = decay
        self.weights = {
            name: weight.detach().clone() for name, weight in distiller.state_dict().items()
        }

    def update(self, distiller: Distiller) -> None:
        """Take in the weights after an optimizer step."""
        for name, weight in distiller.state_dict().items():
            if weight.is_floating_point():
                self.weights[name].lerp_(weight.detach(), 1 - self.decay)
            else:
                self.weights[name].copy_(weight)

    def whole(self) -> dict[str, Tensor]:
        """Gathered weights by the distiller's names; called on every process."""
        return {
            name: weight.full_tensor() if isinstance(weight, DTensor) else weight
            for name, weight in self.weights.items()
        }


def whole_weights(distiller: Distiller) -> dict[str, Tensor]:
    """Gathered weights on the first process' CPU, {} on the others; called on every process."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(distiller.trainable, options=options)
    return {f"trainable.{name}": value for name, value in state.items()}


def work() -> None:
    """Train for some steps as one of several processes."""
    gpus = torch.cuda.is_available()
    accelerator = Accelerator(cpu=not gpus, fsdp_plugin=plugin() if gpus else None)
    distiller = build().to(accelerator.device)
    distiller, optimizer = sharded(distiller, accelerator, lr=0.01)
    average = Average(distiller, DECAY)
    own = sum(
        (p.to_local() if isinstance(p, DTensor) else p).numel() for p in distiller.parameters()
    )
    source = open_source("glyphs100")
    batches = source.train_batches(
        seed=0,
        epoch=0,
        batch_size=64,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        device=accelerator.device,
    )
    distiller.train()
    for step, batch in zip(range(8), batches, strict=False):
        output = distiller(batch.images, batch.target)
        accelerator.backward(output.loss)
        optimizer.step()
        optimizer.zero_grad()
        average.update(distiller)
        loss = accelerator.reduce(output.loss.detach(), "mean").item()
        accelerator.print(f"step {step + 1}: loss {loss:.3f}")

    # Evaluation: through `trainable`, which gathers what it needs; not through the student.
    distiller.eval()
    with torch.no_grad():
        logits = distiller.trainable(batch.images).logits
    accelerator.print(f"logits of {len(logits) * accelerator.num_processes} images in eval mode")

    weights = whole_weights(distiller)  # or average.whole()
    if accelerator.is_main_process:
        plain = build()
        plain.load_state_dict(weights)
        student = plain.export()  # an ordinary network again: save_weights(student, path)
        num_parameters = sum(p.numel() for p in student.parameters())
        print(f"{num_parameters:,} parameters exported, {own:,} trained by this process")
    accelerator.end_training()


def _one_of_two(rank: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    torch.set_num_threads(1)
    work()


def main() -> None:
    """Under torchrun: one process of those it started. Else: start two on the CPU."""
    if "RANK" in os.environ:
        work()
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(_one_of_two, args=(port,), nprocs=2)
    print("two processes trained one sharded student with one loss")


if __name__ == "__main__":
    main()
