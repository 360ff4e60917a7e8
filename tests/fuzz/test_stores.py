"""Teacher caches and WebDataset shards that nobody should have."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

from shared.fuzzing import case, check_refusal, fuzz, mutated, texts, values
from shared.tiny_runs import train_arguments
from softlabels import TeacherCache
from softlabels.cli import main
from softlabels.data.sources.webdataset import ShardSource


@pytest.fixture(scope="module")
def cache(pictures, trained, tmp_path_factory) -> Path:
    """A cache of two draws of the tiny pictures, by the tiny student."""
    path = tmp_path_factory.mktemp("caches") / "whole"
    run = train_arguments(pictures, path, "--teacher.name", f"file:{trained}/student.safetensors")
    assert main(["cache-teacher", *run[1:], "--draws", "2", "--top", "2"]) == 0
    return path


MANIFEST = "manifest.json"
NAMES = (
    "version", "num_images", "num_classes", "num_draws", "top", "seed", "images_per_file",
    "precision", "teacher", "fingerprints", "error",
)  # fmt: skip


@fuzz("teacher caches", cost=5)
@given(data=st.data())
def test_damaged_teacher_caches_are_refused_or_give_finite_answers(cache, data):
    with case("teacher caches"), tempfile.TemporaryDirectory() as name:
        copied = Path(shutil.copytree(cache, Path(name) / "cache"))
        files = sorted(
            path for path in copied.rglob("*") if path.suffix in (".json", ".safetensors")
        )
        for _ in range(data.draw(st.integers(1, 2))):
            what = data.draw(st.sampled_from(["bytes", "manifest", "swap", "remove"]))
            file = data.draw(st.sampled_from(files))
            if what == "bytes" and file.is_file():
                file.write_bytes(data.draw(mutated(file.read_bytes())))
            elif what == "swap" and file.is_file():
                other = data.draw(st.sampled_from(files))
                if other.is_file():
                    file.write_bytes(other.read_bytes())
            elif what == "remove":
                file.unlink(missing_ok=True)
            elif what == "manifest":
                content = json.loads((cache / MANIFEST).read_text())
                content[data.draw(st.sampled_from(NAMES))] = data.draw(values)
                text = json.dumps(content).encode("utf-8", "surrogatepass")
                (copied / MANIFEST).write_bytes(text)
        try:
            found = TeacherCache(copied)
            index = torch.arange(min(found.num_images, 8))
            for draw in range(min(found.num_draws, 3)):
                logits = found.logits(index, torch.full_like(index, draw), "cpu")
                assert logits.shape == (len(index), found.num_classes)
                assert bool(logits.isfinite().all())
            event("read")
        except (ValueError, OSError) as error:
            check_refusal(error)


@pytest.fixture(scope="module")
def shards(pictures, tmp_path_factory) -> Path:
    """The tiny pictures as shards."""
    root = tmp_path_factory.mktemp("shards")
    for split in ("train", "val"):
        for label, name in enumerate(("dark", "light")):
            with tarfile.open(root / f"{split}-{label}.tar", "w") as tar:
                for file in sorted((pictures / split / name).iterdir()):
                    add(tar, f"{name}{file.stem}.png", file.read_bytes())
                    add(tar, f"{name}{file.stem}.cls", str(label).encode())
    return root


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def hostile_shard(draw: st.DrawFn, whole: bytes) -> bytes:
    """A tar file with members that nobody expects."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=draw(st.sampled_from([0, 1, 2]))) as tar:
        for _ in range(draw(st.integers(0, 4))):
            stem = draw(texts).replace("\0", "0")
            stem = stem.encode("utf-8", "replace").decode()[:60]
            ending = draw(st.sampled_from(["png", "jpg", "cls", "json", "PNG", "png.cls", ""]))
            member = tarfile.TarInfo(f"{stem}.{ending}")
            member.type = draw(
                st.sampled_from([tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE,
                                 tarfile.FIFOTYPE, tarfile.CHRTYPE])
            )  # fmt: skip
            member.linkname = draw(st.sampled_from(["", "/etc/passwd", "../../x", f"{stem}.png"]))
            content = draw(st.one_of(st.just(whole[:200]), st.just(b"1"), st.binary(max_size=40)))
            member.size = len(content) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@fuzz("WebDataset shards", cost=5)
@given(data=st.data())
def test_damaged_shards_are_refused_or_give_finite_images(shards, pictures, data):
    with case("WebDataset shards"), tempfile.TemporaryDirectory() as name:
        root = Path(shutil.copytree(shards, Path(name) / "shards"))
        for _ in range(data.draw(st.integers(1, 2))):
            what = data.draw(st.sampled_from(["bytes", "members", "index", "classes", "name"]))
            path = data.draw(st.sampled_from(sorted(root.glob("*.tar"))))
            if what == "bytes":
                path.write_bytes(data.draw(mutated(path.read_bytes())))
            elif what == "members":
                whole = (pictures / "train" / "dark" / "0.png").read_bytes()
                path.write_bytes(hostile_shard(data.draw, whole))
            elif what == "index":
                index = root / "softlabels-train.safetensors"
                content = data.draw(st.one_of(st.binary(max_size=80), st.just(b"\x08" + bytes(20))))
                index.write_bytes(content)
            elif what == "classes":
                lines = data.draw(st.lists(texts, max_size=4))
                text = "\n".join(lines).encode("utf-8", "surrogatepass")
                (root / "classnames.txt").write_bytes(text)
            else:
                path.rename(root / data.draw(st.sampled_from(["x.tar", "train.tar", "val.tar"])))
        before = {path.name for path in Path(name).iterdir()}
        skip = data.draw(st.sampled_from(["error", "skip"]))
        try:
            source = ShardSource(
                root, image_size=8, workers=0, augmentation="none", bad_images=skip
            )
            for batch in [
                *source.train_batches(seed=0, epoch=0, batch_size=2, device="cpu"),
                *source.test_batches(batch_size=2, device="cpu"),
            ]:
                assert bool(batch.images.isfinite().all())
                assert 0 <= int(batch.target.min()) <= int(batch.target.max())
                assert int(batch.target.max()) < source.info.num_classes
            event("read")
        except (ValueError, OSError) as error:
            check_refusal(error)
        assert {path.name for path in Path(name).iterdir()} == before  # no name became a path


def test_a_damaged_shard_is_one_line_of_the_program(shards, tmp_path, capsys):
    root = Path(shutil.copytree(shards, tmp_path / "shards"))
    path = root / "train-0.tar"
    path.write_bytes(path.read_bytes()[:700])
    assert main(train_arguments(root, tmp_path / "run")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "train-0.tar" in line
