"""`softlabels sweep`: what it searches, what it proposes, how it goes on, what it leaves."""

from __future__ import annotations

import csv
import json
import math
import shutil

import pytest
import yaml
from rich.console import Console

from softlabels.cli import main
from softlabels.experiments import sweep
from softlabels.experiments.search_space import (
    Range,
    default_space,
    fitted_space,
    read_space,
    value_of,
    with_values,
)
from softlabels.experiments.sweep import run_sweep
from softlabels.experiments.sweep_record import SweepOptions
from softlabels.losses import METHODS
from softlabels.training.config import (
    build_method,
    load_recipe,
    method_reads_teacher,
    parse,
    resolve,
)
from softlabels.training.errors import RunError

TEACHER = {"name": "timm:resnet20"}
NOISE = {"source": "noise", "num_train": 60, "num_test": 10, "num_classes": 3, "image_size": 16}
USKD = {"method": "uskd", "data": NOISE, "student": {"name": "timm:resnet8_glyphs"}}
LR = ("optimizer.lr=0.01..1:log",)
QUIET = Console(quiet=True)


def config_of(kind, **more):
    values = {"method": kind, **more}
    return resolve(
        {**values, "teacher": TEACHER}
        if method_reads_teacher(build_method(parse(values)))
        else values
    )


def texts(space):
    return {key: str(values) for key, values in space.items()}


@pytest.fixture
def trained(monkeypatch):
    """In place of training: a run's accuracy is best at a learning rate of 0.2."""
    runs = []

    def launch_runs(waiting, *, jobs, threads, console):
        for run in waiting:
            if run.folder.is_complete():
                continue
            runs.append(run)
            run.folder.path.mkdir(parents=True)
            run.folder.environment.write_text('{"torch": "x"}')
            lr = run.config.optimizer.lr
            if lr > 0.9:
                run.folder.failure.write_text("{}")
                raise RunError(f"the run {run.name} ended with status 1")
            far = abs(math.log(lr / 0.2))
            final = {"top1": 80 - 10 * far + run.config.seed, "nll": 1 + far, "ece": 2.0}
            summary = {
                "label": "uskd",
                "method": "uskd",
                "model": "resnet8",
                "data": "noise",
                "seed": run.config.seed,
                "epochs": 20,
                "parameters": 9,
                "seconds": 1.5,
                "complete": True,
                "final": final,
            }
            run.folder.summary.write_text(json.dumps(summary))

    monkeypatch.setattr(sweep, "launch_runs", launch_runs)
    return runs


def killed(*_, **__):
    raise KeyboardInterrupt


def searched(output, *, space=LR, config=None, **more):
    own = {name: more.pop(name) for name in ("seed",) if name in more}
    options = SweepOptions(space=space, **{"trials": 12, **more})
    return run_sweep(config or resolve(USKD), options, output=output, console=QUIET, **own)


def tried(result):
    return [trial.values for trial in result.record.trials]


def test_the_default_space_is_the_weights_and_the_temperature():
    expected = {
        "uskd": {
            "method.target_weight": "0.1..10:log",
            "method.non_target_weight": "0.01..1:log",
            "method.weak_weight": "0.0005..0.05:log",
        },
        "nkd": {
            "method_weight": "0.1..10:log",
            "method.non_target_weight": "0.15..15:log",
            "method.temperature": "1..10:log",
        },
        "kd": {"method_weight": "0.1..10:log", "method.temperature": "1..10:log"},
        "zipf_ls": {"method_weight": "0.01..1:log"},
        "ps_kd": {"method_weight": "0.05..0.95"},  # the labels have the rest
        "tf_kd": {"method_weight": "0.01..1:log", "method.temperature": "5..80:log"},
        "none": {"optimizer.lr": "0.025..0.4:log", "optimizer.weight_decay": "0.000125..0.002:log"},
    }
    assert {kind: texts(default_space(config_of(kind))) for kind in expected} == expected
    smoothed = resolve(load_recipe("glyphs100/label_smoothing"))
    assert texts(default_space(smoothed)) == {"task.label_smoothing": "0.01..0.4:log"}
    weighted = config_of("uskd", method_weight=0.5)
    assert "method_weight" not in default_space(weighted)
    assert (
        texts(default_space(config_of("kd", method_weight=0.5)))["method_weight"] == "0.05..5:log"
    )


