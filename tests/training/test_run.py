"""Whole runs on a tiny data set, through `softlabels.train`."""

from __future__ import annotations

import json
import math
import resource
import signal
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from timm import create_model

import softlabels
from shared.patterns import FAST
from shared.signalling import Signalling
from softlabels.data.in_memory import InMemorySource
from softlabels.distill.external_inputs import checked_inputs
from softlabels.inputs import Logits
from softlabels.io.weights import load_weights
from softlabels.losses import METHODS, Method
from softlabels.training import engine, trainer
from softlabels.training.config import load_recipe, resolve
from softlabels.training.errors import Interrupted, NonFiniteLossError, RunError
from softlabels.training.loss_log import LossLog

# One of each kind: a teacher's logits; its maps and learned parts; a memory and indices; votes;
# a second view of the images; images mixed.
KINDS = ("nkd", "reviewkd", "crd", "uskd", "zipf_ls", "ddgsd", "mixskd")
OTHERS = sorted(METHODS.keys() - {*KINDS, "vitkd"})  # that one is for transformers


def train(source: InMemorySource, output: Path, **settings) -> softlabels.training.TrainResult:
    return softlabels.train(source, output=output, **{**FAST, **settings})


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def teacher_for(method: str | None) -> dict:
    if method is None or not any(
        kind.reads_teacher for kind in checked_inputs(METHODS[method]()).values()
    ):
        return {}
    torch.manual_seed(5)
    return {"teacher": create_model("resnet8_glyphs", num_classes=6)}


def gently(method: str | None) -> dict:
    """A hundredth of a method's weight: its teacher here knows nothing, and steps are few."""
    if method in (None, "nkd", "uskd", "zipf_ls"):
        return {}
    weight = METHODS[method].defaults.weight
    return {"method_weight": weight / 100, "task": {"weight": 1.0}}


@pytest.mark.parametrize(
    "method", [None, *KINDS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS)]
)
def test_run_with_each_method_learns_and_writes_everything(source, tmp_path, method):
    settings = {**teacher_for(method), **gently(method), "report": True}
    result = train(source, tmp_path / "run", method=method, **settings)

    assert result.final["top1"] > 60  # chance is 17 %
    names = {path.name for path in result.folder.iterdir()}
    assert names >= {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "timings.jsonl",
        "summary.json",
        "gallery.json",
        "analysis.json",
        "predictions.npz",
        "report.html",
        "student.safetensors",
        "student_best.safetensors",
        "tensorboard",
        "checkpoints",
    }
    logged = [line for line in lines(result.folder / "metrics.jsonl") if "train/loss" in line]
    assert logged[-1]["train/task"] < logged[0]["train/task"]
    assert ("train/method" in logged[0]) == (method is not None)
    summary = json.loads((result.folder / "summary.json").read_text())
    assert summary["final"] == result.final
    assert summary["complete"] is True
    assert summary["method"] == method
    environment = json.loads((result.folder / "environment.json").read_text())
    assert environment["torch"] == torch.__version__.partition("+")[0]
    assert environment["seed"] == 0
    assert list((result.folder / "tensorboard").iterdir())


@pytest.mark.parametrize("method", ["uskd", "zipf_ls"])
def test_exported_student_loads_into_the_plain_model(source, tmp_path, method):
    result = train(source, tmp_path / "run", method=method, epochs=1)
    plain = create_model("resnet8_glyphs", num_classes=6)
    load_weights(plain, result.folder / "student.safetensors", strict=True)

    images = next(source.test_batches(batch_size=8, device="cpu")).images
    with torch.no_grad():
        assert torch.equal(plain.eval()(images), result.student(images))
    assert not any(module._forward_hooks for module in result.student.modules())


def test_run_with_a_teacher_without_one_is_refused_before_training(source, tmp_path):
    with pytest.raises(ValueError, match="'nkd' reads from a teacher"):
        train(source, tmp_path / "run", method="nkd")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", [None, "uskd"])
