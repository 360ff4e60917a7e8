"""The look at a finished run's network, against computations of its own."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import softlabels
from softlabels.analysis.analyze import Analyzed, analyze
from softlabels.cli import main
from softlabels.data import Batch, DataInfo
from softlabels.data.randomness import permutation
from softlabels.distill.teacher import Teacher, Teachers
from softlabels.experiments.analyze_run import analyze_run
from softlabels.training.metrics import evaluate

CPU = torch.device("cpu")
FILES = ("analysis.json", "predictions.npz")
OF_A_RUN = {
    "student": "timm:resnet8_glyphs",
    "epochs": 2,
    "batch_size": 32,
    "optimizer": {"lr": 0.1},
    "gallery": 0,
    "report": False,
    "progress": False,
    "device": "cpu",
    "threads": 1,
}


class Table(nn.Module):
    """Gives the logits that stand in a table, by the image's only pixel."""

    def __init__(self, rows):
        super().__init__()
        self.rows = torch.as_tensor(rows, dtype=torch.float32)

    def forward(self, images):
        return self.rows[images.flatten().long()]


class Numbers:
    """A test set of one-pixel images that hold their own index."""

    def __init__(self, targets, num_classes, groups=None, order=None):
        names = tuple(f"class {label}" for label in range(num_classes))
        self.info = DataInfo("numbers", names, 1, (1, 1), (0.0,), (1.0,), groups)
        self.target = torch.as_tensor(targets)
        self.num_test = len(self.target)
        self.order = torch.arange(self.num_test) if order is None else torch.as_tensor(order)

    def test_batches(self, *, batch_size, rank=0, world_size=1, device):
        for index in self.order[rank::world_size].split(batch_size):
            yield Batch(index.float().view(-1, 1, 1, 1), self.target[index], index)


def look(rows, source: Numbers, **options) -> Analyzed:
    network = rows if isinstance(rows, nn.Module) else Table(rows)
    return analyze(network, source, batch_size=7, device=CPU, **options)


def softmax(logits, temperature=1.0):
    powers = np.exp((logits - logits.max(1, keepdims=True)) / temperature)
    return powers / powers.sum(1, keepdims=True)


def nll_of(logits, target, temperature):
    return -np.log(softmax(logits, temperature)[np.arange(len(target)), target])


def ece_of(probabilities, target):
    confidence, right = probabilities.max(1), probabilities.argmax(1) == target
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [abs((right[bins == b] - confidence[bins == b]).sum()) for b in range(15)]
    return 100 * sum(gaps) / len(target)


