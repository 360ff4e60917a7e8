"""Every method takes steps on an accelerator: a CPU's values, no waits, half precision."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from timm.layers import DropPath
from torch import nn

from shared.method_runs import (
    TINY_CNN,
    TINY_NHWC,
    TINY_VIT,
    Family,
    built,
    gradient_problems,
    noise,
    output_of,
    pair_name,
    pairs,
)
from softlabels import Distiller
from softlabels.data import Batch

pytestmark = pytest.mark.gpu

SIZE = 6
FAMILIES = (TINY_CNN, TINY_VIT, TINY_NHWC)
# They draw masks or samples, and devices draw other numbers.
DRAW = ("mgd", "vitkd", "crd")

every_method = pytest.mark.parametrize(("kind", "family"), pairs(*FAMILIES), ids=pair_name)


@pytest.fixture(autouse=True)
def exact_products():
    """Products of matrices in float32, not in TF32."""
    of_cudnn = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = of_cudnn


def on(device: torch.device, batch: Batch) -> Batch:
    return dataclasses.replace(
        batch,
        images=batch.images.to(device),
        target=batch.target.to(device),
        index=batch.index.to(device),
        extras={name: value.to(device) for name, value in batch.extras.items()},
    )


def without_drawn_paths(distiller: Distiller) -> Distiller:
    """Devices draw other numbers, so nothing in a network may be drawn."""
    for module in distiller.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    return distiller


def moved(distiller: Distiller, device: torch.device) -> Distiller:
    moved: nn.Module = distiller.to(device)
    assert isinstance(moved, Distiller)
    return moved


@every_method
def test_a_step_gives_a_cpus_values_and_never_waits(kind, family: Family, device, no_waits):
    batches = [noise(family, SIZE, number) for number in range(2)]
    here, there = (without_drawn_paths(built(kind, family, num_samples=2 * SIZE)) for _ in range(2))
    there = moved(there, device)
    steps = torch.optim.SGD(there.parameters(), 0.01)
    losses = []
    for batch in batches:
        torch.manual_seed(0)
        expected = output_of(here, batch).loss
        on_device = on(device, batch)
        torch.manual_seed(0)
        with no_waits():
            loss = output_of(there, on_device).loss
            loss.backward()
            steps.step()
            steps.zero_grad(set_to_none=True)
            there.after_step()
        losses.append((loss, expected))
        if len(losses) == 1:
            expected.backward()
            torch.optim.SGD(here.parameters(), 0.01).step()
            here.zero_grad(set_to_none=True)
            here.after_step()

    for loss, expected in losses:
        assert loss.device == device
        assert bool(loss.isfinite())
        if kind not in DRAW:
            torch.testing.assert_close(loss.cpu(), expected, rtol=1e-3, atol=1e-3)


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_a_step_in_half_precision_is_finite_and_its_loss_float32(kind, family, dtype, device):
    distiller = moved(built(kind, family, num_samples=SIZE), device)
    with torch.autocast("cuda", dtype=dtype):
        loss = output_of(distiller, on(device, noise(family, SIZE))).loss
    loss.backward()

    assert loss.dtype == torch.float32
    assert bool(loss.isfinite())
    assert gradient_problems(distiller) == []
