"""WebDataset shards, written by the webdataset package or by hand."""

from __future__ import annotations

import io
import shutil
import tarfile
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from softlabels.data import open_source
from softlabels.data.sources.webdataset import ShardSource

SETTINGS = {"image_size": 16, "workers": 0, "augmentation": "none"}
SIZES = {"train": (7, 5, 8, 6, 4), "val": (5, 4)}  # images in each shard


def picture(value: int) -> np.ndarray:
    return np.full((16, 16, 3), value, dtype=np.uint8)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """30 training images, each of one gray level of its own, and 9 test images; 3 classes."""
    root = tmp_path_factory.mktemp("shards")
    level = 0
    for split, sizes in SIZES.items():
        for number, size in enumerate(sizes):
            path = str(root / f"tiny-{split}-{number:04d}.tar")
            with webdataset.TarWriter(path) as writer:
                for _ in range(size):
                    sample = {"png": picture(level), "cls": level % 3, "json": {"more": 1}}
                    writer.write({"__key__": f"sample{level:05d}", **sample})
                    level += 1
    (root / "classnames.txt").write_text("ant\nbee\ncow\n")
    return root


@pytest.fixture
def copied(shards, tmp_path) -> Path:
    ignored = shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(shards, tmp_path / "copy", ignore=ignored))


