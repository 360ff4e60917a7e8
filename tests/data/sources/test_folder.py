import multiprocessing
import os
import pickle
import shutil
import warnings
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image

from shared.data_files import write_images
from softlabels.data.sources.folder import FolderSource

SETTINGS = {"image_size": 16, "workers": 0, "in_memory": False}
RANDOM = {"auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.5}


def read(source, **changes):
    settings = {"seed": 3, "epoch": 1, "batch_size": 8, "device": "cpu"}
    return list(source.train_batches(**{**settings, **changes}))


def assert_equal_batches(first, second):
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.target, b.target)
        assert torch.equal(a.index, b.index)


@pytest.fixture
def source(image_folder):
    opened = FolderSource(image_folder, **SETTINGS)
    yield opened
    opened.close()


def test_facts(source, image_folder):
    assert source.info.name == image_folder.name
    assert source.info.class_names == ("ant", "bee", "cow")
    assert (source.info.in_channels, source.info.image_size) == (3, (16, 16))
    assert (source.num_train, source.num_test) == (23, 9)
    assert source.steps_per_epoch(8) == 2


def test_batches_hold_the_images_of_their_indices(image_folder):
    source = FolderSource(
        image_folder, augmentation="none", mean=(0, 0, 0), std=(1, 1, 1), image_size=20, workers=0
    )
    (batch,) = read(source, batch_size=23)
    files = [
        image_folder / "train" / name / f"{number}.png"
        for name, count in (("ant", 8), ("bee", 8), ("cow", 7))
        for number in range(count)
    ]
    assert batch.images.dtype == torch.float32
    for image, target, index in zip(batch.images, batch.target, batch.index, strict=True):
        pixels = np.asarray(Image.open(files[index]))[:, 2:22] / 255
        np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), pixels, atol=1e-6)
        assert target == (0 if index < 8 else 1 if index < 16 else 2)


def test_normalization(image_folder):
    plain = FolderSource(image_folder, mean=(0, 0, 0), std=(1, 1, 1), **SETTINGS)
    (raw,) = plain.test_batches(batch_size=9, device="cpu")
    (batch,) = FolderSource(image_folder, **SETTINGS).test_batches(batch_size=9, device="cpu")
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(batch.images, (raw.images - mean) / std)


@pytest.mark.parametrize("augmentation", ["random_resized_crop", "crop_flip"])
def test_workers_do_not_change_what_is_read(image_folder, augmentation):
    results = []
    for workers in (0, 1, 2):
        settings = {"augmentation": augmentation, "image_size": 16, "workers": workers, **RANDOM}
        source = FolderSource(image_folder, **settings)
        results.append([read(source), read(source, epoch=2)])
        source.close()
    for other in results[1:]:
        assert_equal_batches(results[0][0], other[0])
        assert_equal_batches(results[0][1], other[1])
    assert not torch.equal(results[0][0][0].images, results[0][1][0].images)


@pytest.mark.parametrize("augmentation", ["random_resized_crop", "crop_flip"])
def test_an_image_is_augmented_anew_in_each_epoch(image_folder, augmentation):
    source = FolderSource(image_folder, augmentation=augmentation, **SETTINGS)
    seen = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        (batch,) = read(source, seed=seed, epoch=epoch, batch_size=23)
        seen.append(batch.images[batch.index.argsort()])
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (seen[first] != seen[second]).flatten(1).any(dim=1).float().mean() > 0.9


@pytest.mark.parametrize("policy", ["rand-m10-mstd0.5-inc1", "augmix-m10", "original"])
def test_policies_at_full_strength(image_folder, policy):
    """timm then asks Pillow to keep 0 bits, which Pillow may refuse."""
    source = FolderSource(image_folder, auto_augment=policy, **SETTINGS)
    for epoch in range(12):
        assert all(batch.images.isfinite().all() for batch in read(source, epoch=epoch))


def test_an_unknown_policy_is_told(image_folder):
    with pytest.raises(ValueError, match=r"policy that timm knows, .*, got 'strong'"):
        FolderSource(image_folder, auto_augment="strong")


def test_random_erasing_and_policies_change_the_images(image_folder):
    plain, erased, augmented = (
        read(FolderSource(image_folder, **changes, **SETTINGS))[0].images
        for changes in ({}, {"random_erasing": 1.0}, {"auto_augment": "rand-m9-inc1"})
    )
    changed = ((plain - erased).abs() > 1e-4).any(dim=1).flatten(1).float().mean(dim=1)
    assert (changed > 0).all()
    assert (changed < 0.6).all()
    assert not torch.equal(plain, augmented)


def test_no_augmentation_reads_as_for_testing(image_folder, tmp_path):
    shutil.copytree(image_folder / "train", tmp_path / "train")
    shutil.copytree(image_folder / "train", tmp_path / "val")
    source = FolderSource(tmp_path, augmentation="none", **SETTINGS)
    (train,) = read(source, batch_size=23)
    (test,) = source.test_batches(batch_size=23, device="cpu")
    assert torch.equal(train.images, test.images[train.index])


