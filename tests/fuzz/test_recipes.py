"""Recipes and options that nobody should write."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from shared.fuzzing import as_yaml, case, command, fuzz, mutated, scalars, texts, values
from softlabels.training.config import Config, recipe_names
from softlabels.training.settings import METHOD_SETTINGS

RECIPES = [(files("softlabels.recipes") / f"{name}.yaml").read_bytes() for name in recipe_names()]

PIECES = (
    "epochs", "method", "kind", "student", "name", "uskd", ": ", ":", "\n", "\n  ", "- ", "-", "? ",
    "[", "]", "{", "}", ",", "&a ", "*a", "!!int ", "!!python/name:os.system ", "!!timestamp ",
    "!!binary |\n ", "!!set ", "!!omap ", "!", "%YAML 1.2\n", "---\n", "...\n", "|\n  ", ">\n  ",
    "'", '"', "\\x", "#", "<<: ", "=", "~", "null", "yes", "1", "0o7", "0x", "1e", ".inf", ".nan",
    "1:30", "2020-13-45", "2020-01-01T00:00:00Z", "\t", "\r", "\ufeff", "\x85", "\u2028", "\0", "@",
    "`", "|", ">",
)  # fmt: skip

recipe_bytes = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.lists(st.sampled_from(PIECES), max_size=30).map(lambda parts: "".join(parts).encode()),
    st.sampled_from(RECIPES).flatmap(mutated),
    st.tuples(st.sampled_from(PIECES), st.integers(1, 3000)).map(
        lambda pair: (pair[0] * pair[1]).encode()
    ),
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("recipe") / "recipe.yaml"


def shown_again(recipe: Path, text: str) -> str:
    """The configuration that a shown configuration gives."""
    recipe.write_text(text, encoding="utf-8")
    return command(["config", "show", str(recipe)], statuses=(0,)).output


@fuzz("recipe text")
@given(content=recipe_bytes)
def test_recipe_text(recipe, content):
    with case("recipe text"):
        recipe.write_bytes(content)
        outcome = command(["config", "show", str(recipe)])
        if outcome.status == 0:
            assert shown_again(recipe, outcome.output) == outcome.output


def sections() -> dict[str, type[BaseModel]]:
    """The sections of a recipe, by name."""
    fields = Config.model_fields.items()
    return {name: type(field.default) for name, field in fields if name != "method"} | {
        f"method {kind}": model for kind, model in METHOD_SETTINGS.items()
    }


SECTIONS = {name: model for name, model in sections().items() if issubclass(model, BaseModel)}
PLAIN = [name for name in Config.model_fields if name not in SECTIONS and name != "method"]


def section(name: str) -> st.SearchStrategy[tuple[str, object]]:
    """A section with some of its own settings, and other things in it."""
    known = st.sampled_from(sorted(SECTIONS[name].model_fields))
    content = st.dictionaries(st.one_of(known, known, known, texts), values, max_size=4)
    key, _, kind = name.partition(" ")
    if kind:
        content = content.map(lambda given: {"kind": kind, **given})
    return content.map(lambda given: (key, given))


entries = st.one_of(
    *(section(name) for name in sorted(SECTIONS)),
    st.tuples(st.sampled_from(PLAIN), scalars),
    st.tuples(st.sampled_from(PLAIN), st.integers(0, 100)),
    st.tuples(st.one_of(st.sampled_from(["method", "data", "taps", "assumed"]), texts), values),
)
structures = st.lists(entries, min_size=1, max_size=4).map(dict)


@fuzz("recipe structure")
@given(content=structures)
def test_recipe_structure(recipe, content):
    with case("recipe structure"):
        recipe.write_text(as_yaml(content))
        outcome = command(["config", "show", str(recipe)])
        if outcome.status == 0:
            assert shown_again(recipe, outcome.output) == outcome.output


COMMANDS = ("train", "eval", "predict", "config", "methods", "demo", "cache-teacher", "trian", "")
OPTIONS = (
    "--help", "-h", "--version", "--", "-", "--epochs", "--seed", "--output", "--data.path",
    "--data.source", "--data.image-size", "--data.workers", "--method.kind", "--method.temperature",
    "--student.name", "--student.settings", "--student.weights", "--teacher.name", "--taps",
    "--teacher.weights", "--teacher.class-map", "--optimizer.lr", "--schedule.decay-epochs",
    "--schedule.name", "--batch-size", "--grad-accum-steps", "--compile", "--no-compile", "--top",
    "--format", "--kind", "--path", "--source", "--jobs", "--fonts", "--assumed", "--draws",
    "--method.kind=uskd", "--epochs=3", "--epochs=", "--seed=-1", "show", "glyphs100/uskd",
    "glyphs100/nkd", "uskd", "nkd", "json", "csv",
)  # fmt: skip

words = st.one_of(
    st.sampled_from(OPTIONS),
    st.sampled_from(OPTIONS),
    texts.filter(lambda text: "\0" not in text),  # no process is given such arguments
    scalars.map(str).filter(lambda text: "\0" not in text),
)


@fuzz("command-line options")
@given(name=st.sampled_from(COMMANDS), given_words=st.lists(words, max_size=8))
def test_command_line(tmp_path_factory, name, given_words):
    nowhere = "/no/such/folder"
    last = {  # nothing that fits is to be done
        "train": ["--data.path", nowhere],
        "cache-teacher": ["--data.path", nowhere],
        "eval": ["--path", nowhere],
        "demo": ["--epochs", "0"],
    }
    with case("command-line options"):
        command([name, *given_words, *last.get(name, [])], statuses=(0, 2))
