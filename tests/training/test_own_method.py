"""A method of the user's own: by name in the settings, or as an object; and what is recorded."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from torch import Tensor

import softlabels
from softlabels.cli import main
from softlabels.export.export import export_run
from softlabels.inputs import Logits
from softlabels.losses import KDLoss, Method, WeightedSum
from softlabels.training import trainer
from softlabels.training.config import (
    Config,
    ConfigError,
    build_method,
    dump,
    load_recipe,
    parse,
    resolve,
)
from softlabels.training.settings import settings_of_method

FAST = {
    "student": "timm:resnet8", "epochs": 1, "batch_size": 16, "gallery": 0, "analysis": False,
    "report": False, "progress": False,
    "data": {"source": "noise", "num_train": 32, "num_test": 8, "num_classes": 4, "image_size": 8},
}  # fmt: skip

OWN_METHODS = '''
import torch
from torch import nn
from softlabels.inputs import Logits
from softlabels.losses import Method


class Flat(Method):
    """Pulls the logits to zero.

    Args:
        power: Exponent of their size.
    """

    power: float = 2.0

    inputs = {"logits": Logits()}

    def terms(self, logits):
        return {"size": logits.abs().pow(self.power).mean(1)}


class Odd(Flat):
    """Has a setting that no command line can hold."""

    parts: torch.Generator | None = None


class Reads(Method):
    """Reads what is no input."""

    inputs = {"logits": "logits"}

    def terms(self, logits):
        return {"size": logits.mean(1)}


class Network(nn.Module):
    pass
'''


class Steep(Method):
    """As no settings build it: its argument is none of its fields."""

    inputs: ClassVar = {"logits": Logits()}

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def terms(self, logits: Tensor) -> dict[str, Tensor]:
        return {"size": self.factor * logits.square().mean(1)}


@pytest.fixture
def own(tmp_path, monkeypatch) -> str:
    """A module of the user's in the working folder; its name."""
    name = "own_" + "".join(c for c in tmp_path.name if c.isalnum())
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(OWN_METHODS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def train(output: Path, method, **settings):
    return softlabels.train(method=method, output=output, **{**FAST, **settings})


def recorded(folder: Path) -> dict:
    return yaml.safe_load((folder / "config.yaml").read_text())["method"]


def test_a_method_is_built_from_its_name_and_settings(own):
    config = resolve({"method": {"kind": f"{own}:Flat", "power": 3}})
    method = build_method(config)
    assert type(method).__name__ == config.label == "Flat"
    assert method.power == 3.0
    assert resolve(yaml.safe_load(dump(config))) == config


def test_its_settings_are_options(own, capsys):
    given = ["--method.kind", f"{own}:Flat", "--method.power", "1.5"]
    assert main(["config", "show", *given]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["method"] == {"kind": f"{own}:Flat", "power": 1.5}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "{own}:Flat", "pover": 1}, "unknown setting 'method.pover': expected power"),
        ({"kind": "{own}:Flat", "power": "x"}, "method.power: .*valid number"),
        ({"kind": "{own}:Odd"}, "Odd: its settings must be numbers, texts"),
        ({"kind": "{own}:Reads"}, r"Reads.inputs must map names to inputs"),
        ({"kind": "{own}:Network"}, "Network' is no method"),
        ({"kind": "{own}:Flatt"}, "unknown function or class .*'Flatt'; near: Flat"),
        ({"kind": "nowhere_at_all:Flat"}, "nowhere_at_all"),
        ({"kind": "os:system"}, "of Python's own library"),
    ],
)
def test_what_is_no_method_is_refused(own, values, message):
    values = {key: v.format(own=own) if isinstance(v, str) else v for key, v in values.items()}
    with pytest.raises(ConfigError, match=message) as caught:
        resolve({"method": values})
    assert "\n" not in str(caught.value)


def test_an_object_is_recorded_by_its_class_and_settings(own, tmp_path):
    from importlib import import_module

    flat = import_module(own).Flat
    result = train(tmp_path / "run", flat(power=3.0), method_weight=0.5)
    assert recorded(result.folder) == {"kind": f"{own}:Flat", "power": 3.0}

    # Its record repeats it, as it does for any method.
    values = {**load_recipe(str(result.folder / "config.yaml")), "output": str(tmp_path / "again")}
    again = trainer.run(resolve(values))
    for name, value in result.student.state_dict().items():
        assert torch.equal(value, again.student.state_dict()[name]), name


def test_an_object_of_the_package_is_recorded_as_if_it_had_been_named():
    assert (
        settings_of_method(KDLoss(temperature=2.0))
        == parse({"method": {"kind": "kd", "temperature": 2.0}}).method
    )


def test_the_card_names_class_and_module(tmp_path):
    result = train(tmp_path / "run", Steep(1.0))
    card = export_run(result.folder).card.read_text()
    assert "Steep (object:" in card
    assert f"kind: object:{__name__}:Steep" in card
    assert "factor: 1.0" in card


def test_it_stands_beside_others(own):
    config = resolve(
        {
            "method": "zipf_ls",
            "further_methods": [{"kind": f"{own}:Flat", "settings": {"power": 3}}],
        }
    )
    method = build_method(config)
    assert [type(part).__name__ for part in method.methods.values()] == ["ZipfLSLoss", "Flat"]
    assert config.label == "zipf_ls+Flat"


def test_another_object_does_not_go_on_in_the_folder(own, tmp_path):
    train(tmp_path / "run", Steep(1.0))
    train(tmp_path / "run", Steep(1.0))  # the same: it is complete
    with pytest.raises(ValueError, match=r"method\.factor: 1\.0 there, 2\.0 here"):
        train(tmp_path / "run", Steep(2.0))
    with pytest.raises(ValueError, match=r"method\.kind: object:.*:Steep there, none here"):
        train(tmp_path / "run", None)


def test_what_no_settings_build_is_not_repeated_without_it(tmp_path):
    result = train(tmp_path / "run", Steep(1.0))
    assert recorded(result.folder) == {
        "kind": f"object:{__name__}:Steep",
        "factor": 1.0,
        "ignore_index": None,
        "reduction": "mean",
    }
    record = load_recipe(str(result.folder / "config.yaml"))
    with pytest.raises(ConfigError, match=r"the run's method was an object, .*:Steep.*again"):
        resolve(record)
    assert main(["train", str(result.folder / "config.yaml")]) == 2
    assert resolve(record, Steep(1.0)) == parse(record)


def test_a_sum_of_methods_is_recorded_with_its_parts():
    kinds = {"kd": KDLoss(temperature=3.0), "steep": Steep(0.5)}
    record = settings_of_method(WeightedSum(kinds, weights={"kd": 2.0})).model_dump()
    text = str(record)
    assert record["kind"].startswith("object:")
    assert "'temperature': 3.0" in text
    assert "'factor': 0.5" in text


def test_methods_beside_an_object_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="give a WeightedSum"):
        train(tmp_path / "run", Steep(1.0), further_methods=[{"kind": "zipf_ls"}])


def test_record_is_readable_where_the_class_is_not():
    config = parse({"method": {"kind": "not_here:Flat", "power": 2.0}})
    assert isinstance(config, Config)
    assert config.method.model_dump() == {"kind": "not_here:Flat", "power": 2.0}
    assert config.label == "Flat"
