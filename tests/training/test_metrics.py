from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from softlabels.data import Batch, DataInfo
from softlabels.training.metrics import evaluate

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
    assert set(metrics) == {"top1", "top5", "nll", "ece", "zipf_r2", "zipf_exponent"}
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


def measured(logits, *, size=3):
    num_images, num_classes = len(logits), len(logits[0])
    info = DataInfo("numbers", tuple(map(str, range(num_classes))), 1, (1, 1), (0.0,), (1.0,))
    targets = [0] * num_images
    return evaluate(Table(logits), batches(targets, size), info, torch.device("cpu"))


@pytest.mark.parametrize("num_classes", [3, 20, 150])
def test_a_power_law_is_found_with_its_exponent(num_classes):
    law = -1.3 * np.log(np.arange(1, num_classes + 1))
    generator = np.random.default_rng(0)
    metrics = measured([generator.permutation(law).astype(np.float32).tolist() for _ in range(4)])
    assert metrics["zipf_r2"] == pytest.approx(1, abs=1e-9)
    assert metrics["zipf_exponent"] == pytest.approx(1.3, rel=1e-5)


@pytest.mark.parametrize("num_classes", [7, 32, 120])
def test_the_line_is_that_of_least_squares_through_the_first_32_ranks(num_classes):
    logits = np.random.default_rng(1).normal(size=(11, num_classes)) * 2
    metrics = measured(logits.astype(np.float32).tolist())
    exponentials = np.exp(logits)
    softmax = exponentials / exponentials.sum(1, keepdims=True)
    mean = np.sort(softmax, axis=1)[:, ::-1].mean(0)[:32]
    x, y = np.log(np.arange(1, len(mean) + 1)), np.log(mean)
    slope, _ = np.polyfit(x, y, 1)
    assert metrics["zipf_exponent"] == pytest.approx(-slope, rel=1e-4)
    assert metrics["zipf_r2"] == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2, rel=1e-4)
    assert metrics["zipf_r2"] < 0.999


def test_zipf_of_what_is_no_curve():
    uniform = measured([[0.5] * 40])
    assert (uniform["zipf_r2"], uniform["zipf_exponent"]) == (1, pytest.approx(0, abs=1e-9))
    assert measured([[3.0, 1.0]])["zipf_r2"] == pytest.approx(1)  # a line through two points
    assert measured([[3.0, 1.0]])["zipf_exponent"] == pytest.approx(2 / math.log(2), rel=1e-5)


def test_zipf_of_probabilities_that_are_zero_is_finite():
    metrics = measured([[0.0, -2000.0, -2000.0, -2000.0]])
    tiny = math.log(np.finfo(np.float32).tiny)
    slope, _ = np.polyfit(np.log([1, 2, 3, 4]), [0, tiny, tiny, tiny], 1)
    assert metrics["zipf_exponent"] == pytest.approx(-slope)
    assert 0 < metrics["zipf_r2"] < 1


def test_zipf_of_answers_that_are_not_finite_is_not_either():
    metrics = measured([[0.0, 1.0, 2.0, 3.0], [math.nan] * 4])
    assert math.isnan(metrics["zipf_r2"])
    assert math.isnan(metrics["zipf_exponent"])


def test_zipf_does_not_depend_on_the_batches():
    logits = torch.randn(13, 9, generator=torch.Generator().manual_seed(0)).tolist()
    one, other = measured(logits, size=13), measured(logits, size=2)
    for name in ("zipf_r2", "zipf_exponent"):
        assert one[name] == pytest.approx(other[name], rel=1e-12)
