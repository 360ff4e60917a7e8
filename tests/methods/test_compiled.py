"""Every method compiles to one graph, the trained module and the loss: slow."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from shared.method_runs import TINY_CNN, TINY_VIT, able, built, gradient_problems, noise, output_of
from softlabels import Distiller
from softlabels.losses import METHODS

pytestmark = pytest.mark.slow

SIZE = 6


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def stepped(distiller: Distiller, batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch, and the gradients by name."""
    torch.manual_seed(0)  # masks and negatives
    loss = output_of(distiller, batch).loss
    names = [f"trainable.{name}" for name, _ in distiller._core.named_parameters()]
    loss.backward()
    assert gradient_problems(distiller) == []
    parameters = distiller._core.parameters()
    return loss.detach(), {n: p.grad for n, p in zip(names, parameters, strict=True)}


@pytest.mark.parametrize("kind", METHODS)
def test_one_graph_gives_what_eager_code_gives(kind):
    family = TINY_CNN if able(kind, TINY_CNN) else TINY_VIT
    batch = noise(family, SIZE)
    eager, compiled = (built(kind, family, num_samples=SIZE) for _ in range(2))
    one_graph = {"backend": "aot_eager", "fullgraph": True}
    compiled.trainable = torch.compile(compiled.trainable, **one_graph)
    compiled.__dict__["method"] = torch.compile(compiled.method, **one_graph)

    expected, expected_gradients = stepped(eager, batch)
    loss, gradients = stepped(compiled, batch)

    torch.testing.assert_close(loss, expected)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(
            gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
