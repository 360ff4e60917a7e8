"""What goes wrong while images are read: counted, named, bounded, and never another batch."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from softlabels.data.sources.folder import FolderSource

RANDOM = {"image_size": 16, "augmentation": "crop_flip", "in_memory": False}


def batches_of(source: FolderSource, **where) -> list:
    where = {"seed": 0, "epoch": 0, "batch_size": 4, "device": "cpu", **where}
    return list(source.train_batches(**where))


@pytest.fixture
def copied(image_folder, tmp_path) -> Path:
    return Path(shutil.copytree(image_folder, tmp_path / "copy"))


def children() -> set[int]:
    """Processes of this one."""
    text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return {int(number) for number in text.split()}


def assert_equal(ours: list, theirs: list) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.images, b.images)


def read_with_deaths(source: FolderSource, deaths: set[int], number: int = signal.SIGKILL) -> list:
    """Read an epoch, sending a signal to all workers after some of its batches."""
    others = children()
    batches = []
    steps = source.train_batches(seed=0, epoch=0, batch_size=4, device="cpu")
    for step, batch in enumerate(steps):
        batches.append(batch)
        if step in deaths:
            for process in children() - others:
                os.kill(process, number)
    return batches


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_that_die_are_replaced_and_no_batch_changes(image_folder, workers):
    expected = batches_of(FolderSource(image_folder, workers=0, **RANDOM), batch_size=4)
    source = FolderSource(image_folder, workers=workers, **RANDOM)
    with pytest.warns(UserWarning, match=r"a worker that reads images died.* time 1 of at most 3"):
        ours = read_with_deaths(source, {0})
    assert_equal(ours, expected)
    assert_equal(batches_of(source), expected)  # the next epoch has workers again
    source.close()


@pytest.mark.filterwarnings("error")
def test_ctrl_c_is_left_to_the_reader(image_folder):
    expected = batches_of(FolderSource(image_folder, workers=0, **RANDOM))
    source = FolderSource(image_folder, workers=2, **RANDOM)
    # From the second batch on: then both workers have delivered one, and so are set up.
    assert_equal(read_with_deaths(source, {1, 2, 3}, signal.SIGINT), expected)
    source.close()


def test_workers_are_in_no_group_that_a_launcher_signals(image_folder):
    source = FolderSource(image_folder, workers=2, **RANDOM)
    before = children()
    batches = source.train_batches(seed=0, epoch=0, batch_size=4, device="cpu")
    next(batches), next(batches)  # then both workers have delivered one, and so are set up
    workers = children() - before
    assert len(workers) == 2
    assert os.getpgrp() not in {os.getpgid(worker) for worker in workers}
    source.close()


def test_an_error_in_a_worker_is_no_death(image_folder):
    class Broken:
        def __call__(self, image, *key):
            raise RuntimeError("a transform of somebody's own")

    source = FolderSource(image_folder, workers=1, **RANDOM)
    source._reader._views._transforms["train"] = Broken()
    with pytest.raises(RuntimeError, match="somebody's own"):
        batches_of(source)
    source.close()


def test_workers_that_die_too_often_are_an_error(image_folder):
    source = FolderSource(image_folder, workers=1, max_worker_restarts=0, **RANDOM)
    with pytest.raises(ChildProcessError, match=r"died 1 times, max_worker_restarts is 0"):
        read_with_deaths(source, {0})


def test_a_reader_that_stops_early_leaves_no_loader_behind(image_folder):
    source = FolderSource(image_folder, workers=1, **RANDOM)
    expected = batches_of(FolderSource(image_folder, workers=0, **RANDOM))
    before = children()
    for _ in range(5):
        for _ in source.train_batches(seed=0, epoch=0, batch_size=4, device="cpu"):
            break
    assert len(children() - before) == 1
    assert_equal(batches_of(source), expected)
    source.close()


def test_a_file_that_vanishes_is_an_unreadable_image(copied):
    strict = FolderSource(copied, workers=0, **RANDOM)
    lenient = FolderSource(copied, workers=0, bad_images="skip", **RANDOM)
    gone = copied / "train" / "bee" / "3.png"
    gone.unlink()
    with pytest.raises(ValueError, match=rf"cannot read the image {gone} \(FileNotFoundError"):
        batches_of(strict)
    with pytest.warns(UserWarning, match="skipped the unreadable image"):
        batches_of(lenient)
    assert list(lenient.skipped) == [str(gone)]
    assert "FileNotFoundError" in lenient.skipped[str(gone)]


@pytest.mark.parametrize("workers", [0, 1])
def test_more_bad_images_than_allowed_stop_the_reading(copied, workers):
    source = FolderSource(copied, workers=workers, bad_images="skip", max_bad_images=4, **RANDOM)
    shutil.rmtree(copied / "train")  # the disk is gone
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(ValueError, match=r"5 images cannot be read, max_bad_images is 4"),
    ):
        batches_of(source)
    assert len(source.skipped) == 5
    source.close()


def test_an_image_that_stands_in_for_a_bad_one_is_seen_as_itself(copied):
    """A view belongs to the image and the draw alone: what is stored for it stays true."""
    good = FolderSource(copied, workers=0, **RANDOM)
    (views,) = good.train_views(draw=(0, 0), batch_size=100, device="cpu")
    (copied / "train" / "ant" / "2.png").write_bytes(b"nothing")
    source = FolderSource(copied, workers=0, bad_images="skip", **RANDOM)
    with pytest.warns(UserWarning, match="skipped"):
        batches = batches_of(source)
    for batch in batches:
        assert torch.equal(batch.images, views.images[batch.index])
        assert torch.equal(batch.draw, torch.zeros(4, dtype=torch.int64))
    assert 2 not in torch.cat([batch.index for batch in batches])


def test_views_leave_bad_images_out_and_follow_their_draw(copied):
    (copied / "train" / "ant" / "2.png").write_bytes(b"nothing")
    source = FolderSource(copied, workers=0, bad_images="skip", **RANDOM)
    with pytest.warns(UserWarning, match="skipped"):
        first = list(source.train_views(draw=(7, 1), batch_size=5, start=1, stop=9, device="cpu"))
    assert torch.cat([batch.index for batch in first]).tolist() == [1, 3, 4, 5, 6, 7, 8]
    assert set(torch.cat([batch.draw for batch in first]).tolist()) == {1}
    again = source.train_batches(seed=3, epoch=9, draw=(7, 1), batch_size=22, device="cpu")
    (batch,) = again
    views = {int(i): x for part in first for i, x in zip(part.index, part.images, strict=True)}
    pairs = zip(batch.index.tolist(), batch.images, strict=True)
    same = [torch.equal(views[index], image) for index, image in pairs if index in views]
    assert len(same) >= 6
    assert all(same)


def test_fingerprints_follow_files_and_settings(copied, tmp_path):
    first = FolderSource(copied, workers=0, **RANDOM).fingerprints()
    assert FolderSource(copied, workers=2, **RANDOM).fingerprints() == first
    moved = shutil.copytree(copied, tmp_path / "elsewhere")
    assert FolderSource(moved, workers=0, **RANDOM).fingerprints() == first
    other = FolderSource(copied, image_size=16, augmentation="none").fingerprints()
    assert other["data"] == first["data"]
    assert other["augmentation"] != first["augmentation"]
    with (copied / "train" / "ant" / "1.png").open("ab") as file:
        file.write(b"more")
    assert FolderSource(copied, workers=0, **RANDOM).fingerprints()["data"] != first["data"]