def levels(batches) -> list[list[int]]:
    """The gray levels of each batch, which name its images."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return [
        ((batch.images[:, :, 0, 0] * std + mean) * 255).mean(1).round().int().tolist()
        for batch in batches
    ]


def flat(batches: list[list[int]]) -> list[int]:
    return [*chain.from_iterable(batches)]


def epoch_of(source: ShardSource, epoch: int = 0, **where) -> list[list[int]]:
    where = {"seed": 0, "batch_size": 6, "device": "cpu", **where}
    return levels(source.train_batches(epoch=epoch, **where))


def test_facts_and_images_are_those_that_webdataset_reads(shards):
    source = open_source(path=str(shards), **SETTINGS)
    assert isinstance(source, ShardSource)
    assert source.info.class_names == ("ant", "bee", "cow")
    assert (source.num_train, source.num_test) == (30, 9)

    theirs = {}
    for path in sorted(shards.glob("*-train-*.tar")):
        for sample in webdataset.WebDataset(str(path), shardshuffle=False).decode("rgb8"):
            theirs[int(sample["png"][0, 0, 0])] = int(sample["cls"])
    (batch,) = source.train_views(draw=(0, 0), batch_size=30, device="cpu")
    ours = dict(zip(levels([batch])[0], batch.target.tolist(), strict=True))
    assert ours == theirs == {level: level % 3 for level in range(30)}
    assert sorted(flat(levels(source.test_batches(batch_size=4, device="cpu")))) == [*range(30, 39)]


@pytest.mark.parametrize("shuffle_shards", [1, 2, 16])
def test_an_epoch_reads_each_image_once(shards, shuffle_shards):
    source = ShardSource(shards, shuffle_shards=shuffle_shards, **SETTINGS)
    first, second = epoch_of(source), epoch_of(source, epoch=1)
    assert sorted(flat(first)) == sorted(flat(second)) == [*range(30)]
    assert first != second


def test_reading_stays_within_the_shards_of_a_block(shards):
    source = ShardSource(shards, shuffle_shards=2, **SETTINGS)
    bounds = np.cumsum((0, *SIZES["train"]))
    order = [int(np.searchsorted(bounds, level, "right")) for level in flat(epoch_of(source))]
    seen = list(dict.fromkeys(order))
    assert len(seen) == 5
    for shard in range(1, 6):
        last = len(order) - 1 - order[::-1].index(shard)
        within = set(order[order.index(shard) : last + 1])
        assert len(within) <= 2
    assert any(order[i] != order[i + 1] == order[i - 1] for i in range(1, 29))  # they are mixed


@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_read_what_one_does_and_a_later_start_goes_on(shards, workers):
    source = ShardSource(shards, **{**SETTINGS, "workers": workers}, shuffle_shards=2)
    whole = epoch_of(source)
    halves = [epoch_of(source, rank=rank, world_size=2) for rank in range(2)]
    for step, batch in enumerate(whole):
        assert sorted(batch) == sorted(halves[0][step] + halves[1][step])
    assert epoch_of(source, start_step=3) == whole[3:]
    source.close()


def test_the_index_is_made_once(copied, monkeypatch):
    first = ShardSource(copied, **SETTINGS)
    files = sorted(path.name for path in copied.glob("*.safetensors"))
    assert files == ["softlabels-test.safetensors", "softlabels-train.safetensors"]

    def fail(*arguments, **settings):
        raise AssertionError("the shards are read again")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", fail)
        assert epoch_of(ShardSource(copied, **SETTINGS)) == epoch_of(first)
        (copied / "tiny-train-0000.tar").touch()
        with pytest.raises(AssertionError, match="again"):
            ShardSource(copied, **SETTINGS)
    assert epoch_of(ShardSource(copied, **SETTINGS)) == epoch_of(first)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 100])
def test_a_damaged_index_is_made_again(copied, content):
    expected = epoch_of(ShardSource(copied, **SETTINGS))
    (copied / "softlabels-train.safetensors").write_bytes(content)
    assert epoch_of(ShardSource(copied, **SETTINGS)) == expected


def test_an_index_that_cannot_be_written_is_told(copied, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.warns(UserWarning, match=r"the index of the shards cannot be written .*`index`"):
        source = ShardSource(copied, index=str(tmp_path / "file" / "index"), **SETTINGS)
    assert source.num_train == sum(SIZES["train"])


def test_the_index_can_lie_elsewhere(copied, tmp_path):
    ShardSource(copied, index=str(tmp_path / "elsewhere"), **SETTINGS)
    assert not list(copied.glob("*.safetensors"))
    assert len(list((tmp_path / "elsewhere").iterdir())) == 2


def test_folders_for_training_and_testing(shards, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for path in shards.glob(f"*-{split}-*.tar"):
            shutil.copy(path, tmp_path / split / path.name.replace(split, "part"))
    source = open_source(path=str(tmp_path), **SETTINGS)
    assert (source.num_train, source.num_test) == (30, 9)
    assert source.info.class_names == ("0", "1", "2")


def add(path: Path, name: str, content: bytes) -> None:
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def png(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(value)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("lonely.png", png(), r"the sample '/lonely' has no \.cls"),
        ("sample00001.jpg", png(), "'/sample00001' has two images"),
        ("more.cls", b"seven", "'more.cls' must hold a class index as text, got 'seven'"),
        ("more.cls", b"-1", "must hold a class index"),
        ("more.cls", b"1" * 100, "must hold a class index"),
        ("more.cls", b"99999999", "must hold a class index"),
        ("more.cls", b"", "must hold a class index"),
    ],
)
def test_samples_that_do_not_fit_are_clear_errors(copied, name, content, message):
    add(copied / "tiny-train-0000.tar", name, content)
    with pytest.raises(ValueError, match=message):
        ShardSource(copied, **SETTINGS)


def test_folders_that_do_not_fit_are_clear_errors(copied, tmp_path):
    with pytest.raises(ValueError, match=r"does not exist; expected WebDataset shards"):
        ShardSource(tmp_path / "none", **SETTINGS)
    shutil.copy(copied / "tiny-train-0000.tar", copied / "other.tar")
    with pytest.raises(ValueError, match=r"other\.tar is neither for training nor for testing"):
        ShardSource(copied, **SETTINGS)
    (copied / "other.tar").unlink()
    (copied / "classnames.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match="names 2 classes, the shards have class index 2"):
        ShardSource(copied, **SETTINGS)
    for path in copied.glob("*-val-*"):
        path.unlink()
    with pytest.raises(ValueError, match="has no shards for testing"):
        ShardSource(copied, **SETTINGS)
    with pytest.raises(ValueError, match="shuffle_shards must be above 0, got 0"):
        ShardSource(copied, shuffle_shards=0, **SETTINGS)


def test_names_of_members_are_no_paths(copied, tmp_path):
    add(copied / "tiny-train-0000.tar", "../../../evil/x.png", png(200))
    add(copied / "tiny-train-0000.tar", "../../../evil/x.cls", b"1")
    before = {path for path in tmp_path.rglob("*") if "safetensors" not in path.name}
    source = ShardSource(copied, **SETTINGS)
    assert 200 in flat(epoch_of(source, batch_size=31))
    after = {path for path in tmp_path.rglob("*") if "safetensors" not in path.name}
    assert after == before


def test_a_shard_that_changes_under_a_run_is_a_bad_image(copied):
    source = ShardSource(copied, bad_images="skip", **SETTINGS)
    strict = ShardSource(copied, **SETTINGS)
    path = copied / "tiny-train-0002.tar"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.warns(UserWarning, match="tiny-train-0002.tar at byte"):
        read = flat(epoch_of(source))
    assert len(read) == 30  # each is replaced by a good one
    assert 1 <= len(source.skipped) <= 8
    path.unlink()
    with pytest.raises(ValueError, match=r"cannot read the image .*tiny-train-0002.tar at byte"):
        epoch_of(strict)


@given(st.data())
def test_shards_with_damaged_bytes_are_read_or_refused(shards, tmp_path_factory, data):
    root = tmp_path_factory.mktemp("damaged")
    for path in shards.glob("*.tar"):
        shutil.copy(path, root)
    path = root / "tiny-train-0001.tar"
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 20))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    message = ""
    try:
        source = ShardSource(root, **SETTINGS)
        for batch in source.train_views(draw=(0, 0), batch_size=8, device="cpu"):
            assert batch.images.isfinite().all()
    except ValueError as error:
        message = str(error)
    assert not message or "tiny-train-0001.tar" in message or "classes" in message


def test_fingerprints_follow_the_training_shards(copied):
    source = ShardSource(copied, **SETTINGS)
    first = source.fingerprints()
    assert ShardSource(copied, **{**SETTINGS, "workers": 1}).fingerprints() == first
    other = ShardSource(copied, **{**SETTINGS, "image_size": 8}).fingerprints()
    assert other["data"] == first["data"]
    assert other["augmentation"] != first["augmentation"]
    add(copied / "tiny-train-0000.tar", "new.png", png())
    add(copied / "tiny-train-0000.tar", "new.cls", b"1")
    assert ShardSource(copied, **SETTINGS).fingerprints()["data"] != first["data"]
