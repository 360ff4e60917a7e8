"""Students given away: files that others load, checked, with a card that says what they are."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from torch import Tensor, nn

import softlabels
from shared.small_networks import SmallCNN
from softlabels.data import DataInfo
from softlabels.data.in_memory import InMemorySource, Split
from softlabels.export.export import export_run
from softlabels.export.predict import load_student
from softlabels.io.weights import save_weights
from softlabels.models import FileRecord, build_model, model_metadata

NUM_CLASSES = 7
HOSTILE = (
    "bars|columns | x",
    "`code` ``` fence",
    "</details><script>alert(1)</script>",
    "line\n\n# Heading\n---\n- item",
    "[link](https://example.org) ![picture](x) https://example.org",
    "*bold* _it_ ~~gone~~ $x$ &lt; \\ {{ 7 * 7 }} {% raw %}",
)


def student_file(
    folder: Path, name: str, size: int, channels: int = 3, settings: dict | None = None
) -> Path:
    """A student with random weights, as a run writes it."""
    settings = settings or {}
    torch.manual_seed(0)
    model = build_model(
        name, num_classes=NUM_CLASSES, in_channels=channels, image_size=size, settings=settings
    )
    record = FileRecord(
        model=name,
        num_classes=NUM_CLASSES,
        in_channels=channels,
        image_size=(size, size),
        settings=settings,
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        class_names=tuple("abcdefg"),
        crop_fraction=0.875,
        interpolation="bicubic",
    )
    save_weights(model, folder / "student.safetensors", metadata=model_metadata(record))
    return folder / "student.safetensors"


def images_for(file: Path, count: int) -> Tensor:
    _, record = load_student(file)
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, record.in_channels, *record.image_size, generator=generator)


def answers(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)


def code_blocks(card: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)


def text_and_tags(card: str) -> tuple[str, list[str], list[str]]:
    """What a reader of a card sees, its headings, and its HTML."""
    body = card.split("\n---\n", 1)[1]
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body)
    headings, html, words = [], [], []
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type == "html_block":
            html += re.findall(r"<[^>]*>", token.content)
        if token.type != "inline":
            continue
        for child in token.children or []:
            assert child.type in ("text", "code_inline", "text_special", "softbreak"), child
        text = "".join(child.content for child in token.children or [])
        words.append(text)
        if before is not None and before.type == "heading_open":
            headings.append(text)
    return "\n".join(words), headings, html


@pytest.fixture
def plain(tmp_path) -> Path:
    """A student's file without a run around it."""
    return student_file(tmp_path, "timm:resnet8", 32)