@pytest.mark.parametrize("kind", METHODS)
def test_every_method_has_a_default_space_that_holds_its_own_settings(kind):
    config = config_of(kind)
    space = default_space(config)
    assert fitted_space(config, space) == space
    assert all(value_of(config, key) in values for key, values in space.items())


def test_settings_that_are_off_stay_off():
    settings = {"kind": "uskd", "target_weight": 0.0, "weak_weight": 0.0}
    assert [*default_space(resolve({"method": settings}))] == [
        "method_weight",
        "method.non_target_weight",
    ]
    nothing = resolve({"method": "zipf_ls", "method_weight": 0})
    with pytest.raises(ValueError, match=r"nothing to search by default.*--space KEY=LOW\.\.HIGH"):
        default_space(nothing)


def test_a_space_is_read_from_texts():
    space = read_space(
        ["method.temperature=1..8:log", "optimizer.weight-decay=0..1e-3", "epochs=2..40",
         "task.smooth_over=all, non_target"]
    )  # fmt: skip
    assert space == {
        "method.temperature": Range(1, 8, log=True),
        "optimizer.weight_decay": Range(0, 1e-3),
        "epochs": Range(2, 40),
        "task.smooth_over": ("all", "non_target"),
    }


def test_whole_numbers_stay_whole(tmp_path, trained):
    config = resolve(USKD)
    assert fitted_space(config, {"epochs": Range(2, 9)}) == {"epochs": Range(2, 9, whole=True)}
    assert not fitted_space(config, read_space(LR))["optimizer.lr"].whole
    space = ("epochs=2..9", "task.smooth_over=all,non_target")
    result = searched(tmp_path, space=space)
    assert all(type(values["epochs"]) is int for values in tried(result)[1:])
    assert {values["task.smooth_over"] for values in tried(result)} == {"all", "non_target"}
    assert len({values["epochs"] for values in tried(result)}) > 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method.temperature", "expected KEY=LOW..HIGH"),
        ("=1..2", "expected KEY=LOW..HIGH"),
        ("optimizer.lr=", "expected KEY=LOW..HIGH"),
        ("optimizer.lr=a..b", "expected two numbers, LOW..HIGH, got 'a..b'"),
        ("optimizer.lr=1..2:lin", "expected LOW..HIGH or LOW..HIGH:log, got '1..2:lin'"),
        ("optimizer.lr=2..1", "from a number to a larger one, got 2..1"),
        ("optimizer.lr=1..inf", "from a number to a larger one"),
        ("optimizer.lr=0..1:log", "a range with log is above 0, got 0..1:log"),
        ("optimizer.lr=0..1", "optimizer.lr=0 does not fit: optimizer.lr: Input should be"),
        ("optimizer.lr=0.1", "needs two values or more that differ"),
        ("optimizer.lr=0.1,0.1", "needs two values or more that differ"),
        ("epochs=1.5..3", "whole ends, got 1.5..3"),
        ("optimizer.name=1..2", "optimizer.name is no number"),
        ("optimizer.name=sgd,[a]", "expected numbers, texts, true or false"),
        ("optimizer.lrr=1..2", "unknown setting 'optimizer.lrr': expected lr"),
        ("optimzer.lr=1..2", "unknown setting 'optimzer.lr'"),
        ("method.temperature_x=1..2", "unknown setting 'method.temperature_x'"),
        ("seed=0..5", "seed decides what is measured"),
        ("data.validation=0.1..0.3", "data.validation decides what is measured"),
    ],
)
def test_a_space_that_does_not_fit_is_one_line(text, message, capsys, tmp_path):
    output = tmp_path / "out"
    given = ["sweep", "--data.source", "noise", "--output", str(output), "--space", text]
    assert main(given) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert message in err[-1]
    assert err[-1].startswith("softlabels sweep: ")
    assert not output.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--trials", "0"], "trials: Input should be greater than or equal to 1"),
        (["--jobs", "0"], "jobs"),
        (["--metric", "ece"], "metric"),
        (["--data.validation", "0.95"], "validation"),
        (["--data.num-train", "1"], "no class has a second image"),
        (["--method.kind", "kd"], "reads from a teacher"),
        (["--space", "epochs=1..2", "--space", "epochs=1..3"], "epochs is there twice"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(more, message, capsys, tmp_path):
    output = tmp_path / "out"
    assert main(["sweep", "--data.source", "noise", "--output", str(output), *more]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not output.exists()


def test_the_first_trial_is_the_settings_as_given_and_the_search_improves_on_it(tmp_path, trained):
    config = resolve({**USKD, "optimizer": {"lr": 0.03}})
    result = searched(tmp_path, config=config, trials=20)
    trials = result.record.trials
    assert trials[0].values == {"optimizer.lr": 0.03}
    assert [trial.number for trial in trials] == list(range(20))
    assert result.best.mean("top1") > trials[0].mean("top1")
    assert result.best.values["optimizer.lr"] == pytest.approx(0.2, rel=0.3)
    learnt = [abs(math.log(t.values["optimizer.lr"] / 0.2)) for t in trials[1:]]
    assert sum(learnt[10:]) / 9 < sum(learnt[:10]) / 10
    assert all(run.config.data.validation == sweep.VALIDATION == 0.2 for run in trained)
    assert result.record.validation_images == 12
    assert result.record.train_images == 48
    assert all(0.01 <= t.values["optimizer.lr"] <= 1 for t in trials)
    assert all(float(f"{t.values['optimizer.lr']:.4g}") == t.values["optimizer.lr"] for t in trials)


def test_the_lowest_nll_may_decide(tmp_path, trained):
    result = searched(tmp_path, metric="nll")
    losses = [trial.mean("nll") for trial in result.record.trials if trial.metrics]
    assert result.best.mean("nll") == min(losses)


def test_a_share_that_is_given_is_kept(tmp_path, trained):
    config = resolve({**USKD, "data": {**NOISE, "validation": 0.5, "train_share": 0.5}})
    result = searched(tmp_path, config=config, trials=1)
    assert result.record.validation_images == 30
    assert trained[0].config.data.validation == 0.5
    assert (result.config.data.validation, result.config.data.train_share) == (None, None)
    assert "data.validation 0.5, data.train_share 0.5" in (tmp_path / "best.yaml").read_text()


def test_proposals_depend_on_the_seed_and_not_on_the_call(tmp_path, trained):
    first, same, other = (
        searched(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert tried(first) == tried(same)
    assert tried(first)[0] == tried(other)[0]
    assert tried(first)[1:] != tried(other)[1:]
    assert len({values["optimizer.lr"] for values in tried(first)}) == 12
    paired = searched(tmp_path / "d", seed=1, jobs=3)
    assert tried(paired) == tried(searched(tmp_path / "e", seed=1, jobs=3))


def test_a_sweep_goes_on_where_it_was(tmp_path, trained):
    whole = searched(tmp_path / "whole")
    part = searched(tmp_path / "part", trials=5)
    assert tried(part) == tried(whole)[:5]
    count = len(trained)
    assert tried(searched(tmp_path / "part")) == tried(whole)
    assert len(trained) == count + 7
    searched(tmp_path / "part")
    assert len(trained) == count + 7  # all is there


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_kill_changes_nothing(tmp_path, trained, jobs):
    """Wherever the journal ends, also within a line; runs that were complete are not repeated."""
    whole = searched(tmp_path / "out", jobs=jobs)
    journal = tmp_path / "out/journal.log"
    content, count = journal.read_bytes(), len(trained)
    for end in range(len(content) // 29, len(content), len(content) // 7):
        journal.write_bytes(content[:end])
        assert searched(tmp_path / "out", jobs=jobs).record == whole.record
    assert len(trained) == count
    journal.write_bytes(content[:-400])
    last = tmp_path / "out" / whole.record.trials[-1].runs[0]
    shutil.rmtree(last)
    assert searched(tmp_path / "out", jobs=jobs).record == whole.record
    assert [run.folder.path for run in trained[count:]] == [last]


@pytest.mark.parametrize("end", ["ask", "train", "told"])
def test_a_kill_while_the_given_settings_are_trained(tmp_path, trained, monkeypatch, end):
    """They lie outside of the space, so that the search does not learn from them."""
    config = resolve({**USKD, "optimizer": {"lr": 0.005}})
    whole = searched(tmp_path / "whole", config=config, trials=4)
    assert whole.record.trials[0].values == {"optimizer.lr": 0.005}
    place = {"ask": (sweep.optuna.Study, "ask"), "train": (sweep, "launch_runs")}
    with monkeypatch.context() as patch:
        patch.setattr(*place.get(end, (sweep.optuna.Study, "tell")), killed)
        with pytest.raises(KeyboardInterrupt):
            searched(tmp_path / "out", config=config, trials=4)
    assert tried(searched(tmp_path / "out", config=config, trials=4)) == tried(whole)


def test_two_sweeps_do_not_share_a_folder(tmp_path, monkeypatch):
    def launch_runs(*_, **__):
        searched(tmp_path / "out")

    monkeypatch.setattr(sweep, "launch_runs", launch_runs)
    with pytest.raises(ValueError, match="in use by another sweep"):
        searched(tmp_path / "out")


def test_recorded_trials_need_no_folders(tmp_path, trained):
    whole = searched(tmp_path / "out")
    count = len(trained)
    shutil.rmtree(tmp_path / "out/trials")
    assert searched(tmp_path / "out").record == whole.record
    assert len(trained) == count


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"space": ("optimizer.lr=0.01..2",)},
            "another sweep: space.optimizer.lr: 0.01..1:log there",
        ),
        ({"metric": "nll"}, "metric: top1 there, nll here"),
        ({"seed": 1}, "search_seed: 0 there, 1 here"),
        ({"seeds": 2}, r"seeds: \(0,\) there, \(0, 1\) here"),
        ({"config": resolve({**USKD, "epochs": 3})}, "settings.epochs: 20 there, 3 here"),
    ],
)
def test_another_sweep_needs_another_folder(tmp_path, trained, more, message):
    searched(tmp_path / "out", trials=2)
    with pytest.raises(ValueError, match=message):
        searched(tmp_path / "out", **more)


def test_folders_of_something_else_are_left_alone(tmp_path, trained):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="exists and holds no sweep"):
        searched(tmp_path)
    (tmp_path / "mine.txt").unlink()
    for damaged in ('{"trials": 3}\n', "[1]\n", "no JSON\nat all\n"):
        (tmp_path / "journal.log").write_text(damaged)
        with pytest.raises(ValueError, match=r"journal\.log is no record of a sweep"):
            searched(tmp_path)
    assert not trained