def test_two_processes_read_what_one_reads(source):
    whole = read(source)
    first, second = (read(source, world_size=2, rank=rank) for rank in (0, 1))
    for w, a, b in zip(whole, first, second, strict=True):
        assert torch.equal(torch.cat((a.images[:2], b.images, a.images[2:])), w.images)
        assert torch.equal(torch.cat((a.index[:2], b.index, a.index[2:])), w.index)


def test_a_resume_reads_the_steps_that_were_left(source):
    assert_equal_batches(read(source, start_step=1), read(source)[1:])


def test_the_test_set_is_read_once_over_all_processes(source):
    indices = [
        batch.index
        for rank in (0, 1)
        for batch in source.test_batches(batch_size=4, rank=rank, world_size=2, device="cpu")
    ]
    assert [index.tolist() for index in indices] == [[0, 2], [4, 6], [8], [1, 3], [5, 7]]


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_the_running_generators_alone(image_folder, workers):
    source = FolderSource(image_folder, image_size=16, workers=workers, **RANDOM)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    read(source)
    source.close()
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_workers_stay_between_epochs_and_end_with_close(image_folder):
    before = {child.pid for child in multiprocessing.active_children()}
    source = FolderSource(image_folder, image_size=16, workers=1, in_memory=False)

    def workers():
        return {child.pid for child in multiprocessing.active_children()} - before

    expected = read(source)
    first = workers()
    assert len(first) == 1
    list(source.test_batches(batch_size=4, device="cpu"))
    read(source, epoch=2)
    assert workers() == first
    source.close()
    assert workers() == set()
    assert_equal_batches(read(source), expected)
    source.close()
    assert workers() == set()


@pytest.mark.parametrize("workers", [0, 2])
def test_readers_that_stop_early_or_overlap_do_not_disturb_each_other(image_folder, workers):
    source = FolderSource(image_folder, image_size=16, workers=workers, in_memory=False)
    expected = read(source, batch_size=2)
    left = source.train_batches(seed=3, epoch=1, batch_size=2, device="cpu")
    assert_equal_batches([next(left)], expected[:1])
    del left
    assert_equal_batches(read(source, batch_size=2), expected)
    first, second = (
        source.train_batches(seed=3, epoch=1, batch_size=2, device="cpu") for _ in range(2)
    )
    for pair in zip(first, second, strict=True):
        assert_equal_batches(*[[batch] for batch in pair])
    source.close()


def test_a_source_can_be_pickled(source):
    """What workers get is pickled where they are started by spawning, as on macOS."""
    copy = pickle.loads(pickle.dumps(source))
    assert_equal_batches(read(copy), read(source))