def noise(count: int) -> Split:
    """Images of nothing, of six classes."""
    pixels = np.random.default_rng(count).integers(0, 256, (count, 16, 16), dtype=np.uint8)
    return Split.from_arrays(pixels, np.arange(count) % 6)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A short run whose names do their worst."""
    info = DataInfo("patterns", HOSTILE, 1, (16, 16), (0.5,), (0.35,))
    result = softlabels.train(
        InMemorySource(noise(48), noise(24), info),
        "timm:resnet8_glyphs",
        "kd",
        {"name": build_model("timm:resnet8", num_classes=6, in_channels=1), "check": "off"},
        output=tmp_path_factory.mktemp("runs") / "run",
        epochs=3,
        batch_size=16,
        gallery=0,
        report=False,
        assumed={"epochs": "``` nobody | says\n\n# it", "seed": "a guess"},
        paper={"table": "A paper, table 1", "row": "a | b", "top1": 78.5},
        progress=False,
    )
    return result.folder


# Files that load


@pytest.mark.parametrize(
    ("name", "size", "channels", "settings", "blocks"),
    [
        ("timm:resnet8", 16, 1, {}, 2),
        ("timm:vit_mini_patch4_32", 32, 1, {}, 2),
        ("timm:vit_mini_patch4_32", 16, 3, {"drop_rate": 0.5}, 2),
        ("timm:resnet10t", 32, 3, {"act_layer": "silu"}, 2),
        ("torchvision:mobilenet_v2", 32, 3, {"width_mult": 0.25}, 2),
        ("torchvision:shufflenet_v2_x0_5", 32, 1, {}, 1),
        pytest.param("torchvision:vit_b_16", 32, 3, {"dropout": 0.1}, 2, marks=pytest.mark.slow),
    ],
)
def test_the_cards_code_loads_the_network(
    tmp_path, monkeypatch, name, size, channels, settings, blocks
):
    file = student_file(tmp_path, name, size, channels, settings)
    exported = export_run(file)

    assert exported.file == tmp_path / "export" / "safetensors" / "model.safetensors"
    assert exported.largest_difference == 0
    images = images_for(file, 3)
    expected = answers(load_student(file)[0], images)
    monkeypatch.chdir(exported.file.parent)
    found = code_blocks(exported.card)
    assert len(found) == blocks
    for block in found:
        space: dict = {}
        exec(block, space)
        assert torch.equal(answers(space["model"], images), expected)


@pytest.mark.parametrize(
    ("name", "size", "channels"),
    [
        ("timm:resnet8", 16, 1),
        pytest.param("timm:vit_mini_patch4_32", 32, 3, marks=pytest.mark.slow),
        pytest.param("torchvision:shufflenet_v2_x1_0", 64, 3, marks=pytest.mark.slow),
        pytest.param("torchvision:mobilenet_v2", 64, 3, marks=pytest.mark.slow),
        pytest.param("torchvision:swin_t", 64, 3, marks=pytest.mark.slow),
        pytest.param("timm:deit_tiny_patch16_224", 224, 3, marks=pytest.mark.slow),
        pytest.param("timm:convnext_tiny", 64, 3, marks=pytest.mark.slow),
    ],
)
def test_an_onnx_file_answers_as_the_network_does(tmp_path, monkeypatch, name, size, channels):
    file = student_file(tmp_path, name, size, channels)
    exported = export_run(file, format="onnx", output=tmp_path / "given" / "away.onnx")

    monkeypatch.chdir(exported.file.parent)
    assert sorted(path.name for path in Path().iterdir()) == ["MODEL_CARD.md", "away.onnx"]
    (block,) = code_blocks(exported.card)
    space: dict = {}
    exec(block, space)
    assert space["logits"].shape == (2, NUM_CLASSES)
    assert space["class_names"] == [*"abcdefg"]
    assert space["record"]["crop_fraction"] == 0.875
    assert space["record"]["mean"] == [0.5] * channels
    network = load_student(file)[0]
    for count in (1, 4):
        images = images_for(file, count)
        (logits,) = space["session"].run(None, {"images": images.numpy()})
        expected = answers(network, images)
        difference = (torch.from_numpy(logits) - expected).abs().max()
        assert difference < 1e-4 * expected.abs().max()
    assert 0 <= exported.largest_difference < 1e-4
    content = exported.file.read_bytes()
    assert b".py" not in content, "the file tells of paths on this machine"
    assert str(tmp_path).encode() not in content


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 16 * 16, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1))


class Unlike(OneLayer):
    """Gives other answers once it is exported."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return logits + 0.001 if torch.compiler.is_exporting() else logits


class Tied(OneLayer):
    """Its first two classes, nearly equal, change places once it is exported."""

    def forward(self, images: Tensor) -> Tensor:
        logits = 0 * super().forward(images) + torch.tensor([1.0, 1.00015, 0, 0, 0])
        shift = 0.9e-4 if torch.compiler.is_exporting() else 0.0
        return logits + shift * torch.tensor([1.0, -1, 0, 0, 0])


class Undecided(OneLayer):
    """Its way depends on what the images hold, which a graph's does not."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images if images.sum() > 0 else -images)


class OfTwo(OneLayer):
    """Takes as many images as it pleases, until it is exported."""

    def forward(self, images: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            return self.linear(images.reshape(2, -1))
        return super().forward(images)


def file_of(network: nn.Module, folder: Path, name: str, image_size: int | None = 16) -> Path:
    size = None if image_size is None else (image_size, image_size)
    record = FileRecord(model=name, num_classes=5, in_channels=3, image_size=size)
    save_weights(network, folder / "student.safetensors", metadata=model_metadata(record))
    return folder / "student.safetensors"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Unlike, "logits differ by up to 0.001, expected at most .*; nothing was written"),
        (Tied, "prefers other classes than the trained network"),
        (Undecided, "the network cannot be written as ONNX: Could not guard on data"),
        (OfTwo, "onnxruntime cannot run the exported file on 5 images"),
    ],
)
def test_what_onnx_does_not_hold_is_refused_and_leaves_nothing(tmp_path, capfd, kind, message):
    network = kind()
    file = file_of(network, tmp_path, "object:OneLayer")
    with pytest.raises(ValueError, match=message) as refused:
        export_run(file, format="onnx", network=network)

    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["student.safetensors"]
    assert capfd.readouterr() == ("", "")


FORGETFUL = """
import torch
from torch import nn

