"""Validation images that are held out, and subsets of the training set."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch

from shared.data_files import hugging_face_splits, levels, write_images, write_shards
from softlabels.data import open_source
from softlabels.data.sources.folder import FolderSource
from softlabels.data.sources.glyphs import GlyphSource
from softlabels.data.split import divide
from softlabels.training.build import build_source
from softlabels.training.config import ConfigError, resolve

PLAIN = {"augmentation": "none", "mean": (0, 0, 0), "std": (1, 1, 1), "image_size": 8, "workers": 0}
GLYPHS_PLAIN = {
    "rotation": 0, "scale": (1, 1), "shear": 0, "shift": 0, "contrast": (1, 1), "noise_std": 0,
}  # fmt: skip


def test_images(source):
    return list(source.test_batches(batch_size=5, device="cpu"))


test_images.__test__ = False


def views(source):
    return list(source.train_views(draw=(0, 0), batch_size=1000, device="cpu"))


def every(batches, name):
    return torch.cat([getattr(batch, name) for batch in batches])


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.89])
def test_the_parts_are_disjoint_complete_and_even(share):
    counts = (2, 3, 10, 57, 100)
    targets = np.random.default_rng(0).permutation(np.repeat(np.arange(5), counts))
    kept, held_out = divide(targets, validation=share, train_share=None)
    assert sorted([*kept, *held_out]) == list(range(sum(counts)))
    assert (np.diff(kept) > 0).all()
    for label, count in enumerate(counts):
        held = (targets[held_out] == label).sum()
        assert 1 <= held < count
        assert held == min(max(1, round(share * count)), count - 1)


def test_smaller_shares_are_parts_of_larger_ones():
    targets = np.arange(300) % 7
    parts = {
        share: [set(part) for part in divide(targets, validation=share, train_share=share)]
        for share in (0.1, 0.3)
    }
    assert parts[0.1][0] < parts[0.3][0]
    assert parts[0.1][1] < parts[0.3][1]
    (whole, nothing), (same, _) = (
        divide(targets, validation=None, train_share=share) for share in (None, 1)
    )
    assert whole.tolist() == same.tolist() == list(range(300))
    assert len(nothing) == 0


def test_what_is_trained_on_does_not_reach_what_is_held_out():
    targets = np.arange(100) % 3
    rest, held_out = divide(targets, validation=0.3, train_share=None)
    for share in (0.01, 0.5, 1.0):
        kept, same = divide(targets, validation=0.3, train_share=share)
        assert same.tolist() == held_out.tolist()
        assert set(kept) <= set(rest)
        assert (np.bincount(targets[kept]) >= 1).all()
    assert len(divide(targets, validation=0.3, train_share=0.5)[0]) == pytest.approx(35, abs=2)


def test_images_in_memory_are_divided(memory_source):
    part = memory_source.split(validation=0.25, train_share=0.5)
    (shown,), held_out = views(part), test_images(part)
    assert part.info == memory_source.info
    assert shown.index.tolist() == list(range(part.num_train))
    assert every(held_out, "index").tolist() == list(range(part.num_test))
    # An image's brightest pixel names it; a test image is not moved by the augmentation.
    trained = set((shown.images.amax((1, 2, 3)).round().long() - 100).tolist())
    measured = (every(held_out, "images")[:, 0, 3, 4].round().long() - 100).tolist()
    assert len(trained) == part.num_train
    assert len(set(measured)) == len(measured) == part.num_test
    assert not trained & set(measured)
    assert every(held_out, "target").tolist() == [name % 4 for name in measured]
    for epoch in (0, 1):
        batches = part.train_batches(seed=epoch, epoch=epoch, batch_size=4, device="cpu")
        assert max(int(batch.index.max()) for batch in batches) < part.num_train


def test_two_processes_measure_what_one_measures(memory_source):
    part = memory_source.split(validation=0.5)
    shares = [
        [*part.test_batches(batch_size=4, rank=rank, world_size=2, device="cpu")] for rank in (0, 1)
    ]
    seen = torch.cat([batch.index for share in shares for batch in share])
    assert sorted(seen.tolist()) == list(range(part.num_test))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("divided")
    hugging_face_splits().save_to_disk(str(root / "hf"))
    return {"hf": root / "hf", "webdataset": write_shards(root / "shards")}


@pytest.mark.parametrize("kind", ["hf", "webdataset"])
def test_images_of_files_are_divided(places, kind):
    whole = open_source(kind, str(places[kind]), **PLAIN)
    part = whole.split(validation=0.3)
    assert (part.num_train, part.num_test) == (10, 4)
    trained, measured = levels(views(part)), levels(test_images(part))
    assert [*trained] == list(range(10))
    assert sorted([*trained.values(), *measured.values()]) == list(range(14))
    labels = dict(zip(trained.values(), every(views(part), "target").tolist(), strict=True))
    whole_labels = every(views(whole), "target").tolist()
    assert all(whole_labels[name] == label for name, label in labels.items())
    order = [
        batch.index.tolist()
        for batch in part.train_batches(seed=1, epoch=0, batch_size=5, device="cpu")
    ]
    assert sorted(chain.from_iterable(order)) == list(range(10))


def test_a_folder_reads_held_out_images_without_augmentation(image_folder):
    settings = {"image_size": 16, "workers": 0, "augmentation": "random_resized_crop"}
    part = FolderSource(image_folder, **settings).split(validation=0.25)
    first, again = (every(test_images(part), "images") for _ in range(2))
    assert torch.equal(first, again)
    with_workers = FolderSource(image_folder, **{**settings, "workers": 2}).split(validation=0.25)
    try:
        assert torch.equal(every(test_images(with_workers), "images"), first)
        assert torch.equal(views(with_workers)[0].images, views(part)[0].images)
    finally:
        with_workers.close()
    plain = FolderSource(
        image_folder, **{**settings, "augmentation": "none", "crop_fraction": 0.875}
    )
    assert torch.equal(every(test_images(plain.split(validation=0.25)), "images"), first)


@pytest.mark.parametrize("changes", [{"validation": 0.25}, {"train_share": 0.5}])
def test_a_part_has_another_fingerprint_than_the_whole(image_folder, memory_source, changes):
    noise = open_source("noise", num_train=40, num_test=10)
    for whole in (FolderSource(image_folder, image_size=16), memory_source, noise, GlyphSource()):
        before, part = whole.fingerprints(), whole.split(**changes).fingerprints()
        assert part["data"] != before["data"]
        assert part["augmentation"] == before["augmentation"]
        assert whole.split(**changes).fingerprints() == part
        assert whole.fingerprints() == before  # the whole stays as it was


def test_noise_stays_itself():
    whole = open_source("noise", num_train=40, num_test=10, num_classes=4)
    part = whole.split(train_share=0.5)
    assert part.num_train == 20
    assert torch.equal(test_images(part)[0].images, test_images(whole)[0].images)
    wholes = {tuple(image.flatten().tolist()) for image in whole._train.read(torch.arange(40))}
    parts = {tuple(image.flatten().tolist()) for image in part._train.read(torch.arange(20))}
    assert len(parts) == 20
    assert parts < wholes


def test_glyphs_are_divided_by_fonts():
    whole = GlyphSource(**GLYPHS_PLAIN)
    part = whole.split(validation=0.2)
    assert (part.num_train, part.num_test) == (19_100, 4_800)  # 48 of 239 fonts
    shown, all_shown = views(part), views(whole)
    assert torch.equal(every(shown, "images"), every(all_shown, "images")[:19_100])
    held_out = list(part.test_batches(batch_size=1000, device="cpu"))
    assert torch.equal(every(held_out, "target"), torch.arange(4_800) % 100)
    # Drawn once, as test images are: near the held-out letters, and the same whatever the settings.
    images, clean = every(held_out, "images"), every(all_shown, "images")[19_100:]
    own, other_font = ((images - clean.roll(k, 0)).abs().mean() for k in (0, 100))
    assert 0.1 < own < other_font - 0.01
    other = GlyphSource(num_fonts=3, noise_std=0.5).split(validation=0.2, train_share=0.4)
    assert torch.equal(
        every(list(other.test_batches(batch_size=1000, device="cpu")), "images"), images
    )
    assert other.num_train == 100  # 0.4 of 3 fonts


def test_the_fonts_that_are_left_limit_their_number():
    assert GlyphSource(num_fonts=191).split(validation=0.2).num_train == 19_100
    with pytest.raises(ValueError, match=r"in 1\.\.191 beside 48 fonts that are held out, got 192"):
        GlyphSource(num_fonts=192).split(validation=0.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": 0}, "validation must be above 0 and below 0.9, got 0"),
        ({"validation": 0.9}, "below 0.9, got 0.9"),
        ({"validation": float("nan")}, "got nan"),
        ({"train_share": 0}, "train_share must be above 0, at most 1, got 0"),
        ({"train_share": 1.5}, "got 1.5"),
    ],
)
def test_shares_have_a_range(memory_source, changes, message):
    for source in (memory_source, GlyphSource(num_fonts=1)):
        with pytest.raises(ValueError, match=message):
            source.split(**changes)


def test_single_images_cannot_be_held_out(tmp_path):
    for part in ("train", "val"):
        for name in ("ant", "bee"):
            write_images(tmp_path / part / name, 1)
    with pytest.raises(ValueError, match="no class has a second image"):
        FolderSource(tmp_path, image_size=8, workers=0).split(validation=0.2)


def test_the_settings_of_a_run_divide_its_data():
    data = {"source": "noise", "num_train": 100, "num_test": 30, "num_classes": 5}
    divided = build_source(resolve({"data": {**data, "validation": 0.2, "train_share": 0.5}}))
    assert (divided.num_train, divided.num_test) == (40, 20)
    assert build_source(resolve({"data": data})).num_test == 30
    for wrong in ({"validation": 0.95}, {"validation": 0}, {"train_share": 1.1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            resolve({"data": {**data, **wrong}})