def sampled(num_images, num_classes, temperature, seed=0):
    """Logits, and targets drawn from their softmax at a temperature."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(num_images, num_classes)).astype(np.float32) * 4
    shares = softmax(logits.astype(np.float64), temperature)
    target = [generator.choice(num_classes, p=share) for share in shares]
    return logits, np.array(target)


# The numbers


def test_temperature_is_fitted_on_each_half_and_measured_on_the_other():
    logits, target = sampled(600, 8, temperature=2.5)
    found = look(logits, Numbers(target, 8)).content["temperature"]

    wide, order = logits.astype(np.float64), permutation(0, 0, 600).numpy()
    halves, fitted = [order[::2], order[1::2]], []
    for half in halves:
        best, width = 0.0, 3.0
        for _ in range(5):  # ever finer grids
            grid = best + width * np.linspace(-1, 1, 101)
            losses = [nll_of(wide[half], target[half], math.exp(t)).mean() for t in grid]
            best, width = grid[int(np.argmin(losses))], width / 20
        fitted.append(math.exp(best))
    nll, probabilities = np.empty(600), np.empty((600, 8))
    for half, temperature in zip(halves, fitted[::-1], strict=True):
        nll[half] = nll_of(wide[half], target[half], temperature)
        probabilities[half] = softmax(wide[half], temperature)
    assert found.keys() == {"value", "nll", "ece"}
    assert found["value"] == pytest.approx(np.mean(fitted), rel=1e-4)
    assert found["value"] == pytest.approx(2.5, rel=0.1)
    assert found["nll"] == pytest.approx(nll.mean(), rel=1e-6)
    assert found["ece"] == pytest.approx(ece_of(probabilities, target), rel=1e-3)


def test_a_temperature_repairs_what_is_too_sure_of_itself():
    logits, target = sampled(800, 5, temperature=4.0, seed=3)
    source = Numbers(target, 5)
    before = evaluate(
        Table(logits), source.test_batches(batch_size=9, device=CPU), source.info, CPU
    )
    after = look(logits, source).content["temperature"]
    assert after["nll"] < before["nll"] - 0.3
    assert after["ece"] < before["ece"] / 2


def test_both_halves_have_all_classes_where_classes_take_turns():
    # Only images of class 1 are judged wrongly: a half without them would go to the lowest end.
    target = np.arange(200) % 2
    logits = np.stack([np.full(200, 3.0), np.zeros(200)], 1)
    found = look(logits, Numbers(target, 2)).content["temperature"]
    assert found["nll"] == pytest.approx(math.log(2), rel=0.02)


def test_of_a_large_test_set_a_fixed_part_is_held_for_the_temperature():
    logits, target = sampled(90, 4, temperature=2.0)
    source = Numbers(target, 4)
    whole, part = (look(logits, source, memory=m).content for m in (90 * 16, 50 * 16))
    assert "fitted_on" not in whole["temperature"]
    assert part["temperature"]["fitted_on"] == 50
    chosen = permutation(0, 0, 90)[:50].sort().values.numpy()
    alone = look(logits[chosen], Numbers(target[chosen], 4)).content["temperature"]
    assert part["temperature"] == {**alone, "fitted_on": 50}
    assert {**part, "temperature": None} == {**whole, "temperature": None}


def test_bins_of_the_confidence_add_up_to_the_error_of_calibration():
    logits, target = sampled(300, 6, temperature=2.0)
    source = Numbers(target, 6)
    bins = look(logits, source).content["reliability"]
    metrics = evaluate(
        Table(logits), source.test_batches(batch_size=50, device=CPU), source.info, CPU
    )

    assert sum(bins["count"]) == 300
    assert len(bins["count"]) == len(bins["accuracy"]) == len(bins["confidence"]) == 15
    filled = [row for row in zip(*bins.values(), strict=True) if row[2]]
    error = sum(abs(confidence - accuracy) * count for confidence, accuracy, count in filled) / 300
    assert 100 * error == pytest.approx(metrics["ece"], rel=1e-5)
    for place, (confidence, accuracy, count) in enumerate(zip(*bins.values(), strict=True)):
        if count:
            assert place / 15 <= confidence <= (place + 1) / 15
        else:
            assert confidence is None
            assert accuracy is None


def test_a_confidence_of_one_is_in_the_last_bin():
    bins = look([[100.0, 0.0], [0.0, 100.0]], Numbers([0, 0], 2)).content["reliability"]
    assert bins["count"] == [0] * 14 + [2]
    assert (bins["confidence"][14], bins["accuracy"][14]) == (1.0, 0.5)


def test_accuracy_of_classes_and_confusions_by_hand():
    targets = [0, 0, 0, 0, 1, 1, 2, 2, 2, 2]
    predicted = [0, 1, 1, 2, 1, 0, 1, 1, 1, 2]
    source = Numbers(targets, 4)
    content = look(np.eye(4)[predicted] * 5, source).content
    assert content["images"] == 10
    assert content["class_names"] == ["class 0", "class 1", "class 2", "class 3"]
    assert content["groups"] is None
    assert content["per_class"] == [25, 50, 25, None]
    assert content["confusion"] == [[2, 1, 3], [0, 1, 2], [0, 2, 1], [1, 0, 1]]


def test_zipf_is_that_of_the_evaluation_and_has_the_curve():
    logits, target = sampled(40, 120, temperature=1.0)
    source = Numbers(target, 120)
    zipf = look(logits, source).content["zipf"]
    metrics = evaluate(
        Table(logits), source.test_batches(batch_size=7, device=CPU), source.info, CPU
    )
    assert zipf["r2"] == metrics["zipf_r2"]
    assert zipf["exponent"] == metrics["zipf_exponent"]
    assert zipf["ranks"] == [1, 32]
    ranked = -np.sort(-softmax(logits.astype(np.float64)), axis=1)
    np.testing.assert_allclose(zipf["mean_sorted_softmax"], ranked.mean(0)[:100], rtol=1e-5)
    assert look(logits[:, :9], Numbers([0] * 40, 9)).content["zipf"]["ranks"] == [1, 9]


def test_predictions_are_in_the_order_of_the_test_set_whatever_comes_first():
    logits, target = sampled(30, 5, temperature=1.0)
    straight = look(logits, Numbers(target, 5))
    mixed = look(logits, Numbers(target, 5, order=permutation(3, 0, 30)))
    assert {**mixed.content, "zipf": None} == {**straight.content, "zipf": None}
    assert mixed.content["zipf"]["r2"] == pytest.approx(straight.content["zipf"]["r2"], rel=1e-12)
    arrays = mixed.predictions
    assert arrays.keys() == {"index", "target", "predicted", "confidence"}
    assert {name: array.dtype.name for name, array in arrays.items()} == {
        "index": "int64", "target": "int32", "predicted": "int32", "confidence": "float32",
    }  # fmt: skip
    np.testing.assert_array_equal(arrays["index"], np.arange(30))
    np.testing.assert_array_equal(arrays["target"], target)
    np.testing.assert_array_equal(arrays["predicted"], logits.argmax(1))
    np.testing.assert_allclose(arrays["confidence"], softmax(logits).max(1), rtol=1e-5)
    for name, array in straight.predictions.items():
        np.testing.assert_array_equal(array, arrays[name])


# The teacher


def test_agreement_with_a_teacher_by_hand():
    network = np.eye(3)[[0, 1, 2, 0]]
    teacher = Teacher(Table(np.eye(3)[[0, 2, 2, 1]]))
    found = look(network, Numbers([0, 1, 1, 1], 3), teacher=teacher, teacher_name="wise")
    assert found.content["teacher"] == {"name": "wise", "top1": 50, "agreement": 50}
    np.testing.assert_array_equal(found.predictions["teacher_predicted"], [0, 2, 2, 1])
    assert found.predictions["teacher_predicted"].dtype == np.int32


def test_several_teachers_answer_together():
    first, second = [[5.0, 0.0, 4.0]], [[0.0, 5.0, 4.0]]
    found = look(
        [[0.0, 0.0, 9.0]], Numbers([2], 3), teacher=Teachers([Table(first), Table(second)])
    )
    assert found.content["teacher"]["agreement"] == 0  # the mean of the predictions: class 0 or 1
    assert found.predictions["teacher_predicted"].tolist() in ([0], [1])


@pytest.mark.parametrize(
    "teacher",
    [
        Teacher(Table(np.eye(5))),
        Teachers([Table(np.eye(3)), Table(np.eye(5))]),
    ],
    ids=["one", "one of two"],
)
def test_a_teacher_of_other_classes_is_not_asked(teacher):
    found = look(np.eye(3), Numbers([0, 1, 2], 3), teacher=teacher)
    assert found.content["teacher"] is None
    assert "teacher_predicted" not in found.predictions


def test_networks_are_in_eval_mode_meanwhile_and_put_back():
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(1, 3))
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(1, 3))
    teacher = Teacher(model, mode="train")
    seen = []
    for part in (network, model):
        part[1].register_forward_hook(lambda module, *_: seen.append(module.training))
    network.train()
    look(network, Numbers([0, 1, 2], 3), teacher=teacher)
    assert seen
    assert not any(seen)
    assert network.training
    assert model.training
    assert not network[2]._forward_pre_hooks


# The features


class Wide(nn.Module):
    """A linear classifier of the vectors that stand in a table."""

    def __init__(self, vectors, num_classes):
        super().__init__()
        self.vectors = torch.as_tensor(vectors, dtype=torch.float32)
        self.head = nn.Linear(self.vectors.shape[1], num_classes)

    def forward(self, images):
        # The dry run shows noise.
        return self.head(self.vectors[images.flatten().long().clamp(0, len(self.vectors) - 1)])


def picture(vectors, targets, num_classes, groups=None):
    source = Numbers(targets, num_classes, groups)
    return look(Wide(vectors, num_classes), source).content["features"]


def test_features_are_principal_components_with_a_fixed_sign():
    vectors = np.random.default_rng(0).normal(size=(30, 4)) * [5, 3, 1, 0.5] + 7
    vectors = vectors.astype(np.float32)
    found = picture(vectors, np.arange(30) % 3, 3)

    centered = vectors.astype(np.float64) - vectors.astype(np.float64).mean(0)
    values, axes = np.linalg.eigh(centered.T @ centered)
    for number, name in ((1, "x"), (2, "y")):
        axis = axes[:, -number]
        axis = axis * np.sign(axis[np.abs(axis).argmax()])
        np.testing.assert_allclose(found[name], centered @ axis, atol=1e-9)
    np.testing.assert_allclose(found["explained"], values[[-1, -2]] / values.sum(), rtol=1e-9)
    assert found["class"] == (np.arange(30) % 3).tolist()
    assert "classifier" in found["what"]


def test_features_are_of_the_first_two_groups_or_of_ten_classes():
    vectors = np.random.default_rng(0).normal(size=(72, 3))
    groups = (2, 0, 1, 0) + (2,) * 8
    assert {*picture(vectors, np.arange(72) % 12, 12, groups)["class"]} == {1, 2, 3}
    assert {*picture(vectors, np.arange(72) % 12, 12)["class"]} == {*range(10)}


def test_features_are_of_each_class_first_images_at_most_400_in_all():
    # A test set that is sorted by class, as folders of images are.
    targets = np.repeat(np.arange(4), 150)
    vectors = np.random.default_rng(0).normal(size=(600, 3)).astype(np.float32)
    found = picture(vectors, targets, 4)
    assert found["class"] == np.repeat(np.arange(4), 100).tolist()
    kept = vectors[np.concatenate([np.arange(100) + 150 * label for label in range(4)])]
    spread = np.square(kept.astype(np.float64) - kept.mean(0)).sum()
    along = np.square(found["x"]).sum(), np.square(found["y"]).sum()
    np.testing.assert_allclose(found["explained"], np.array(along) / spread, rtol=1e-5)


@pytest.mark.parametrize("width", [1, 2])
def test_features_of_few_numbers_have_a_plane_too(width):
    found = picture(np.arange(4 * width).reshape(4, width), [0, 1, 0, 1], 2)
    assert found["explained"] == pytest.approx([1, 0])
    assert found["y"] == pytest.approx([0] * 4, abs=1e-9)


@pytest.mark.parametrize(
    "vectors",
    [np.ones((4, 3)), np.array([[1.0, 2.0], [3.0, np.inf], [0.0, 1.0], [2.0, 2.0]])],
    ids=["equal", "infinite"],
)
def test_features_without_a_plane_are_left_out(vectors):
    assert picture(vectors, [0, 1, 0, 1], 2) is None


def test_a_network_without_a_linear_classifier_has_no_features():
    network = nn.Sequential(nn.Conv2d(1, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = look(network, Numbers([0, 1, 2], 3))
    assert found.content["features"] is None
    assert found.content["images"] == 3


# What is hard


@pytest.mark.parametrize(
    ("rows", "targets"),
    [
        ([[1.0, 0.0]], [1]),
        ([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]], [0, 1, 1]),
        (np.full((6, 2), np.nan), [0, 1, 0, 1, 0, 1]),
        ([[np.inf, 0.0, 1.0]] + [[1.0, 2.0, 3.0]] * 5, [0] * 6),
        (np.zeros((6, 3)), [0, 1, 2, 0, 1, 2]),
        (np.eye(3)[[0, 1, 2] * 4] * 3e4, [0, 1, 2] * 4),
    ],
    ids=["one image", "two classes", "NaN", "infinite", "equal", "certain"],
)
def test_hard_answers_give_json_that_others_read(rows, targets):
    source = Numbers(targets, len(rows[0]))
    found = look(rows, source)
    content = json.loads(json.dumps(found.content, allow_nan=False))
    finite = bool(np.isfinite(rows).all())
    assert content["images"] == len(targets)
    assert (content["temperature"] is not None) == (finite and len(targets) >= 4)
    assert (content["zipf"]["r2"] is not None) == finite
    with np.errstate(invalid="ignore"):
        num_in_bins = int(np.isfinite(softmax(np.asarray(rows, np.float32)).max(1)).sum())
    assert sum(content["reliability"]["count"]) == num_in_bins
    metrics = evaluate(Table(rows), source.test_batches(batch_size=3, device=CPU), source.info, CPU)
    right = found.predictions["predicted"] == found.predictions["target"]
    assert 100 * right.mean() == pytest.approx(metrics["top1"], rel=1e-5)


def test_no_images_is_an_error():
    with pytest.raises(ValueError, match="holds no images"):
        look([[0.0, 1.0]], Numbers(torch.zeros(0, dtype=torch.long), 2))


# Whole runs


@pytest.fixture(scope="module")
def run(image_folder, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "plain"
    data = {"path": str(image_folder), "image_size": 16, "workers": 0}
    softlabels.train(data, output=output, ema_decay=0.5, **OF_A_RUN)
    return output


@pytest.fixture(scope="module")
def taught(image_folder, run, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "taught"
    data = {"path": str(image_folder), "image_size": 16, "workers": 0}
    teacher = {"name": f"file:{run / 'student.safetensors'}", "check": "off"}
    softlabels.train(data, output=output, method="nkd", teacher=teacher, **OF_A_RUN)
    return output


def test_a_run_writes_what_agrees_with_its_summary(run):
    summary = json.loads((run / "summary.json").read_text())
    content = json.loads((run / "analysis.json").read_text())
    arrays = np.load(run / "predictions.npz")
    final = summary["final"]
    assert content["images"] == summary["test_images"] == len(arrays["index"]) == 24
    assert 100 * (arrays["predicted"] == arrays["target"]).mean() == pytest.approx(final["top1"])
    assert content["zipf"]["r2"] == pytest.approx(final["zipf_r2"], rel=1e-9)
    assert content["zipf"]["exponent"] == pytest.approx(final["zipf_exponent"], rel=1e-9)
    assert np.mean(content["per_class"]) == pytest.approx(final["top1"])
    assert (
        sum(row[2] for row in content["confusion"])
        == (arrays["predicted"] != arrays["target"]).sum()
    )
    assert content["teacher"] is None
    assert {*content["features"]["class"]} == {*range(6)}


def test_each_evaluation_logs_the_zipf_fit(run):
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in logged if "eval/top1" in line]
    assert len(evaluations) == 2
    assert all(0 < line["eval/zipf_r2"] <= 1 for line in evaluations)
    assert all(line["eval/zipf_exponent"] > 0 for line in evaluations)


def test_a_run_tells_its_time_and_memory(run):
    summary = json.loads((run / "summary.json").read_text())
    lines = [json.loads(line) for line in (run / "timings.jsonl").read_text().splitlines()]
    assert summary["seconds_per_epoch"] == pytest.approx(np.median([x["seconds"] for x in lines]))
    assert 2**26 < summary["peak_memory"] < 2**36  # torch alone takes more than 64 MiB


def test_a_teacher_is_compared_by_name(taught, run):
    teacher = json.loads((taught / "analysis.json").read_text())["teacher"]
    assert teacher["name"] == f"file:{run / 'student.safetensors'}"
    of_teacher = json.loads((run / "summary.json").read_text())["final"]["top1"]
    assert teacher["top1"] == pytest.approx(of_teacher)
    arrays, first = np.load(taught / "predictions.npz"), np.load(run / "predictions.npz")
    np.testing.assert_array_equal(arrays["teacher_predicted"], first["predicted"])
    same = arrays["teacher_predicted"] == arrays["predicted"]
    assert teacher["agreement"] == pytest.approx(100 * same.mean())


@pytest.mark.parametrize("which", ["run", "taught"])
def test_an_older_run_gets_the_same_files_later(which, request, tmp_path, capsys):
    folder: Path = request.getfixturevalue(which)
    later = tmp_path / "later"
    shutil.copytree(folder, later)
    for name in FILES:
        (later / name).unlink()
    assert main(["analyze", str(later)]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{later / FILES[0]}, with {FILES[1]}"]
    for name in FILES:
        assert (later / name).read_bytes() == (folder / name).read_bytes(), name


def test_a_run_that_goes_on_writes_the_same(run, image_folder, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(run, again)
    newest = max((again / "checkpoints").iterdir())
    newest.unlink()
    for name in (*FILES, "summary.json"):
        (again / name).unlink()
    data = {"path": str(image_folder), "image_size": 16, "workers": 0}
    softlabels.train(data, output=again, ema_decay=0.5, **OF_A_RUN)
    for name in FILES:
        assert (again / name).read_bytes() == (run / name).read_bytes(), name


def test_the_setting_turns_it_off_and_may_change_in_a_run(run, image_folder, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(run, again)
    for name in FILES:
        (again / name).unlink()
    data = {"path": str(image_folder), "image_size": 16, "workers": 0}
    result = softlabels.train(data, output=again, ema_decay=0.5, analysis=False, **OF_A_RUN)
    assert not any((result.folder / name).exists() for name in FILES)


def test_a_run_that_is_not_finished_is_refused_in_a_line(tmp_path, capsys):
    assert main(["analyze", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "finished run" in error


def test_a_run_whose_teacher_is_gone_is_refused(taught, tmp_path):
    later = tmp_path / "later"
    shutil.copytree(taught, later)
    config = (later / "config.yaml").read_text()
    (later / "config.yaml").write_text(config.replace("student.safetensors", "gone.safetensors"))
    with pytest.raises((OSError, ValueError), match=r"gone\.safetensors"):
        analyze_run(later)
