"""Images that are decoded once and augmented batch by batch in memory."""

from __future__ import annotations

import io
import shutil
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from rich.console import Console

from shared.data_files import (
    hugging_face_splits,
    write_images,
    write_shards,
    write_tiny_imagenet,
)
from softlabels.data import open_source
from softlabels.data.augment import RandomResizedCrop
from softlabels.data.sources.folder import FolderSource

PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1), "workers": 0}


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """Three classes of images of 20 x 20 pixels."""
    root = tmp_path_factory.mktemp("squares")
    for number, name in enumerate(("ant", "bee", "cow")):
        write_images(root / "train" / name, 6, seed=number, size=(20, 20))
        write_images(root / "val" / name, 3, seed=10 + number, size=(20, 20))
    return root


def of_test(source):
    return torch.cat([b.images for b in source.test_batches(batch_size=4, device="cpu")])


def views(source, draw=0):
    (batch,) = source.train_views(draw=(0, draw), batch_size=100, device="cpu")
    return batch


def said(source) -> str:
    console = Console(file=io.StringIO(), width=200)
    source.prepare(console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("kind", ["tiny_imagenet", "hf", "webdataset", "folder"])
@pytest.mark.parametrize("size", [8, 12])
def test_every_source_reads_from_memory_what_it_reads_from_files(tmp_path, squares, kind, size):
    if kind == "tiny_imagenet":
        path = write_tiny_imagenet(tmp_path / "tiny")
    elif kind == "webdataset":
        path = write_shards(tmp_path / "shards")
    elif kind == "hf":
        path = tmp_path / "hf"
        hugging_face_splits().save_to_disk(str(path))
    else:
        path = squares
    settings = {**PLAIN, "augmentation": "none", "image_size": size}
    memory, files = (
        open_source(kind, str(path), in_memory=where, **settings) for where in ("auto", False)
    )
    assert memory.found_settings["in_memory"] is True
    assert torch.allclose(of_test(memory), of_test(files), atol=1e-7)
    assert torch.allclose(views(memory).images, views(files).images, atol=1e-7)
    assert torch.equal(views(memory).target, views(files).target)


def test_crops_and_mirror_images_are_those_of_the_resized_image(squares):
    """Each is cut out of a black border of an eighth; the sum over epochs sees every place."""
    settings = {**PLAIN, "augmentation": "crop_flip", "image_size": 16}
    source = FolderSource(squares, **settings)
    still = views(FolderSource(squares, **{**settings, "augmentation": "none"})).images
    padded = torch.nn.functional.pad(still, [2] * 4)
    both = torch.stack((padded, padded.flip(3)))
    seen = set()
    for epoch in range(30):
        shown = views(source, epoch).images
        for number in range(len(shown)):
            places = [
                (side, top, left)
                for side in (0, 1)
                for top in range(5)
                for left in range(5)
                if torch.allclose(
                    both[side, number, :, top : top + 16, left : left + 16], shown[number]
                )
            ]
            assert places
            seen.update(places)
    assert len(seen) == 50


def files_of(seed: int, height: int, width: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [5, 16, 40])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_random_crop_is_resized_as_pillow_does(name, size, share):
    side = 16
    image = files_of(0, side, side)
    crop = RandomResizedCrop(size, name == "bicubic", (share, share), (1.0, 1.0), flip=False)
    images = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    (ours,) = crop(images, torch.tensor([3]), 1, 2)
    cut = round(side * share**0.5)
    pillow = {
        (left, top): image.crop((left, top, left + cut, top + cut)).resize(
            (size, size), getattr(Image.Resampling, name.upper())
        )
        for left in range(side - cut + 1)
        for top in range(side - cut + 1)
    }
    errors = [
        np.abs(np.asarray(theirs) / 255 - ours.permute(1, 2, 0).numpy()).max()
        for theirs in pillow.values()
    ]
    bound = 1.3 / 255  # Pillow rounds after each axis, and bicubic weights add up to more than 1
    assert min(errors) <= bound
    assert sum(error <= bound for error in errors) == 1


def test_areas_and_shapes_of_crops_are_torchvisions():
    """Over many draws: the mean area 0.54 of those that fit, and both ways of a mirror image."""
    ramp = torch.linspace(0, 1, 32).expand(1, 1, 32, 32)
    index = torch.arange(4000)
    shown = RandomResizedCrop(8)(ramp.expand(4000, 1, 32, 32), index, 0, 0)
    slope = shown[:, 0, 0, -1] - shown[:, 0, 0, 0]
    assert (slope > 0).float().mean() == pytest.approx(0.5, abs=0.03)
    width = slope.abs() * 8 / 7  # of the crop, as a share of the image's
    assert width.min() > 0.24
    assert width.max() <= 1.01
    torch.manual_seed(0)
    from torchvision.transforms import RandomResizedCrop as Theirs

    theirs = [Theirs.get_params(ramp[0], [0.08, 1.0], [3 / 4, 4 / 3])[3] / 32 for _ in range(4000)]
    assert width.mean().item() == pytest.approx(np.mean(theirs), abs=0.01)
    assert width.std().item() == pytest.approx(np.std(theirs), abs=0.01)


@pytest.mark.parametrize("augmentation", ["crop_flip", "random_resized_crop"])
def test_draws_belong_to_the_sample_and_the_epoch(squares, augmentation):
    source = FolderSource(squares, augmentation=augmentation, image_size=16, **PLAIN)
    settings = {"seed": 3, "epoch": 2, "batch_size": 6, "device": "cpu"}
    extras = ("second_view", "partner")
    whole = list(source.train_batches(**settings, extras=extras))
    halves = [
        list(source.train_batches(**settings, extras=extras, rank=rank, world_size=2))
        for rank in (0, 1)
    ]
    for batch, *parts in zip(whole, *halves, strict=True):
        rows = {
            int(i): image
            for part in parts
            for i, image in zip(part.index, part.images, strict=True)
        }
        for index, image in zip(batch.index, batch.images, strict=True):
            assert torch.equal(rows[int(index)], image)
        assert not torch.equal(batch.extras["second_view"], batch.images)
    again = list(FolderSource(squares, augmentation=augmentation, image_size=16, **PLAIN)
                 .train_batches(**settings, start_step=1))  # fmt: skip
    assert torch.equal(again[0].images, whole[1].images)
    other = next(iter(source.train_batches(**{**settings, "epoch": 3})))
    assert not torch.equal(other.images, whole[0].images)


def test_small_files_are_read_at_their_own_size(squares):
    source = FolderSource(squares, workers=0)
    assert "are decoded into memory at their own size, 20 pixels, with crop" in said(source)
    assert source.info.image_size == (20, 20)
    found = source.found_settings
    assert (found["image_size"], found["augmentation"]) == (20, "crop_flip")
    assert found["crop_fraction"] == 1.0
    assert said(source) == ""  # once


def test_large_files_are_read_at_224_pixels_by_workers(tmp_path):
    for part in ("train", "val"):
        write_images(tmp_path / part / "a", 2, size=(160, 200))
        write_images(tmp_path / part / "b", 2, size=(160, 200))
    source = FolderSource(tmp_path, workers=0)
    assert said(source) == ""
    found = source.found_settings
    assert (found["image_size"], found["augmentation"]) == (224, "random_resized_crop")
    assert found["in_memory"] is False


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"auto_augment": "rand-m9"}, "auto_augment is done to single images, got 'rand-m9'"),
        ({"random_erasing": 0.1}, "random_erasing is done to single images"),
        ({"lighting": 0.1}, "lighting is done to single images"),
    ],
)
def test_what_cannot_be_done_in_memory_is_told(squares, settings, message):
    assert not FolderSource(squares, **settings, **PLAIN).in_memory
    with pytest.raises(ValueError, match=f"in_memory must be false or auto: {message}"):
        FolderSource(squares, in_memory=True, **settings, **PLAIN)


