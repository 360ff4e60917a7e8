"""Weight files and run folders that nobody should have."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import torch
from hypothesis import event, given
from hypothesis import strategies as st
from safetensors.torch import load_file

from shared.fuzzing import assert_finite, case, check_refusal, command, fuzz, mutated, texts, values
from shared.tiny_runs import saved, train_arguments
from softlabels.io.weights import load_weights
from softlabels.models import build_model
from softlabels.report import write_report

# --- weight files


def with_header(content: bytes, change: dict[str, object]) -> bytes:
    """A safetensors file with other entries in its header."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    for name, entry in change.items():
        if isinstance(entry, dict) and isinstance(header.get(name), dict):
            header[name] |= entry
        else:
            header[name] = entry
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


sizes = st.one_of(st.integers(-2, 9), st.sampled_from([2**31, 2**63 - 1, 2**64, 10**30]))
tensor_entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F64", "F16", "BF16", "I64", "BOOL", "F8_E5M2", "X", 3]),
        "shape": st.lists(sizes, max_size=5),
        "data_offsets": st.lists(sizes, max_size=3),
    },
)


@st.composite
def weight_files(draw, path: Path) -> tuple[str, bytes]:
    """The name and the content of a file that is nearly a student's."""
    student, state = path.read_bytes(), load_file(path)
    kind = draw(st.sampled_from(["bytes", "header", "record", "numbers", "torch", "legacy", "any"]))
    (length,) = struct.unpack("<Q", student[:8])
    header = json.loads(student[8 : 8 + length])
    names = st.sampled_from(sorted(state))
    if kind == "bytes":
        return "student.safetensors", draw(mutated(student))
    if kind == "header":
        entries = st.dictionaries(st.one_of(names, texts), st.one_of(tensor_entries, values))
        change = draw(entries.filter(bool))
        return "student.safetensors", with_header(student, change)
    if kind == "record":
        record = json.loads(header["__metadata__"]["softlabels"])
        known = (*record, "settings", "crop_fraction", "interpolation", "class_names", "x")
        record |= draw(st.dictionaries(st.sampled_from(sorted(known)), values, min_size=1))
        text = json.dumps(record)
        return "student.safetensors", with_header(student, {"__metadata__": {"softlabels": text}})
    changed = {name: value.clone() for name, value in state.items()}
    name = draw(names)
    odd = st.sampled_from([0.0, 1e30, -3e38, 1e-40, float("nan"), float("inf")])
    numbers = st.sampled_from(sorted(n for n in state if state[n].is_floating_point()))
    for _ in range(draw(st.integers(1, 3))):
        changed[draw(numbers)].fill_(draw(odd))
    if kind == "numbers":
        return "student.pt", saved({"state_dict": changed})
    if kind in ("torch", "legacy"):
        path = Path(tempfile.mkdtemp(prefix="fuzz-")) / "a.pt"
        torch.save(changed, path, _use_new_zipfile_serialization=kind == "torch")
        content = path.read_bytes()
        shutil.rmtree(path.parent)
        return "student.pt", draw(mutated(content, 3))
    odd_entry = draw(
        st.sampled_from([None, 3, "x", [1], {"a": torch.zeros(1)}, torch.zeros(2, 2, 2),
                         torch.zeros(0), torch.eye(3).to_sparse(), torch.zeros(1).to(torch.int8)])
    )  # fmt: skip
    return "student.pt", saved({**changed, draw(st.one_of(st.just(name), texts)): odd_entry})