@pytest.mark.parametrize("stop_after", [3, 7, 12], ids=["epoch's end", "within", "last step"])
def test_resumed_run_equals_a_straight_one_to_the_last_bit(source, tmp_path, method, stop_after):
    extra = {
        "method": method,
        "ema_decay": 0.9,
        "mix": {"mixup": 0.4, "cutmix": 1.0},
        "student": {"name": "timm:resnet8_glyphs", "settings": {"drop_rate": 0.2}},
        "log_every": 5,  # the stops are between two lines of the log
    }
    straight = train(source, tmp_path / "straight", **extra)
    stopping = Signalling(source, stop_after, signal.SIGTERM)
    with pytest.raises(Interrupted, match=f"after step {stop_after}, in epoch") as stopped:
        softlabels.train(stopping, output=str(tmp_path / "resumed"), **{**FAST, **extra})
    assert stopped.value.status == 143
    assert not (tmp_path / "resumed" / "summary.json").exists()
    # The source is another object of the same data: its settings say so.
    config = tmp_path / "resumed" / "config.yaml"
    config.write_text(config.read_text().replace("object:Signalling", "object:InMemorySource"))
    resumed = train(source, tmp_path / "resumed", **extra)

    for name in ("metrics.jsonl", "student.safetensors", "student_best.safetensors"):
        assert (straight.folder / name).read_bytes() == (resumed.folder / name).read_bytes(), name
    assert resumed.final == straight.final
    environment = json.loads((resumed.folder / "environment.json").read_text())
    assert len(environment["earlier_starts"]) == 1


def test_checkpoints_within_an_epoch_change_no_number(source, tmp_path):
    plain = train(source, tmp_path / "plain", method="uskd")
    often = train(source, tmp_path / "often", method="uskd", checkpoint={"every": 1, "keep": 3})
    for name in ("metrics.jsonl", "student.safetensors"):
        assert (plain.folder / name).read_bytes() == (often.folder / name).read_bytes()
    steps = sorted(int(p.name.split("-")[1]) for p in (often.folder / "checkpoints").iterdir())
    assert steps == [10, 11, 12]


def test_fewer_evaluations_change_no_weight(source, tmp_path):
    often = train(source, tmp_path / "often", epochs=5)
    seldom = train(source, tmp_path / "seldom", epochs=5, eval_every=2)
    written = {
        folder.name: lines(folder / "metrics.jsonl") for folder in (often.folder, seldom.folder)
    }
    epochs = {
        name: [line["epoch"] for line in each if "eval/top1" in line]
        for name, each in written.items()
    }
    assert epochs == {"often": [1, 2, 3, 4, 5], "seldom": [2, 4, 5]}  # always at the end
    assert seldom.final == often.final
    assert seldom.best["epoch"] in (2, 4, 5)
    assert len(lines(seldom.folder / "timings.jsonl")) == 5
    for name, value in often.student.state_dict().items():
        assert torch.equal(seldom.student.state_dict()[name], value)