class Forgetful(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.linear = nn.Linear(3 * 16 * 16, num_classes)
        self.scale = torch.rand(())  # which its state does not hold

    def forward(self, images):
        return self.scale * self.linear(images.flatten(1))
"""


def test_a_network_that_its_file_does_not_restore_is_refused(tmp_path, monkeypatch):
    (tmp_path / "forgetful_code.py").write_text(FORGETFUL)
    monkeypatch.syspath_prepend(tmp_path)
    name = "forgetful_code:Forgetful"
    file = file_of(build_model(name, num_classes=5), tmp_path, name)
    with pytest.raises(ValueError, match="answers otherwise than the trained network"):
        export_run(file, network=name, output=tmp_path / "made" / "here")
    assert not (tmp_path / "made").exists()


# Networks of the user's own


def test_code_of_ones_own_gives_weights_alone_and_says_so(tmp_path):
    file = file_of(SmallCNN(5), tmp_path, "object:SmallCNN")
    exported = export_run(file, output=tmp_path / "weights.safetensors")

    assert exported.largest_difference is None
    assert exported.file.read_bytes() == file.read_bytes()
    text = exported.card.read_text()
    assert "built by code of its own, `object:SmallCNN`, which is not part of it" in text
    assert "The network was not run" in text
    assert code_blocks(exported.card) == []
    with pytest.raises(ValueError, match="code of its own, and ONNX needs the network: name it"):
        export_run(file, format="onnx")


def test_code_of_ones_own_is_checked_where_it_is_given(tmp_path, monkeypatch):
    trained, other = SmallCNN(5), SmallCNN(5)
    before = [p.clone() for p in other.parameters()]
    file = file_of(trained, tmp_path, "shared.small_networks:SmallCNN")
    by_object = export_run(file, network=other, output=tmp_path / "a")
    by_name = export_run(file, network="shared.small_networks:SmallCNN", output=tmp_path / "b")

    assert by_object.largest_difference == by_name.largest_difference == 0
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))
    monkeypatch.chdir(by_name.file.parent)
    (block,) = code_blocks(by_name.card)
    space: dict = {}
    exec(block, space)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(answers(space["model"], images), answers(trained.eval(), images))


def test_a_file_of_another_network_is_refused(tmp_path):
    file = file_of(SmallCNN(5), tmp_path, "object:SmallCNN")
    with pytest.raises(ValueError, match="does not fit SmallCNN: other shapes"):
        export_run(file, network=SmallCNN(6))


# Cards


def test_names_that_do_their_worst_change_nothing_but_themselves(finished):
    card = export_run(finished, overwrite=True).card.read_text()
    words, headings, html = text_and_tags(card)

    assert headings == [
        "resnet8_glyphs on patterns",
        "Use",
        "Results",
        "Data",
        "Training",
        "Assumed",
        "Environment",
        "License",
    ]
    assert set(html) == {"<details>", "<summary>", "</summary>", "</details>"}
    shown = (" ".join(name.split()) for name in HOSTILE)
    assert "; ".join(f"{number}: {name}" for number, name in enumerate(shown)) in words
    assert "``` nobody | says # it" in words
    fences = [t for t in MarkdownIt().parse(card) if t.type == "fence" and t.info == "yaml"]
    (fence,) = fences
    assert yaml.safe_load(fence.content)["assumed"]["epochs"] == "``` nobody | says\n\n# it"


def test_settings_that_do_their_worst_stay_in_their_block(finished, tmp_path):
    shutil.copy(finished / "student.safetensors", tmp_path)
    values = yaml.safe_load((finished / "config.yaml").read_text())
    values["output"] = "a\n\n```\n\n</details>\n\n# b"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    _, headings, html = text_and_tags(export_run(tmp_path).card.read_text())

    assert "b" not in headings
    assert html.count("</details>") == html.count("<details>")


def test_the_card_tells_what_is_known_of_the_run(finished):
    summary = json.loads((finished / "summary.json").read_text())
    card = export_run(finished, weights="best", license="cc-by-4.0", overwrite=True).card
    words, _, _ = text_and_tags(card.read_text())

    assert card.parent.name == "safetensors-best"
    for place, epoch in (("final", "the last epoch, 3"), ("best", "the best epoch, ")):
        values = [f"{summary[place][k]:.{d}f}" for k, d in (("top1", 2), ("nll", 4), ("ece", 2))]
        row = words[words.index(epoch) :]
        assert all(value in row.split("\n", 8)[:8] for value in values)
    for text in (
        "holds the weights of the epoch with the best test top-1",
        "24 test images. Seed 0, one run: nothing is known of the spread over seeds",
        "chosen by these same test images",
        "The recipe is for A paper, table 1, a | b, published top-1 78.5 %, last epoch.",
        "timm:resnet8_glyphs with 19,678 parameters",
        "method\nkd\nepochs\n3\nbatch size\n16\n",
        "teacher\nobject:SmallResNet",
        "seed\na guess",
        f"torch\n{torch.__version__.partition('+')[0]}",
        "These weights: cc-by-4.0.",
        "The data: unknown",
        "The teacher's weights: unknown",
        "(0.5) and (0.35), for pixels in 0 to 1",
    ):
        assert text in words, text
    data = ModelCard.load(card).data
    assert data.license == "cc-by-4.0"
    assert {"image-classification", "kd", "timm"} <= {*data.tags}
    assert (data.datasets, data.metrics) == (["patterns"], ["accuracy"])
    assert data.eval_results[0].metric_value == pytest.approx(summary["best"]["top1"])


def test_no_licence_and_no_result_is_made_up(plain):
    card = export_run(plain).card
    words, _, _ = text_and_tags(card.read_text())

    assert ModelCard.load(card).data.license == "unknown"
    assert ModelCard.load(card).data.eval_results is None
    assert "These weights: unknown: choose one." in words
    assert "None are known: the weights came without their run's folder." in words
    assert "None" not in words.replace("None are known", "")


def test_a_run_that_has_not_ended_says_so(finished, tmp_path):
    for name in ("config.yaml", "student.safetensors"):
        shutil.copy(finished / name, tmp_path)
    words, _, _ = text_and_tags(export_run(tmp_path).card.read_text())
    assert "None are known: the run had not ended." in words
    assert "batch size\n16" in words


def test_a_measured_teacher_and_the_embedded_data_are_told(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"data": "glyphs100", "teacher": {"name": "timm:resnet8", "top1": 81.437}}
    (run / "summary.json").write_text(json.dumps(summary))
    words, _, _ = text_and_tags(export_run(run).card.read_text())
    assert "teacher's test top-1\n81.44 %" in words
    assert "306 are under the SIL Open Font License 1.1 and 13 under the Apache" in words


def test_a_students_file_is_known_as_its_runs(finished, tmp_path):
    exported = export_run(finished / "student_best.safetensors", output=tmp_path)
    text = exported.card.read_text()
    assert "the epoch with the best test top-1" in text
    assert "24 test images" in text


# What goes wrong


def fails(error: type[Exception], message: str, *arguments, **settings) -> None:
    with pytest.raises(error, match=message) as raised:
        export_run(*arguments, **settings)
    assert "\n" not in str(raised.value)


def test_older_files_stay_unless_they_may_go(plain):
    exported = export_run(plain)
    exported.card.write_text("mine")
    fails(FileExistsError, r"model.safetensors exists: .*--overwrite", plain)
    exported.file.unlink()
    fails(FileExistsError, r"MODEL_CARD.md exists: .*--overwrite", plain)
    assert exported.card.read_text() == "mine"
    export_run(plain, overwrite=True)
    assert exported.card.read_text() != "mine"


def test_wrong_settings_are_named(plain, tmp_path):
    fails(
        ValueError, "format must be one of safetensors, onnx, got 'pickle'", plain, format="pickle"
    )
    fails(ValueError, "weights must be one of last, best, got 'first'", plain, weights="first")
    fails(ValueError, "opset goes with the format onnx", plain, opset=20)
    fails(ValueError, "of the format safetensors must end with", plain, output=tmp_path / "a.onnx")
    fails(ValueError, "best weights are those of a run's folder", plain, weights="best")


def test_an_operator_set_that_nobody_has_is_refused(tmp_path, capfd):
    network = OneLayer()
    file = file_of(network, tmp_path, "object:OneLayer")
    message = "torch cannot write opset 99 for this network"
    fails(ValueError, message, file, format="onnx", opset=99, network=network)
    assert capfd.readouterr() == ("", "")


def test_missing_packages_are_named(plain, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    message = r"the format onnx needs onnxscript: pip install 'softlabels\[onnx\]'"
    fails(ValueError, message, plain, format="onnx")


def test_no_student_no_export(tmp_path, plain):
    empty = tmp_path / "empty"
    empty.mkdir()
    fails(FileNotFoundError, "empty has no student.safetensors: expected", empty)
    fails(FileNotFoundError, "has no student_best.safetensors", empty, weights="best")
    fails(FileNotFoundError, "no such weights file", tmp_path / "nowhere")
    fails(ValueError, "not say the size", file_of(SmallCNN(5), empty, "object:SmallCNN", None))
    plain.write_bytes(plain.read_bytes()[:500])
    fails(ValueError, "not a readable safetensors file", plain)


def test_an_output_that_cannot_be_written_leaves_nothing(plain, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    fails(OSError, "Not a directory", plain, output=plain / "below" / "a_file")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_network_whose_answers_are_not_finite_is_refused(tmp_path):
    network = OneLayer()
    network.linear.weight.data.fill_(3e38)
    file = file_of(network, tmp_path, "object:OneLayer")
    fails(ValueError, "answers to random images are not finite", file, network=network)


def test_a_damaged_summary_is_named(finished, tmp_path):
    shutil.copy(finished / "student.safetensors", tmp_path)
    (tmp_path / "summary.json").write_text("{")
    fails(ValueError, r"summary.json: Invalid JSON", tmp_path)
