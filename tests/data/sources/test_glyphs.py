from importlib.resources import files

import numpy as np
import pytest
import torch

from softlabels.data.sources.glyphs import GlyphSource


def read_test_set(source):
    images = torch.cat([b.images for b in source.test_batches(batch_size=1000, device="cpu")])
    mean, std = source.info.mean[0], source.info.std[0]
    return (images * std + mean).mul(255).round().to(torch.uint8)


@pytest.fixture(scope="module")
def source():
    return GlyphSource()


@pytest.fixture(scope="module")
def file():
    with np.load(str(files("softlabels.data.sources") / "glyphs100.npz")) as archive:
        return dict(archive)


def test_facts_and_sizes(source, file):
    info = source.info
    assert (source.num_train, source.num_test) == (23_900, 8_000)
    assert (info.num_classes, info.in_channels, info.image_size) == (100, 1, (32, 32))
    assert info.class_names == tuple(file["characters"])
    assert info.class_names[:5] == ("A", "\u00c0", "\u00c1", "\u00c2", "\u00c4")
    assert info.groups == tuple(i // 5 for i in range(100))


def test_no_font_or_family_is_in_both_splits(file):
    is_test = file["is_test"]
    assert not set(file["families"][is_test]) & set(file["families"][~is_test])
    train = {font.tobytes() for font in file["images"][~is_test]}
    assert len(train) == 239
    assert not train & {font.tobytes() for font in file["images"][is_test]}


def test_targets_belong_to_their_images(file):
    """An upright training image, without augmentation, is the file's image of that class."""
    plain = GlyphSource(
        rotation=0, scale=(1, 1), shear=0, shift=0, contrast=(1, 1), noise_std=0, num_fonts=3
    )
    (batch,) = plain.train_batches(seed=0, epoch=0, batch_size=300, device="cpu")
    mean, std = plain.info.mean[0], plain.info.std[0]
    pixels = (batch.images * std + mean).mul(255).round().to(torch.uint8)[:, 0].numpy()
    fonts = file["images"][~file["is_test"]].astype(int)
    for image, target in zip(pixels[:20], batch.target[:20].tolist(), strict=True):
        assert np.abs(fonts[:, target] - image).max(axis=(1, 2)).min() <= 1


def test_the_test_set_is_the_same_whatever_the_settings(source):
    images = read_test_set(source)
    assert torch.equal(read_test_set(source), images)
    assert torch.equal(read_test_set(GlyphSource(num_fonts=5, noise_std=0, rotation=40)), images)


def test_the_test_set_is_pinned(source):
    """Rounding may differ by a level between processors, so this is no checksum of bytes."""
    images = read_test_set(source).double()
    assert images.mean().item() == pytest.approx(34.2532, abs=0.001)
    means = images[[0, 777, 4321, 7999]].mean((1, 2, 3)).tolist()
    assert means == pytest.approx([51.036, 33.209, 40.386, 27.909], abs=0.02)
    pixels = images[500, 0, 12:20:2, 12:20:2].flatten().tolist()
    expected = [151, 159, 27, 161, 214, 25, 64, 191, 255, 32, 93, 126, 170, 109, 122, 255]
    assert pixels == pytest.approx(expected, abs=1)


def test_test_images_are_augmented_and_in_the_files_order(source, file):
    images = read_test_set(source)[:, 0].numpy().astype(int)
    clean = file["images"][file["is_test"]].reshape(8000, 32, 32).astype(int)
    assert np.abs(images - clean).mean() > 10
    (batch,) = source.test_batches(batch_size=8000, device="cpu")
    assert torch.equal(batch.target, torch.arange(8000) % 100)


def test_training_images_change_with_the_epoch_and_are_normalized(source):
    first, second = (
        next(source.train_batches(seed=0, epoch=0, batch_size=2390, start_step=s, device="cpu"))
        for s in (0, 1)
    )
    assert not set(first.index.tolist()) & set(second.index.tolist())
    assert abs(first.images.mean().item()) < 0.5
    assert 0.5 < first.images.std().item() < 1.5
    again = torch.cat(
        [b.index for b in source.train_batches(seed=0, epoch=1, batch_size=239, device="cpu")]
    )
    assert sorted(again.tolist()) == list(range(23_900))


def test_fewer_fonts_are_the_first_of_all_fonts(source):
    few = GlyphSource(num_fonts=2)
    assert few.num_train == 200
    assert few.info == source.info
    (batch,) = few.train_batches(seed=0, epoch=0, batch_size=200, device="cpu")
    assert torch.bincount(batch.target).tolist() == [2] * 100


@pytest.mark.parametrize("num_fonts", [0, 240])
def test_number_of_fonts_out_of_range(num_fonts):
    with pytest.raises(ValueError, match=rf"num_fonts must be in 1\.\.239, got {num_fonts}"):
        GlyphSource(num_fonts=num_fonts)