def test_full_disk_is_told_and_keeps_the_last_good_state(source, tmp_path):
    straight = train(source, tmp_path / "straight")
    stopping = Signalling(source, 4, signal.SIGINT)
    with pytest.raises(Interrupted) as stopped:
        softlabels.train(stopping, output=str(tmp_path / "run"), **FAST)
    assert stopped.value.status == 130
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("object:Signalling", "object:InMemorySource"))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(RunError, match=r"no room for the run's files .*File too large"):
            train(source, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    names = sorted(path.name[:13] for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000003", "step-00000004"]
    train(source, tmp_path / "run")
    for name in ("metrics.jsonl", "student.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (straight.folder / name).read_bytes()


def test_repeating_config_yaml_repeats_the_run(source, tmp_path):
    first = train(source, tmp_path / "first", method="uskd", epochs=2)
    values = load_recipe(str(first.folder / "config.yaml"))
    values["output"] = str(tmp_path / "second")
    second = trainer.run(resolve(values), source=source)

    weights = [r.folder.joinpath("student.safetensors").read_bytes() for r in (first, second)]
    assert weights[0] == weights[1]


def test_methods_share_initial_weights_and_data(source, tmp_path, monkeypatch):
    seen: dict[str, list] = {}
    build = trainer.build_distiller

    def spy(config, info, **modules):
        distiller = build(config, info, **modules)
        seen[config.label] = [p.detach().clone() for p in distiller.student.parameters()]
        return distiller

    monkeypatch.setattr(trainer, "build_distiller", spy)
    indices: dict[str, list] = {}
    batches = InMemorySource.train_batches
    for method in (None, "uskd", "zipf_ls"):
        label = method or "cross_entropy"

        def watched(self, *, label=label, **where):
            for batch in batches(self, **where):
                indices.setdefault(label, []).append((batch.index, batch.images.clone()))
                yield batch

        monkeypatch.setattr(InMemorySource, "train_batches", watched)
        train(source, tmp_path / label, method=method, epochs=1)

    for label in ("uskd", "zipf_ls"):
        pairs = zip(seen["cross_entropy"], seen[label], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        for (index, images), (other, others) in zip(
            indices["cross_entropy"], indices[label], strict=True
        ):
            assert torch.equal(index, other)
            assert torch.equal(images, others)


def test_not_finite_loss_stops_with_step_and_part(source, tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"step \d+, from its part 'task'"):
        train(source, tmp_path / "run", optimizer={"lr": 1e30})


class Scaled(Method):
    """A method whose value and gradient are what a test wants them to be."""

    inputs: ClassVar = {"logits": Logits()}
    of_batch = True

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def terms(self, logits):
        return {"value": self.function(logits)}


def test_not_finite_method_is_named_as_the_part(source, tmp_path):
    with pytest.raises(NonFiniteLossError, match="at step 0, from its part 'method'"):
        train(source, tmp_path / "run", method=Scaled(lambda logits: logits.sum() * math.inf))


def test_not_finite_gradient_of_a_finite_loss_stops_too(source, tmp_path):
    method = Scaled(lambda logits: (0 * logits).abs().sqrt().sum())  # 0, and its slope infinite
    with pytest.raises(NonFiniteLossError, match="the gradient is not finite at step 0") as found:
        train(source, tmp_path / "run", method=method)
    assert found.value.parts == ("gradient",)


@pytest.mark.parametrize("target_from", ["self", "teacher"])
def test_a_term_alone_has_a_gallery_too(source, tmp_path, target_from):
    """Without the terms that read weak logits there is no weak head."""
    method = {"kind": "uskd", "non_target_weight": 0.0, "weak_weight": 0.0}
    result = train(
        source, tmp_path / "run", method={**method, "target_from": target_from}, epochs=1,
        **(teacher_for("nkd") if target_from == "teacher" else {}),
    )  # fmt: skip
    assert (result.folder / "gallery.json").is_file()


class WithBadImages(InMemorySource):
    """A source some of whose training images are not finite in one epoch."""

    def __init__(self, source: InMemorySource, bad: set[int], epoch: int) -> None:
        self.__dict__.update(source.__dict__)
        self._bad = torch.tensor(sorted(bad))
        self._epoch = epoch

    def train_batches(self, *, epoch, **where):
        for batch in super().train_batches(epoch=epoch, **where):
            if epoch == self._epoch:
                batch.images[torch.isin(batch.index, self._bad)] = math.nan
            yield batch


NO_BATCH_STATISTICS = {"name": "timm:vit_mini_patch4_32", "settings": {"depth": 2}}


def test_the_images_that_a_loss_is_not_finite_for_are_named(source, tmp_path):
    bad = WithBadImages(source, {5}, epoch=1)
    with pytest.raises(NonFiniteLossError, match=r"training images by index: 5; try") as found:
        train(bad, tmp_path / "run", student=NO_BATCH_STATISTICS, checkpoint={"every": 1})
    failure = json.loads((tmp_path / "run" / "failure.json").read_text())
    assert failure["images"] == [5] == list(found.value.images)
    assert failure["parts"] == ["task"]
    assert 3 <= failure["step"] < 6
    steps = [int(p.name.split("-")[1]) for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert max(steps) == failure["step"]  # that many were done: the state before the bad one


def test_the_images_are_named_too_where_losses_are_looked_at_late(source, tmp_path, monkeypatch):
    """As on an accelerator: the weights are no longer finite by then, which tells less."""
    monkeypatch.setattr(engine, "LossLog", lambda **given: LossLog(**{**given, "eager": False}))
    bad = WithBadImages(source, {9}, epoch=1)
    with pytest.raises(NonFiniteLossError, match=r"training images by index: 9; try"):
        train(
            bad, tmp_path / "run", student=NO_BATCH_STATISTICS, checkpoint={"every": 1},
            log_every=1000,
        )  # fmt: skip


def test_the_whole_batch_is_named_where_statistics_mix_its_images(source, tmp_path):
    bad = WithBadImages(source, {5}, epoch=0)
    with pytest.raises(NonFiniteLossError, match=r"by index.* and 24 more") as found:
        train(bad, tmp_path / "run")
    assert 5 in found.value.images
    assert len(found.value.images) == 32


@pytest.mark.parametrize("student", ["timm:resnet8_glyphs", NO_BATCH_STATISTICS], ids=str)
def test_mixed_precision_skips_and_counts_steps_that_are_not_finite(source, tmp_path, student):
    bad = WithBadImages(source, {5, 6}, epoch=1)
    result = train(
        bad, tmp_path / "run", student=student, precision="bf16", ema_decay=0.5, log_every=1,
        method="uskd", max_skipped_steps=50,
    )  # fmt: skip
    counts = [
        line["train/skipped_steps"]
        for line in lines(result.folder / "metrics.jsonl")
        if "train/skipped_steps" in line
    ]
    assert counts[:3] == [0, 0, 0]
    assert counts[-1] in (1, 2)
    state = result.student.state_dict()
    assert all(bool(value.isfinite().all()) for value in state.values())
    assert result.final["top1"] > 30


def test_too_many_skipped_steps_in_a_row_stop_the_run(source, tmp_path):
    bad = WithBadImages(source, set(range(source.num_train)), epoch=1)
    with pytest.raises(NonFiniteLossError, match="at step 5 after 2 skipped steps"):
        train(bad, tmp_path / "run", precision="bf16", max_skipped_steps=2)


def test_folder_of_other_settings_is_refused(source, tmp_path):
    train(source, tmp_path / "run", epochs=1)
    with pytest.raises(ValueError, match="holds another run: epochs: 1 there, 2 here"):
        train(source, tmp_path / "run", epochs=2)


def test_folder_that_is_no_run_is_refused(source, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no run folder"):
        train(source, tmp_path, epochs=1)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_complete_run_is_not_trained_again(source, tmp_path):
    first = train(source, tmp_path / "run", epochs=1)
    before = (first.folder / "metrics.jsonl").read_bytes()
    again = train(source, tmp_path / "run", epochs=1)

    assert (again.folder / "metrics.jsonl").read_bytes() == before
    assert again.final == first.final


def test_averaged_weights_are_what_is_evaluated_and_exported(source, tmp_path):
    # With so slow an average, the exported student is almost the initial one.
    slow = train(source, tmp_path / "slow", epochs=1, ema_decay=0.9999)
    plain = train(source, tmp_path / "plain", epochs=1)
    moved = sum(
        (a - b).abs().sum().item()
        for a, b in zip(slow.student.parameters(), plain.student.parameters(), strict=True)
    )
    assert moved > 1
    assert slow.final != plain.final


def test_accumulation_equals_one_batch_without_batch_statistics(source, tmp_path):
    settings = {
        "student": {"name": "timm:vit_mini_patch4_32", "settings": {"depth": 2}},
        "epochs": 1,
        "optimizer": {"name": "sgd", "lr": 0.05},
        "method": "zipf_ls",
        "precision": "no",
    }
    whole = train(source, tmp_path / "whole", **settings)
    parts = train(source, tmp_path / "parts", grad_accum_steps=4, **settings)
    for a, b in zip(whole.student.parameters(), parts.student.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16"},
        {"channels_last": True, "student": "timm:resnet8"},
        {"max_grad_norm": 1.0},
        {"mix": {"mixup": 0.8}},
        {"mix": {"cutmix": 1.0}},
        {"optimizer": {"name": "adamw", "lr": 2e-3, "decay_norm_and_bias": False}},
        {"task": {"label_smoothing": 0.1}},
        {"schedule": {"name": "multistep", "decay_epochs": [2, 3]}},
        {"schedule": {"name": "step", "decay_epochs": [2], "warmup_epochs": 1}},
    ],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.parametrize("method", ["uskd"])
def test_setting_trains(source, tmp_path, settings, method):
    result = train(source, tmp_path / "run", method=method, **settings)
    assert result.final["top1"] > 40
    assert all(math.isfinite(value) for value in result.final.values())


def test_schedule_follows_the_settings_per_step(source, tmp_path):
    schedule = {"name": "multistep", "decay_epochs": [2], "warmup_epochs": 1, "warmup_lr": 0.0}
    result = train(
        source, tmp_path / "run", epochs=3, log_every=1, schedule=schedule, optimizer={"lr": 0.09}
    )
    rates = [
        line["train/lr"] for line in lines(result.folder / "metrics.jsonl") if "train/lr" in line
    ]
    # Each line holds the rate of the next step; three steps an epoch.
    assert rates == pytest.approx([0.03, 0.06, 0.09, 0.09, 0.09, 0.009, 0.009, 0.009, 0.009])


def test_gallery_holds_the_same_images_and_soft_labels_for_each_method(source, tmp_path):
    galleries = {}
    for method in (None, "uskd", "zipf_ls", "nkd"):
        extra = teacher_for(method)
        result = train(source, tmp_path / str(method), method=method, epochs=1, **extra)
        galleries[method] = json.loads((result.folder / "gallery.json").read_text())
    indices = {m: [image["index"] for image in g["images"]] for m, g in galleries.items()}
    assert len(indices[None]) == 3
    assert len({tuple(i) for i in indices.values()}) == 1
    for method, gallery in galleries.items():
        for image in gallery["images"]:
            total = sum(probability for _, probability in image["non_target"])
            assert total == pytest.approx(0 if method is None else 1, abs=1e-5)
            assert image["target"] not in [label for label, _ in image["non_target"]]
    assert all(image["target_value"] == 1 for image in galleries[None]["images"])


def test_assumed_settings_stand_beside_the_results(source, tmp_path):
    assumed = {"batch_size": "nobody says"}
    result = train(source, tmp_path / "run", epochs=1, assumed=assumed, report=True)
    summary = json.loads((result.folder / "summary.json").read_text())
    assert summary["assumed"] == {"batch_size": "nobody says"}
    assert "nobody says" in (result.folder / "report.html").read_text()


def test_resolved_configuration_names_what_was_left_open(image_folder, tmp_path):
    result = softlabels.train(
        data={"path": str(image_folder), "image_size": 32, "workers": 0},
        method="zipf_ls",
        epochs=1,
        batch_size=16,
        output=str(tmp_path / "run"),
        progress=False,
    )
    config = yaml.safe_load((result.folder / "config.yaml").read_text())
    assert config["student"]["name"] == "timm:resnet20"
    assert config["method_weight"] == 0.1
    assert config["output"] == str(tmp_path / "run")


@pytest.mark.slow
def test_compiled_training_equals_eager(source, tmp_path):
    eager = train(source, tmp_path / "eager", method="uskd", epochs=1)
    compiled = train(source, tmp_path / "compiled", method="uskd", epochs=1, compile=True)
    assert compiled.final["nll"] == pytest.approx(eager.final["nll"], rel=1e-2)
