from __future__ import annotations

import inspect

import pytest
import yaml

from softlabels.data.sources.by_name import SOURCES
from softlabels.distill.external_inputs import checked_inputs
from softlabels.losses import METHODS
from softlabels.losses._method import setting_fields
from softlabels.training.config import (
    Config,
    ConfigError,
    build_method,
    describe_method,
    dump,
    load_recipe,
    recipe_names,
    resolve,
    with_chosen,
)
from softlabels.training.recipes import merged
from softlabels.training.settings import DATA_SETTINGS, METHOD_SETTINGS, DataSettings

TEACHER = {"name": "timm:resnet20"}


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_resolves_and_its_dump_reloads_equal(name):
    config = resolve(load_recipe(name))
    assert resolve(yaml.safe_load(dump(config))) == config


def test_there_are_recipes():
    assert {"glyphs100/cross_entropy", "glyphs100/uskd", "glyphs100/teacher"} <= {*recipe_names()}


@pytest.mark.parametrize("kind", METHODS)
def test_settings_and_defaults_are_those_of_the_method(kind):
    left_out = {"reduction"} if METHODS[kind].can_ignore() else {"reduction", "ignore_index"}
    found = setting_fields(METHODS[kind])
    declared = {name: field.default for name, field in found.items() if name not in left_out}
    fields = METHOD_SETTINGS[kind].model_fields
    assert {n: f.default for n, f in fields.items() if n != "kind"} == declared
    assert all(field.description for name, field in fields.items() if name != "kind")


@pytest.mark.parametrize("kind", METHODS)
def test_method_is_built_from_its_settings(kind):
    inputs = checked_inputs(METHODS[kind]()).values()
    given = {"teacher": TEACHER} if any(kind.reads_teacher for kind in inputs) else {}
    assert type(build_method(resolve({"method": kind, **given}))) is METHODS[kind]


def test_settings_reach_the_method():
    config = resolve(
        {"method": {"kind": "uskd", "target_weight": "1e-1", "rank_by": "probability"}}
    )
    method = build_method(config)
    assert method is not None
    assert method.target_weight == 0.1


