"""The header of a weights file may come from a stranger."""

from __future__ import annotations

import json
import resource
import struct

import pytest
import torch
from safetensors.torch import save_file

from softlabels.io.weights import count_stored, save_weights
from softlabels.models import FileRecord, build_model, model_metadata
from softlabels.models.record import METADATA_KEY, SizeLimit, find_record, read_record


@pytest.fixture
def file(tmp_path):
    """Returns a function that writes a small student whose header says what it is told."""

    def write(**changes) -> str:
        facts = FileRecord(model="resnet8", num_classes=3, in_channels=1, image_size=(8, 8))
        record = json.loads(model_metadata(facts)[METADATA_KEY])
        record = {key: v for key, v in {**record, **changes}.items() if v is not ...}
        path = tmp_path / "student.safetensors"
        network = build_model("resnet8", num_classes=3, in_channels=1)
        save_weights(network, path, metadata={METADATA_KEY: json.dumps(record)})
        return f"file:{path}"

    return write


def build(name: str):
    return build_model(name, num_classes=None, in_channels=1)


def test_an_honest_file_is_built(file):
    assert build(file()).num_classes == 3


def test_a_run_folder_stands_for_its_student(file, tmp_path):
    file()
    assert build(f"file:{tmp_path}").num_classes == 3
    assert read_record(tmp_path) == read_record(tmp_path / "student.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty.student\.safetensors"):
        build(f"file:{tmp_path}/empty")


def test_a_record_is_found_where_there_is_one(file, tmp_path):
    file()
    record = find_record(tmp_path / "student.safetensors")
    assert record is not None
    assert record.image_size == (8, 8)
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    assert find_record(tmp_path / "plain.safetensors") is None
    torch.save({"a": torch.zeros(1)}, tmp_path / "plain.pth")
    assert find_record(tmp_path / "plain.pth") is None
    with pytest.raises(FileNotFoundError):
        find_record(tmp_path / "gone.safetensors")
    file(num_classes=0)
    with pytest.raises(ValueError, match="num_classes"):
        find_record(tmp_path / "student.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 0}, "num_classes"),
        ({"num_classes": 10**9}, "num_classes"),
        ({"num_classes": "3 or more"}, "num_classes"),
        ({"in_channels": -1}, "in_channels"),
        ({"image_size": [8, 10**9]}, "image_size.1"),
        ({"mean": [float("nan")]}, "mean.0"),
        ({"std": [0.0]}, "std.0"),
        ({"std": [1.0, 1.0, 1.0]}, "std has 3 entries, expected 1"),
        ({"class_names": ["a", "b"]}, "class_names has 2 entries, expected 3"),
        ({"crop_fraction": 0}, "crop_fraction"),
        ({"interpolation": "dream"}, "interpolation"),
        ({"model": ...}, "model"),
        ({"settings": "deep"}, "settings"),
    ],
)
def test_a_record_that_cannot_be_is_named(file, changes, message):
    with pytest.raises(ValueError, match=f"damaged model record.*{message}") as caught:
        build(file(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "model",
    ["os:system", "somewhere:make", "file:/etc/passwd", "timm:hf-hub:a/b", "torchvision:", "../x"],
)
def test_a_record_names_no_code_and_no_file(file, model):
    with pytest.raises(ValueError, match=r"code of its own|unknown|expected a model name"):
        build(file(model=model))


@pytest.mark.parametrize(
    "settings",
    [
        {"checkpoint_path": "/etc/passwd"},
        {"pretrained_cfg": {"url": "http://somewhere"}},
        {"pretrained_cfg_overlay": {"file": "/etc/passwd"}},
        {"cache_dir": "/tmp"},
    ],
)
def test_a_record_gives_timm_nothing_to_read_or_fetch(file, settings):
    with pytest.raises(ValueError, match="is not taken: weights come from a file of their own"):
        build(file(settings=settings))
    with pytest.raises(ValueError, match="is not taken: weights come from a file of their own"):
        build_model("resnet8", num_classes=3, settings=settings)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_classes": 1_000_000},
        {"model": "timm:vit_giant_patch14_224"},
        {"model": "timm:vit_tiny_patch16_224", "settings": {"embed_dim": 3 * 10**6}},
        {"model": "timm:vit_tiny_patch16_224", "settings": {"depth": 10**7}},
        {"model": "timm:vit_tiny_patch16_224", "image_size": [16_384, 16_384]},
        {"settings": {"width": 10**9}},
    ],
)
def test_a_small_file_cannot_ask_for_a_large_network(file, changes):
    name = file(**changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"larger than the weights|does not take|does not fit"):
        build(name)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 1_500_000  # kB; the network would take many times as much


def test_the_limit_changes_no_draw():
    torch.manual_seed(0)
    expected = build_model("resnet8", num_classes=3)
    torch.manual_seed(0)
    with SizeLimit(0):
        limited = build_model("resnet8", num_classes=3)
    assert all(map(torch.equal, expected.parameters(), limited.parameters()))


def test_numbers_are_counted_without_reading_them(tmp_path):
    save_file(
        {"a": torch.zeros(3, 4), "b": torch.zeros(()), "c": torch.zeros(0, 9)}, tmp_path / "a"
    )
    assert count_stored(tmp_path / "a") == 13


def header(entries: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], *offsets: int, kind: str = "F32") -> dict[str, object]:
    return {"dtype": kind, "shape": shape, "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "content",
    [
        header({}, length=2**64 - 1),
        header({}, length=2**63),
        header({}, length=100 << 20),
        header({"a": entry([2**32, 2**32, 2], 0, 8)}, bytes(8)),
        header({"a": entry([2**63, 2], 0, 0)}),
        header({"a": entry([2**40], 0, 2**42)}, bytes(64)),
        header({"a": entry([2], 8, 0)}, bytes(8)),
        header({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, bytes(8)),
        header({"a": entry([-2], 0, 8)}, bytes(8)),
        header({"a": entry([2], 0, 8, kind="F8_WHATEVER")}, bytes(8)),
        header(b'{"a":' * 10_000),
        header(b'{"a": {"dtype": "F32", "shape": [' + b"[" * 100_000),
        header([1]),
        header(b"\xff" * 100),
    ],
)
def test_headers_that_lie_are_refused_without_taking_memory(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (count_stored, lambda p: build(f"file:{p}")):
        with pytest.raises(ValueError, match=r"a\.safetensors is not a readable safetensors file"):
            read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000


def test_a_name_that_stands_twice_gives_no_mixture(tmp_path):
    path = tmp_path / "a.safetensors"
    first, second = (json.dumps(entry([1], *span)).encode() for span in ((0, 4), (4, 8)))
    path.write_bytes(header(b'{"a": ' + first + b', "a": ' + second + b"}", bytes(8)))
    with pytest.raises(ValueError, match=r"a\.safetensors is not a readable"):
        count_stored(path)
