from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from softlabels.data import Batch, DataInfo
from softlabels.training.evaluate import evaluate

INFO = DataInfo(
    "numbers", ("a", "b", "c", "d", "e", "f"), 1, (1, 1), (0.0,), (1.0,), (0, 0, 0, 1, 1, 1)
)


class Table(nn.Module):
    """Gives the logits that stand in a table, by the image's only pixel."""

    def __init__(self, rows):
        super().__init__()
        self.rows = torch.tensor(rows)

    def forward(self, images):
        return self.rows[images.flatten().long()]


def batches(targets, size):
    target = torch.tensor(targets)
    index = torch.arange(len(targets))
    images = index.float().view(-1, 1, 1, 1)
    for part in index.split(size):
        yield Batch(images[part], target[part], part)


def test_metrics_equal_a_computation_by_hand():
    # Probabilities p on one class, the rest spread evenly over the five others.
    def row(label, p):
        return [math.log(p if c == label else (1 - p) / 5) for c in range(6)]

    predicted = [(0, 0.9), (1, 0.9), (3, 0.7), (5, 0.7)]
    targets = [0, 2, 3, 0]
    network = Table([row(*entry) for entry in predicted])
    metrics = evaluate(network, batches(targets, 3), INFO, torch.device("cpu"))

    assert metrics["top1"] == pytest.approx(50)
    assert metrics["group_top1"] == pytest.approx(75)  # sample 1 errs within its group
    nll = -(math.log(0.9) + math.log(0.1 / 5) + math.log(0.7) + math.log(0.3 / 5)) / 4
    assert metrics["nll"] == pytest.approx(nll, rel=1e-5)
    # Two bins in use, half of the samples each, each with accuracy 1/2.
    assert metrics["ece"] == pytest.approx(
        100 * (abs(0.9 - 0.5) / 2 + abs(0.7 - 0.5) / 2), rel=1e-4
    )


def test_top5_counts_the_five_largest():
    ascending = [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]] * 2
    metrics = evaluate(Table(ascending), batches([0, 1], 2), INFO, torch.device("cpu"))
    assert metrics["top5"] == pytest.approx(50)


def test_without_groups_there_is_no_group_accuracy():
    info = DataInfo("two", ("a", "b"), 1, (1, 1), (0.0,), (1.0,))
    metrics = evaluate(Table([[0.0, 1.0]]), batches([1], 1), info, torch.device("cpu"))
    assert set(metrics) == {"top1", "top5", "nll", "ece"}
    assert metrics["top1"] == 100


def test_network_is_in_eval_mode_meanwhile_and_put_back():
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(1, 6))
    seen = []
    network[1].register_forward_hook(lambda module, *_: seen.append(module.training))
    network.train()
    evaluate(network, batches([0, 1], 1), INFO, torch.device("cpu"))
    assert seen == [False, False]
    assert network.training


def test_no_images_is_an_error():
    with pytest.raises(ValueError, match="holds no images"):
        evaluate(Table([[0.0] * 6]), iter(()), INFO, torch.device("cpu"))
