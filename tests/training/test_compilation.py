"""The method's part of a step as compiled code: where by default, and what if it cannot be.

No accelerator is needed: the settings are asked about devices that are not there, and runs on the
CPU compile with backends that make no code, or none at all.
"""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

import softlabels
from shared.patterns import FAST
from softlabels.losses import KDLoss, NKDLoss
from softlabels.training import compilation
from softlabels.training.compilation import compiled_method, compiles_method
from softlabels.training.config import resolve

LOGITS = torch.tensor([[2.0, 1.0, 0.5], [0.0, -1.0, 1.0]])
TARGET = torch.tensor([0, 2])
RUN = {**FAST, "method": "uskd", "epochs": 1}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch) -> list[int]:
    """A compiler that runs each graph as it is, and the sizes of the graphs that it was given."""
    found: list[int] = []

    def backend(graph, inputs):
        found.append(len(graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(compilation.torch, "compile", partial(torch.compile, backend=backend))
    return found


def broken(graph, inputs):
    raise RuntimeError("no compiler here\nand more of the kind")


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(compilation.torch, "compile", partial(torch.compile, backend=broken))


@pytest.mark.parametrize(
    ("setting", "on"), [("auto", {"cuda", "xpu"}), (True, {"cpu", "cuda", "xpu"}), (False, set())]
)
def test_the_method_is_compiled_where_launches_cost(setting, on):
    config = resolve({"compile": setting})

    assert {d for d in ("cpu", "cuda", "xpu") if compiles_method(config, torch.device(d))} == on


def test_a_compiled_method_is_one_graph_with_the_same_loss(graphs):
    method = NKDLoss(temperature=2.0)
    leaf = LOGITS.clone().requires_grad_()
    expected = method(leaf, LOGITS.flip(1), TARGET)
    said: list[str] = []

    with compiled_method(method, said.append):
        found = method(leaf, LOGITS.flip(1), TARGET)
        again = method(leaf, LOGITS.flip(1), TARGET)

    assert len(graphs) == 1
    assert said == []
    for loss in (found, again):
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            torch.autograd.grad(loss, leaf), torch.autograd.grad(expected, leaf, retain_graph=True)
        )


def test_without_a_compiler_one_line_says_so_and_the_loss_is_the_same(no_compiler):
    method = KDLoss()
    expected = method(LOGITS, LOGITS.flip(1))
    said: list[str] = []

    with compiled_method(method, said.append):
        losses = [method(LOGITS, LOGITS.flip(1)) for _ in range(3)]

    assert len(said) == 1
    assert "\n" not in said[0]
    assert "no compiler here" in said[0]
    assert losses == [expected] * 3


def test_a_platform_without_torch_compile_is_told(monkeypatch):
    def refused(*args):
        raise RuntimeError("not supported on this platform")

    monkeypatch.setattr(compilation.torch, "compile", refused)
    said: list[str] = []
    with compiled_method(KDLoss(), said.append):
        pass

    assert said == ["the method is not compiled, and runs as it is: not supported on this platform"]


def test_errors_of_the_method_are_its_own(graphs):
    said: list[str] = []
    with (
        compiled_method(method := NKDLoss(), said.append),
        pytest.raises(ValueError, match="must hold 2 labels, got 1"),
    ):
        method(LOGITS, LOGITS, TARGET[:1])

    assert said == []


def test_afterwards_the_method_is_as_it_was(graphs):
    method = KDLoss()
    with compiled_method(method, print):
        method(LOGITS, LOGITS)
        for other in (copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
            other(LOGITS, LOGITS)
    before = len(graphs)
    torch._dynamo.reset()

    method(LOGITS, LOGITS)

    assert len(graphs) == before == 1


def test_a_run_compiles_its_method_where_the_device_is_an_accelerator(
    source, tmp_path, monkeypatch, graphs
):
    plain = softlabels.train(source, output=tmp_path / "plain", **RUN)
    assert graphs == []

    monkeypatch.setattr(
        "softlabels.training.trainer.compiles_method",
        lambda config, device: compiles_method(config, torch.device("cuda")),
    )
    compiled = softlabels.train(source, output=tmp_path / "compiled", **RUN)

    assert len(graphs) >= 1
    assert compiled.final["nll"] == pytest.approx(plain.final["nll"], rel=1e-4)


def test_a_run_goes_on_without_a_compiler(source, tmp_path, monkeypatch, no_compiler, capsys):
    monkeypatch.setattr("softlabels.training.trainer.compiles_method", lambda config, device: True)

    softlabels.train(source, output=tmp_path / "run", **{**RUN, "progress": True})

    assert capsys.readouterr().err.count("the method is not compiled") == 1


def test_no_method_is_no_work(graphs):
    with compiled_method(None, print):
        nn.Linear(2, 2)

    assert graphs == []