def test_a_trial_whose_loss_is_not_finite_does_not_end_the_search(tmp_path, trained):
    space = ("optimizer.lr=0.1,0.95,0.3",)
    result = searched(tmp_path, space=space, jobs=2)
    failed = [trial for trial in result.record.trials if not trial.metrics]
    assert failed
    assert all(trial.values == {"optimizer.lr": 0.95} for trial in failed)
    assert result.best.values == {"optimizer.lr": 0.3}
    assert "not finite" in (tmp_path / "sweep.md").read_text()
    config = resolve({**USKD, "optimizer": {"lr": 0.95}})
    with pytest.raises(RunError, match="none of 1 trials has a finite loss"):
        searched(tmp_path / "all", config=config, trials=1)


def test_a_run_that_fails_otherwise_ends_it(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RunError("the run trial 0 ended with status 2")

    monkeypatch.setattr(sweep, "launch_runs", fails)
    with pytest.raises(RunError, match="trial 0 ended with status 2"):
        searched(tmp_path)


def test_seeds_are_averaged(tmp_path, trained):
    result = searched(tmp_path, seeds=3, trials=4, config=resolve({**USKD, "seed": 5}))
    assert sorted({run.config.seed for run in trained}) == [5, 6, 7]
    for trial in result.record.trials:
        low, middle, high = trial.metrics["top1"]
        assert (middle - low, high - low) == (1, 2)
        assert trial.mean("top1") == pytest.approx(middle)
        assert len(set(trial.runs)) == 3


def test_the_results_agree_with_the_record(tmp_path, trained):
    config = resolve({**USKD, "paper": {"top1": 50}})
    result = searched(tmp_path, config=config)
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert record["environment"] == {"torch": "x"}
    assert record["space"] == {"optimizer.lr": "0.01..1:log"}
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert len(rows) == len(record["trials"]) == 12
    best = min(rows, key=lambda row: int(row["rank"] or 99))
    assert int(best["trial"]) == result.best.number
    assert float(best["top1"]) == max(float(row["top1"]) for row in rows if row["top1"])
    lr = result.best.values["optimizer.lr"]
    page = (tmp_path / "sweep.md").read_text()
    assert f"--optimizer.lr {lr:g}" in page
    assert "two standard errors" in page
    assert f"Trial {result.best.number}, top-1 % {result.best.mean('top1'):.2f}" in page
    ranks = [line.split("|")[1:3] for line in page.splitlines() if "(as given)" in line]
    assert len(ranks) == 1
    assert f"rank {ranks[0][0].strip()} of" in page

    recipe = resolve(load_recipe(str(tmp_path / "best.yaml")))
    assert recipe == result.config
    assert recipe.optimizer.lr == lr
    assert recipe.data.validation is None
    assert recipe.output is None
    assert recipe.paper.top1 is None  # it is no row of the paper any more
    unchanged = with_values(recipe, {"optimizer.lr": resolve(USKD).optimizer.lr})
    assert unchanged == resolve(USKD)
    shown = page.split("```yaml")[1].split("```")[0]
    assert yaml.safe_load(shown) == {"optimizer": {"lr": lr}}


def test_the_command_tells_what_it_found(tmp_path, trained, capsys):
    output = tmp_path / "out"
    given = ["sweep", "--data.source", "noise", "--data.num-train", "100", "--trials", "4"]
    assert main([*given, "--jobs", "2", "--threads", "1", "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert "on 20 validation images" in out
    assert "of 4" in out
    assert "settings: --optimizer.lr " in out
    assert f"softlabels train {output / 'best.yaml'}" in out
    assert {run.config.threads for run in trained} == {1}
    assert [*json.loads((output / "sweep.json").read_text())["space"]] == [
        "optimizer.lr",
        "optimizer.weight_decay",
    ]


@pytest.mark.slow
def test_a_real_sweep_from_the_command_line(tmp_path, capsys):
    output = tmp_path / "out"
    given = [
        "--data.source", "noise", "--data.num-train", "40", "--data.num-classes", "4",
        "--data.image-size", "16", "--student.name", "timm:resnet8_glyphs", "--epochs", "1",
        "--batch-size", "16", "--device", "cpu", "--threads", "1",
    ]  # fmt: skip
    arguments = ["sweep", *given, "--trials", "2", "--jobs", "2", "--output", str(output)]
    assert main([*arguments, "--space", "optimizer.lr=0.01..0.1:log"]) == 0
    captured = capsys.readouterr()
    assert "20% of the training set is held out for choosing (data.validation 0.2)" in captured.err
    assert "8 validation images" in captured.out
    assert str(output / "best.yaml") in captured.out
    record = json.loads((output / "sweep.json").read_text())
    assert len(record["trials"]) == 2
    for trial in record["trials"]:
        summary = json.loads((output / trial["runs"][0] / "summary.json").read_text())
        assert summary["test_images"] == 8
        assert trial["metrics"]["top1"] == [summary["final"]["top1"]]
    run = tmp_path / "run"
    assert main(["train", str(output / "best.yaml"), "--output", str(run)]) == 0
    assert json.loads((run / "summary.json").read_text())["test_images"] == 200