@pytest.mark.parametrize("source", SOURCES)
def test_settings_of_a_data_source_are_its_own(source):
    parameters = inspect.signature(SOURCES[source].open).parameters
    declared = {n: p.default for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    shared = {*DataSettings.model_fields, "path"}
    fields = DATA_SETTINGS[source].model_fields
    assert {n: f.default for n, f in fields.items() if n not in shared} == declared
    assert ("path" in fields) is ("path" in parameters)


def test_source_of_the_data_is_found_by_their_path(tmp_path):
    assert resolve({}).data.source == "glyphs100"
    (tmp_path / "train").mkdir()
    assert resolve({"data": {"path": str(tmp_path)}}).data.source == "folder"
    (tmp_path / "train-images-idx3-ubyte").touch()
    config = resolve({"data": {"path": str(tmp_path), "padding": 1}})
    assert (config.data.source, config.data.padding) == ("idx", 1)


def test_data_of_another_source_replace_those_of_a_base():
    base = {"data": {"source": "cifar100", "mean": [0.5, 0.5, 0.5]}, "epochs": 3}
    over = {"data": {"source": "noise", "num_train": 9, "mean": None}}
    assert merged(base, over) == {"data": {"source": "noise", "num_train": 9}, "epochs": 3}
    assert merged(base, {"data": {"path": "x"}})["data"].keys() == {"source", "mean", "path"}


def test_every_setting_has_a_description():
    def walk(model, path=""):
        for name, field in model.model_fields.items():
            inner = field.annotation
            if inspect.isclass(inner) and hasattr(inner, "model_fields"):
                walk(inner, f"{path}{name}.")
            elif name not in ("kind", "method"):
                assert field.description, path + name

    for model in (Config, *DATA_SETTINGS.values()):
        walk(model)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 3}, "unknown setting 'epoch': expected epochs"),
        ({"optimizer": {"lrr": 3}}, "unknown setting 'optimizer.lrr': expected lr"),
        (
            {"further_methods": [{"kind": "nkd", "weights": 1.0}]},
            "unknown setting 'further_methods.0.weights': expected weight",
        ),
        (
            {"method": {"kind": "uskd", "weak_wieght": 1}},
            "unknown setting 'method.weak_wieght': expected weak_weight",
        ),
        ({"epochs": 0}, "epochs: Input should be greater than or equal to 1, got 0"),
        ({"epochs": "many"}, "epochs: .*valid integer.* got 'many'"),
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr: .*finite number"),
        ({"method": "uksd"}, "no method 'uksd': expected one of none, .*; near: uskd"),
        (
            {"method": {"kind": "uskd", "target_weight": -1}},
            "method: target_weight must be finite, 0 or more, got -1",
        ),
        (
            {"method": {"kind": "zipf_ls", "rank_from": "dice"}},
            "method.rank_from: .*'votes' or 'logits', got 'dice'",
        ),
        ({"method": {"target_weight": 1}}, "method.kind: Field required"),
        ({"method": "nkd"}, "method 'nkd' reads from a teacher: give teacher.name"),
        ({"teacher": {"mean": [0.5]}}, "teacher.mean and teacher.std go together"),
        ({"batch_size": 10, "grad_accum_steps": 4}, "batch_size 10 must be a multiple of grad_acc"),
        ({"schedule": {"name": "multistep"}}, "schedule multistep takes one or more numbers"),
        ({"schedule": {"name": "step", "decay_epochs": [1, 2]}}, "schedule step takes one number"),
        (
            {"data": {"source": "noise", "num_trian": 3}},
            "unknown setting 'data.num_trian': expected num_train",
        ),
        (
            {"data": {"source": "noise", "rotation": 3.0}},
            "unknown setting 'data.rotation': expected source, .*, num_train, num_test",
        ),
        ({"data": {"source": "noice"}}, "data: unknown data source 'noice', expected .*'noise'"),
        ({"data": {"source": 3}}, "data.source: .*string, got 3"),
        ({"data": 5}, "data: .*got 5"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line_that_names_it(values, message):
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(values)
    assert "\n" not in str(caught.value)


ROW = {
    "method": {"kind": "ols", "weight": 0.3},
    "paper": {"table": "a table", "row": "a row", "top1": 80.0},
    "assumed": {"epochs": "nobody says"},
    "epochs": 3,
}


@pytest.mark.parametrize("method", ["uskd", {"kind": "zipf_ls"}, "none"], ids=str)
def test_another_method_over_a_papers_row_is_not_that_row(tmp_path, method):
    (tmp_path / "row.yaml").write_text(yaml.safe_dump(ROW))
    over = {"base": "row.yaml", "method": method}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(over))
    values = load_recipe(str(tmp_path / "mine.yaml"))
    assert values == {"method": method, "epochs": 3}


@pytest.mark.parametrize(
    "over",
    [{"epochs": 4}, {"method": {"kind": "ols"}}, {"method": "uskd", "paper": {"row": "another"}}],
    ids=str,
)
def test_a_row_stays_one_with_its_method_or_with_words_of_its_own(over):
    values = merged(ROW, over)
    assert values["paper"]["table"] == "a table"
    assert values["assumed"] == ROW["assumed"]


def test_another_method_by_option_is_not_the_row_either():
    assert with_chosen(ROW, "uskd") == {"method": {"kind": "uskd"}, "epochs": 3}
    assert with_chosen(ROW, "ols") == ROW


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must hold a mapping of settings, got list"),
        ("a: [", "is no YAML"),
        ("!!python/object/apply:os.system ['true']", "is no YAML"),
    ],
)
def test_recipe_file_that_is_no_recipe_is_refused(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(path))


def test_unknown_recipe_lists_near_ones():
    with pytest.raises(ConfigError, match=r"no recipe 'glyphs100/uskdd'.*near: glyphs100/uskd"):
        load_recipe("glyphs100/uskdd")


def test_description_of_a_method_names_what_it_reads():
    text = describe_method("uskd")
    assert "weak_logits" in text
    assert "weak_weight = 0.005" in text