@pytest.fixture
def damaged(image_folder, tmp_path):
    """A copy of the folder with two training images and one test image that cannot be read."""
    root = tmp_path / "damaged"
    shutil.copytree(image_folder, root)
    whole = (root / "train" / "bee" / "3.png").read_bytes()
    (root / "train" / "bee" / "3.png").write_bytes(whole[: len(whole) // 2])
    (root / "train" / "bee" / "4.png").write_bytes(b"")
    (root / "val" / "cow" / "2.png").write_text("this is no image")
    return root


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_stops_the_run_and_is_named(damaged, workers):
    source = FolderSource(damaged, image_size=16, workers=workers, in_memory=False)
    with pytest.raises(ValueError, match=rf"^cannot read the image {damaged}/train/bee/[34]\.png"):
        read(source, batch_size=23)
    with pytest.raises(ValueError, match=rf"^cannot read the image {damaged}/val/cow/2\.png"):
        list(source.test_batches(batch_size=4, device="cpu"))
    assert source.skipped == {}
    source.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_can_be_skipped(damaged, workers):
    source = FolderSource(
        damaged, image_size=16, workers=workers, bad_images="skip", augmentation="none"
    )
    with pytest.warns(UserWarning, match="skipped the unreadable image") as caught:
        (batch,) = read(source, batch_size=23)
    named = " ".join(str(warning.message) for warning in caught)
    assert f"{damaged}/train/bee/3.png" in named
    assert f"{damaged}/train/bee/4.png" in named
    assert len(source.skipped) == len(caught) == 2
    # The next good image takes the place of a bad one: 8 + 5 is the file bee/5.png.
    assert torch.bincount(batch.index, minlength=23).tolist() == [1] * 11 + [0, 0, 3] + [1] * 9
    assert torch.bincount(batch.target).tolist() == [8, 8, 7]
    copies = batch.images[batch.index == 13]
    assert torch.equal(copies[0], copies[2])

    with pytest.warns(UserWarning, match=r"val/cow/2\.png"):
        tested = list(source.test_batches(batch_size=4, device="cpu"))
    assert [b.index.tolist() for b in tested] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(source.skipped) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(source, epoch=5)
        list(source.test_batches(batch_size=4, device="cpu"))
    assert len(source.skipped) == 3
    source.close()


def test_a_folder_without_any_readable_image_gives_nothing_but_ends(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for number in range(3):
            (tmp_path / name / f"{number}.png").write_bytes(b"")
    source = FolderSource(tmp_path, bad_images="skip", **SETTINGS)
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(ValueError, match=rf"no training image in {tmp_path} can be read"),
    ):
        read(source, batch_size=4)


def test_images_of_every_mode_are_read_as_rgb(tmp_path):
    ramp = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (16, 1))
    gray = Image.fromarray(ramp)
    files = {
        "gray.png": gray,
        "gray_alpha.png": gray.convert("LA"),
        "rgb.png": gray.convert("RGB"),
        "rgba.png": gray.convert("RGBA"),
        "palette.png": gray.convert("P"),
        "sixteen.png": Image.fromarray(ramp.astype(np.uint16) * 257),
        "sixteen.tif": Image.fromarray(ramp.astype(np.uint16) * 257),
        "cmyk.tif": gray.convert("RGB").convert("CMYK"),
        "black_and_white.png": gray.convert("1", dither=Image.Dither.NONE),
    }
    for label in "ab":
        for split in ("train", "val"):
            (tmp_path / split / label).mkdir(parents=True)
            for name, image in files.items():
                image.save(tmp_path / split / label / name)
    transparent = gray.convert("P")
    transparent.save(tmp_path / "val" / "b" / "palette.png", transparency=bytes([0, 128]))
    source = FolderSource(
        tmp_path, mean=(0, 0, 0), std=(1, 1, 1), augmentation="none", image_size=16, workers=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (batch,) = source.test_batches(batch_size=100, device="cpu")
    expected = torch.from_numpy(ramp).float() / 255
    for image, name in zip(batch.images, sorted(files) * 2, strict=True):
        if name == "black_and_white.png":
            assert torch.equal(image[0], (expected > 0.5).float())
        else:
            assert (image - expected).abs().max() < 0.005, name


def test_floating_point_images_are_told(tmp_path):
    for label in "ab":
        write_images(tmp_path / label, 2)
        Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / label / "x.tif")
    source = FolderSource(tmp_path, validation_fraction=0.01, **SETTINGS)
    with pytest.raises(ValueError, match=r"x\.tif \(.*no known range"):
        list(chain(read(source), source.test_batches(batch_size=9, device="cpu")))


@pytest.mark.parametrize(
    ("augmentation", "crop_fraction", "expected"),
    [
        ("random_resized_crop", None, 0.875),
        ("crop_flip", None, 1.0),
        ("none", None, 1.0),
        ("none", 0.5, 0.5),
    ],
)
def test_the_central_part_of_test_images_is_kept(tmp_path, augmentation, crop_fraction, expected):
    ramp = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))
    for label in "ab":
        for split in ("train", "val"):
            (tmp_path / split / label).mkdir(parents=True)
            Image.fromarray(ramp).save(tmp_path / split / label / "0.png")
    source = FolderSource(
        tmp_path,
        augmentation=augmentation,
        crop_fraction=crop_fraction,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        image_size=32,
        workers=0,
    )
    (batch,) = source.test_batches(batch_size=2, device="cpu")
    row = batch.images[0, 0, 16] * 255
    assert (row[-4] - row[4]).item() == pytest.approx(24 * 8 * expected, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"augmentation": "crop"}, "augmentation must be one of random_resized_crop, .*'crop'"),
        ({"interpolation": "nearest"}, "interpolation must be one of bilinear, bicubic, got"),
        ({"bad_images": "ignore"}, "bad_images must be one of error, skip, got 'ignore'"),
        ({"image_size": 0}, "image_size must be above 0, got 0"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"random_erasing": 2}, r"random_erasing must be in 0\.\.1, got 2"),
        ({"crop_fraction": 0}, "crop_fraction must be above 0, at most 1, got 0"),
        ({"std": (1, 0, 1)}, "std must be above 0"),
    ],
)
def test_settings_out_of_range_are_refused(image_folder, settings, message):
    with pytest.raises(ValueError, match=message):
        FolderSource(image_folder, **settings)


def test_a_named_pipe_among_the_images_is_not_waited_for(image_folder):
    pipe = image_folder / "train" / "ant" / "pipe.png"
    os.mkfifo(pipe)
    try:
        with pytest.raises(ValueError, match=r"cannot read the image .*pipe\.png .*is no file"):
            read(FolderSource(image_folder, **SETTINGS), batch_size=24)
    finally:
        pipe.unlink()
