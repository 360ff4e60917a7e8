"""Losses on an accelerator: what a CPU gives, without waiting for the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shared.loss_cases import CASES_AND_INDICES, CASES_AND_KINDS, PLAIN_CASES, case_id, gradients
from softlabels.losses import check_values, nkd_loss

pytestmark = pytest.mark.gpu


def moved(inputs: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def test_the_check_for_waits_sees_one(device, no_waits):
    """So that passing it means something."""
    value = torch.ones((), device=device)
    with no_waits(), pytest.raises(RuntimeError, match="synchroniz"):
        value.item()


@pytest.mark.parametrize(("case", "kind"), CASES_AND_KINDS, ids=case_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_value_and_gradients_are_those_of_a_cpu(case, kind, dtype, device, no_waits):
    inputs = case.make(kind, batch_size=33, num_classes=50, dtype=dtype)
    expected, of_cpu = gradients(case, inputs)
    there = moved(inputs, device)

    with no_waits():
        loss, found = gradients(case, there)

    assert loss.device == device
    assert loss.dtype == expected.dtype
    assert loss.isfinite().all()
    if not case.random:  # devices draw other numbers
        torch.testing.assert_close(loss.cpu(), expected)
        for name, gradient in of_cpu.items():
            torch.testing.assert_close(found[name].cpu(), gradient)


@pytest.mark.parametrize(("case", "kind"), CASES_AND_INDICES, ids=case_id)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_is_computed_in_float32_under_autocast(case, kind, dtype, device):
    half = moved(case.make(kind, batch_size=33, num_classes=50, dtype=dtype), device)
    wide = {name: t.float() if t.dtype == dtype else t for name, t in half.items()}
    expected, of_wide = gradients(case, wide)

    with torch.autocast("cuda", dtype=dtype):
        loss, found = gradients(case, half)

    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    for name, gradient in of_wide.items():
        torch.testing.assert_close(found[name], gradient.to(dtype))


@pytest.mark.parametrize("case", PLAIN_CASES, ids=case_id)
def test_one_compiled_graph_gives_what_eager_code_gives(case, device):
    torch._dynamo.reset()
    inputs = moved(case.make(case.target_kinds[0], batch_size=64, num_classes=100), device)
    expected, of_eager = gradients(case, inputs)
    leaves = {
        name: tensor.clone().requires_grad_() if name in case.trained else tensor
        for name, tensor in inputs.items()
    }

    loss = torch.compile(case, fullgraph=True)(leaves)
    loss.backward()

    torch.testing.assert_close(loss, expected)
    for name, gradient in of_eager.items():
        torch.testing.assert_close(leaves[name].grad, gradient)


@pytest.mark.parametrize("case", PLAIN_CASES, ids=case_id)
def test_a_captured_cuda_graph_replays_the_loss(case, device):
    """Capturing refuses whatever waits, allocates on the host or depends on values."""
    kind = case.target_kinds[0]
    first, second = (
        moved(case.make(kind, batch_size=64, num_classes=100, seed=seed), device) for seed in (0, 1)
    )
    held = {
        name: tensor.clone().requires_grad_(name in case.trained) for name, tensor in first.items()
    }
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            case(held).backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = case(held)

    with torch.no_grad():
        for name, tensor in second.items():
            held[name].copy_(tensor)
    graph.replay()

    torch.testing.assert_close(loss.detach(), case(second).detach())


def test_labels_beyond_the_classes_are_found_where_values_are_checked(device):
    """On an accelerator only on demand, since it waits for the device."""
    logits = torch.randn(2, 3, device=device)
    target = torch.tensor([0, 7], device=device)
    check_values(True)
    try:
        with pytest.raises(ValueError, match="7"):
            nkd_loss(logits, logits, target)
    finally:
        check_values(False)
