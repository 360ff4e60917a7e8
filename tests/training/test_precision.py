"""`precision: auto` and `channels_last: auto`: decided by the network, recorded, kept."""

from __future__ import annotations

import signal

import pytest
import torch
import yaml
from timm import create_model
from torch import nn

import softlabels
from shared.patterns import FAST
from shared.signalling import Signalling
from softlabels.experiments.comparison import read_comparison
from softlabels.models.zoo.resnet_small import PointwiseConv2d
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
        ("resnet8_glyphs", ("bf16", True)),
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
    def student() -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(source.info.in_channels, 8, 3), nn.Conv2d(8, 8, 1, stride=2)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, source.info.num_classes)),
        )

    ours = {**FAST, "epochs": 1, "method": "kd", "teacher": FAST["student"]}
    with pytest.raises(ValueError, match=r"channels_last must be false or auto .* student.1, "):
        softlabels.train(
            source, output=tmp_path / "run", **{**ours, "student": student()}, channels_last=True
        )
    assert not (tmp_path / "run").exists()
    run = softlabels.train(source, output=tmp_path / "auto", **{**ours, "student": student()})
    assert settings_of(run.folder)[1] is False


def test_a_pointwise_convolution_of_ours_is_torchs_in_any_memory_format():
    torch.manual_seed(0)
    ours = PointwiseConv2d(8, 12, 1, stride=2, bias=False).double()
    plain = nn.Conv2d(8, 12, 1, stride=2, bias=False).double()
    plain.load_state_dict(ours.state_dict())
    images = torch.randn(4, 8, 9, 10, dtype=torch.float64)
    expected = plain(images)
    (wanted,) = torch.autograd.grad(expected.square().sum(), plain.weight)
    for form in (torch.contiguous_format, torch.channels_last):
        found = ours(images.contiguous(memory_format=form))
        (gradient,) = torch.autograd.grad(found.square().sum(), ours.weight)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)


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