def test_images_that_do_not_fit_are_read_from_files(squares, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=20_000))
    assert not FolderSource(squares, **PLAIN).in_memory
    with pytest.raises(ValueError, match=r"they take 0\.0 GiB, more than half of the 0\.0 that"):
        FolderSource(squares, in_memory=True, **PLAIN)


@pytest.mark.filterwarnings("ignore:skipped the unreadable image")
@pytest.mark.parametrize("damage", ["unreadable", "another size"])
def test_an_image_that_does_not_fit_the_others_sends_all_to_the_files(squares, tmp_path, damage):
    path = shutil.copytree(squares, tmp_path / "copy")
    file = path / "train" / "bee" / "3.png"
    if damage == "unreadable":
        file.write_bytes(b"no image")
    else:
        files_of(1, 24, 20).save(file)
    source = FolderSource(path, bad_images="skip", **PLAIN)
    assert source.in_memory
    with pytest.raises(ValueError, match=r"in_memory must be false or auto: .*3\.png"):
        FolderSource(path, in_memory=True, **PLAIN).prepare()
    assert "is read from disk: " in said(source)
    assert source.found_settings["in_memory"] is False
    assert torch.equal(
        views(source).images,
        views(FolderSource(path, bad_images="skip", in_memory=False, **PLAIN)).images,
    )


def test_fingerprints_tell_views_from_memory_from_those_of_workers(squares):
    memory, files = (
        FolderSource(squares, image_size=16, in_memory=where, **PLAIN).fingerprints()
        for where in (True, False)
    )
    assert memory["data"] == files["data"]
    assert memory["augmentation"] != files["augmentation"]


def test_a_part_of_the_data_is_read_from_memory_too(squares):
    whole = FolderSource(squares, augmentation="none", **PLAIN)
    part = whole.split(validation=0.3, train_share=0.5)
    shown = views(part)
    assert part.found_settings["in_memory"] is True
    assert len(shown.images) == part.num_train < whole.num_train
    every = views(whole).images
    for image in torch.cat((shown.images, of_test(part))):
        assert any(torch.equal(image, other) for other in every)
