"""Recipes from strangers: bounded in size, depth and time, and never anything but plain data."""

from __future__ import annotations

import os
import time

import pytest

from softlabels.training.config import ConfigError, resolve
from softlabels.training.recipes import MOST_BYTES, load_recipe, merged

LAUGHS = (
    "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{n}: &{n} [{', '.join([f'*{b}'] * 9)}]\n" for b, n in zip("abcdefgh", "bcdefghi"))  # noqa: B905
)


def refused(path, content: str | bytes) -> str:
    """The error for a recipe of this content: one line, soon, of bounded length."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    since = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(path))
    assert time.monotonic() - since < 60  # minutes without the bounds
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 600
    return message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LAUGHS, "aliases"),
        ("a: &a {b: *a}", "aliases"),
        ("a: " + "[" * 100_000, "nested deeper than 20"),
        ("{a: " * 100_000, "nested deeper than 20"),
        ("- " * 100_000, "nested deeper than 20"),
        ("? " * 100_000, "nested deeper than 20"),
        ("a: [" + "1," * 400_000 + "1]", "more than 100000 values"),
        ("a: 1" + ":1" * 400_000, "a number of 800001 characters"),
        ("a: 0x" + "f" * 1000, "a number of 1002 characters"),
        (b"a: \xff\xfe\xfa", "not in UTF-8"),
        (b"a: \x00", "special characters"),
        ("a: !!timestamp x", "no YAML"),
        ("a: !!timestamp 2020-13-45", "no YAML"),
        ("a: !!int ''", "does not fit its tag"),
        ("a: !!float '.'", "does not fit its tag"),
        ("a: !!bool perhaps", "does not fit its tag"),
        ("a: !!binary x", "no YAML"),
        ("a: !!set {b}", "no YAML"),
        ("a: !!python/name:os.system", "no YAML"),
        ("a: !!python/object/new:os.system [true]", "no YAML"),
        ("1: 2", "name must be text, got '1'"),
        ("true: 2", "name must be text, got 'true'"),
        ("~: 2", "name must be text, got '~'"),
        ("[a]: 2", "name must be text, got a sequence"),
        ("epochs: 1\nseed: 3\nepochs: 2", "'epochs' stands here twice"),
        ("!<" + "t" * 500_000 + "> a: 1", "no YAML"),
        ('"' + "k" * 500_000, "no YAML"),
    ],
)
def test_what_is_no_plain_data_is_refused(tmp_path, content, message):
    assert message in refused(tmp_path / "recipe.yaml", content)


def test_largest_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    text = "student: {name: " + "x" * (MOST_BYTES - 17) + "}"
    assert len(text) == MOST_BYTES
    path.write_text(text)
    assert len(load_recipe(str(path))["student"]["name"]) == MOST_BYTES - 17
    assert "larger than 1048576 bytes" in refused(path, text + " ")


def test_named_pipe_is_not_waited_for(tmp_path):
    path = tmp_path / "recipe.yaml"
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="is no file"):
        load_recipe(str(path))


@pytest.mark.parametrize("name", ["folder", "/dev/null", "/dev/zero", "broken_link"])
def test_what_is_no_file_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken_link").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"is no file|cannot be read"):
        load_recipe(name)


def test_texts_that_look_like_dates_and_merges_are_texts(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbfoutput: 2020-01-01\nassumed: {<<: '=', '=': =}\nepochs: 3\n")
    values = load_recipe(str(path))
    assert values == {"output": "2020-01-01", "assumed": {"<<": "=", "=": "="}, "epochs": 3}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 1e300}, "epochs"),
        ({"epochs": 10**40}, "epochs"),
        ({"epochs": float("nan")}, "epochs"),
        ({"batch_size": 10**40}, "batch_size"),
        ({"batch_size": 10**12}, "batch_size"),
        ({"seed": 2**63}, "seed"),
        ({"seed": -1}, "seed"),
        ({"threads": 10**6}, "threads"),
        ({"gallery": 10**9}, "gallery"),
        ({"process_timeout": 1e300}, "process_timeout"),
        ({"teacher": {"num_classes": 10**9}}, "teacher.num_classes"),
        ({"teacher": {"class_map": [0, 10**30]}}, "teacher.class_map.1"),
        ({"schedule": {"name": "step", "decay_epochs": [1e300]}}, "schedule.decay_epochs"),
        ({"optimizer": {"lr": float("inf")}}, "optimizer.lr"),
        ({"x" * 10**6: 1}, "unknown setting"),
        ({"optimizer": {"y" * 10**6: 1}}, "unknown setting"),
        ({"method": "z" * 10**6}, "no method"),
        ({"method": {"kind": ["z" * 10**6]}}, "method.kind"),
        ({"student": {"name": ["n" * 10**6]}}, "student.name"),
        ({"taps": {"m" * 10**6: 1}}, "taps"),
    ],
)
def test_absurd_values_are_named_in_a_short_line(values, message):
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(values)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 700


def test_largest_seed():
    assert resolve({"seed": 2**63 - 1}).seed == 2**63 - 1


@pytest.mark.parametrize("part", ["student", "teacher"])
def test_settings_of_a_network_are_no_gigantic_whole_numbers(part):
    settings = {"depth": 2**31, "width": 4, "drop_rate": 0.1, "flag": True, "act_layer": "gelu"}
    values = getattr(resolve({part: {"settings": settings}}), part).settings
    assert values == settings
    assert [type(value) for value in values.values()] == [float, int, float, bool, str]


def test_no_and_off_are_words(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "precision: no\nteacher: {check: off}\noptimizer: {nesterov: yes}\ncompile: false"
    )
    config = resolve(load_recipe(str(path)))
    assert (config.precision, config.teacher.check) == ("no", "off")
    assert config.optimizer.nesterov is True
    assert config.compile is False


def test_a_recipe_lies_over_its_base(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "optimizer: {lr: 0.1, weight_decay: 0.2}\nmethod: {kind: nkd, temperature: 2}\nepochs: 3"
    )
    middle, top = tmp_path / "middle.yaml", tmp_path / "top.yaml"
    middle.write_text("base: base.yaml\nmethod: {temperature: 4}\noptimizer: {lr: 0.3}")
    top.write_text("base: middle.yaml\nmethod: {kind: uskd}\nepochs: null")
    assert load_recipe(str(middle)) == {
        "optimizer": {"lr": 0.3, "weight_decay": 0.2},
        "method": {"kind": "nkd", "temperature": 4},
        "epochs": 3,
    }
    assert load_recipe(str(top)) == {
        "optimizer": {"lr": 0.3, "weight_decay": 0.2},
        "method": {"kind": "uskd"},  # another kind has other settings
    }


def test_a_recipe_of_ones_own_can_be_based_on_one_of_the_package(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: table1/vgg13_vgg8_nkd\nepochs: 7")
    expected = merged(load_recipe("table1/vgg13_vgg8_nkd"), {"epochs": 7})
    assert load_recipe(str(path)) == expected


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("top.yaml", "recipes are based on each other: .*top.yaml -> .*top.yaml"),
        ("[a]", "must be the name of a recipe, got"),
        ("/etc/hostname", "neither one of the package's recipes nor a file in the same folder"),
        ("../top.yaml", "neither one of the package's"),
        ("table1/vgg", "neither .*near: table1/vgg"),
        ("nothing.yaml", "neither"),
    ],
)
def test_a_base_that_is_none_is_an_error(tmp_path, base, message):
    folder = tmp_path / "folder"
    folder.mkdir()
    for place in (tmp_path, folder):
        (place / "top.yaml").write_text(f"base: {base}")
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(folder / "top.yaml"))