@fuzz("weight files", cost=2)
@given(data=st.data(), use=st.sampled_from(["predict", "eval", "student", "teacher"]))
def test_weight_files(trained, pictures, data, use):
    name, content = data.draw(weight_files(trained / "student.safetensors"))
    with case("weight files"), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        model = build_model("resnet8", num_classes=2)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        try:
            load_weights(model, path)
        except ValueError as error:
            check_refusal(error)
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        else:
            event("loaded")
            assert_finite(model.state_dict())
        if use == "predict":
            outcome = command(["predict", str(path), str(pictures / "val"), "--format", "json"])
            for line in outcome.output.splitlines() if outcome.status == 0 else ():
                shares = [share["probability"] for share in json.loads(line)["classes"]]
                assert all(0 <= share <= 1 for share in shares), shares
        elif use == "eval":
            outcome = command(["eval", str(path), "--path", str(pictures), "--format", "json"])
            assert outcome.status == 2 or "NaN" not in outcome.output
        else:
            output = Path(folder) / "run"
            more = [f"--{use}.weights", str(path)]
            if use == "teacher":
                more += ["--teacher.name", "timm:resnet8", "--method.kind", "nkd"]
            command(train_arguments(pictures, output, *more), statuses=(0, 1, 2))
            for stored in output.glob("*.safetensors"):
                assert_finite(load_file(stored))


# --- run folders


JSON_FILES = ("summary.json", "gallery.json", "environment.json", "analysis.json")
LINE_FILES = ("metrics.jsonl", "timings.jsonl")
FILES = (*JSON_FILES, *LINE_FILES, "config.yaml")


def odd_content(draw: st.DrawFn, path: Path) -> bytes:
    """What may stand in a run's file in place of its content."""
    content = path.read_bytes()
    kind = draw(st.sampled_from(["bytes", "value", "value", "value", "nothing", "deep"]))
    if kind == "nothing":
        return b""
    if kind == "deep":
        return b'{"label": ' + b"[" * draw(st.sampled_from([50, 2000, 100_000]))
    if kind == "bytes":
        return draw(mutated(content))
    if path.name in LINE_FILES:
        line = draw(st.dictionaries(st.sampled_from(["epoch", "step", "eval/top1", "train/task",
                                                     "images_per_second"]), values))  # fmt: skip
        return content + json.dumps(line).encode() + b"\n"
    if path.name == "config.yaml":
        lines = content.decode().splitlines()
        at = draw(st.integers(0, len(lines)))
        key = draw(st.sampled_from(["epochs", "data", "student", "x"]))
        new = f"{key}: {json.dumps(draw(values))}"
        return "\n".join([*lines[:at], new, *lines[at + 1 :]]).encode("utf-8", "replace")
    whole = json.loads(content)
    target = whole
    if path.name == "gallery.json" and draw(st.booleans()):
        target = whole["images"][0]
    elif path.name == "summary.json" and draw(st.booleans()):
        target = whole[draw(st.sampled_from(["final", "best"]))]
    key = draw(st.one_of(st.sampled_from(sorted(target)), texts))
    target[key] = draw(values)
    return json.dumps(whole).encode()


class Elements(HTMLParser):
    """Names and attributes of all elements of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))

    handle_startendtag = handle_starttag


def check_page(path: Path) -> None:
    """A page that runs nothing, fetches nothing, and is whole."""
    source = path.read_text(encoding="utf-8")
    assert source.rstrip().endswith("</html>")
    for tag, attributes in Elements(source).found:
        assert tag not in ("script", "iframe", "object", "embed", "form", "link", "base")
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("src") or "data:image/png;base64,").startswith(
            "data:image/png;base64,"
        )
        assert "href" not in attributes or (attributes["href"] or "").startswith("#")


@fuzz("run folders")
@given(data=st.data(), use=st.sampled_from(["report", "eval", "train"]))
def test_run_folders(trained, pictures, data, use):
    changes = {
        name: odd_content(data.draw, trained / name)
        for name in data.draw(st.lists(st.sampled_from(FILES), min_size=1, max_size=2, unique=True))
    }
    with case("run folders"), tempfile.TemporaryDirectory() as folder:
        run = Path(shutil.copytree(trained, Path(folder) / "run"))
        for name, content in changes.items():
            (run / name).write_bytes(content)
        if use == "eval":
            command(["eval", str(run)])
        elif use == "train":
            command(train_arguments(pictures, run))
            assert_finite(load_file(run / "student.safetensors"))
        else:
            try:
                check_page(write_report([run], Path(folder) / "report.html", title="a"))
            except ValueError as error:
                check_refusal(error, *changes)
        assert {path.name for path in Path(folder).iterdir()} <= {"run", "report.html"}
