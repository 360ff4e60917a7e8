"""`precision: auto` and `channels_last: auto`: decided by the network, recorded, kept."""

from __future__ import annotations

import signal

import pytest
import torch
import yaml
from timm import create_model

import softlabels
from shared.patterns import FAST
from shared.signalling import Signalling
from softlabels.experiments.comparison import read_comparison
from softlabels.training.config import load_recipe, recipe_names, resolve
from softlabels.training.errors import Interrupted
from softlabels.training.precision import with_precision

DECIDED = ("precision", "channels_last")


@pytest.fixture
def fast_bf16(monkeypatch):
    """A CPU that multiplies bfloat16 fast."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})


@pytest.fixture
def no_bf16(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})


def settings_of(path):
    config = yaml.safe_load((path / "config.yaml").read_text())
    return tuple(config[name] for name in DECIDED)


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ("resnet8", ("bf16", True)),
        ("resnet8_glyphs", ("bf16", False)),
        ("resnet18", ("bf16", True)),
        ("regnetx_002", ("bf16", True)),  # grouped convolutions, but no depthwise ones
        ("mobilenetv3_small_100", ("no", True)),
        ("efficientnet_lite0", ("no", True)),
        ("vit_tiny_patch16_224", ("bf16", False)),
    ],
)
@pytest.mark.usefixtures("fast_bf16")
def test_what_is_left_open_follows_from_the_network(network, expected):
    config = with_precision(resolve({}), create_model(network), torch.device("cpu"))
    assert (config.precision, config.channels_last) == expected
    assert config.max_skipped_steps == 0


def test_channels_last_are_refused_where_they_would_damage_memory(source, tmp_path):
    with pytest.raises(ValueError, match=r"channels_last must be false or auto .*downsample"):
        softlabels.train(source, output=tmp_path / "run", **FAST, channels_last=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_bf16")
def test_bfloat16_is_for_processors_that_have_it():
    config = with_precision(resolve({}), create_model("resnet8"), torch.device("cpu"))
    assert (config.precision, config.channels_last) == ("no", True)


@pytest.mark.usefixtures("fast_bf16")
def test_what_is_set_stays():
    given = {"precision": "fp16", "channels_last": False, "max_skipped_steps": 7}
    network = create_model("resnet8")
    config = with_precision(resolve(given), network, torch.device("cpu"))
    assert config == resolve(given)
    scaled = with_precision(resolve({"precision": "fp16"}), network, torch.device("cpu"))
    assert scaled.max_skipped_steps == 50


@pytest.mark.usefixtures("fast_bf16")
def test_a_run_records_and_says_what_was_decided(source, tmp_path, capsys):
    result = softlabels.train(
        source,
        output=tmp_path / "run",
        **{**FAST, "epochs": 1, "progress": True, "student": "timm:resnet8"},
    )
    assert settings_of(result.folder) == ("bf16", True)
    assert "bfloat16, channels last" in capsys.readouterr().err
    assert all(p.dtype == torch.float32 for p in result.student.parameters())
    assert all(p.is_contiguous() for p in result.student.parameters())


def test_a_stopped_run_goes_on_as_it_was_begun(source, tmp_path, monkeypatch, fast_bf16):
    extra = {**FAST, "method": "uskd", "epochs": 2, "student": "timm:resnet8"}
    straight = softlabels.train(source, output=tmp_path / "straight", **extra)
    with pytest.raises(Interrupted):
        softlabels.train(Signalling(source, 3, signal.SIGTERM), output=tmp_path / "run", **extra)
    # The source is another object of the same data: its settings say so.
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("object:Signalling", "object:InMemorySource"))
    # As on a machine that decides otherwise.
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    resumed = softlabels.train(source, output=tmp_path / "run", **extra)
    assert settings_of(resumed.folder) == ("bf16", True)
    assert resumed.final == straight.final
    name = "student.safetensors"
    assert (resumed.folder / name).read_bytes() == (straight.folder / name).read_bytes()
    with pytest.raises(ValueError, match="precision: bf16 there, no here"):
        softlabels.train(source, output=tmp_path / "run", **extra, precision="no")


def test_recipes_of_published_tables_state_theirs():
    published = [n for n in recipe_names() if "paper" in load_recipe(n)]
    assert len(published) > 100
    for name in published:
        recipe = load_recipe(name)
        assert (recipe.get("precision"), recipe.get("channels_last")) == ("no", False), name


@pytest.mark.parametrize("name", ["few_fonts", "small_vit"])
def test_committed_comparisons_state_theirs(name):
    comparison = read_comparison(f"results/{name}/comparison.yaml")
    assert comparison is not None
    assert [comparison.values[setting] for setting in DECIDED] == ["no", False]
