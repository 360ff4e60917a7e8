import pytest
import torch

from softlabels.data import open_source
from softlabels.data.sources.noise import noise


def views(source, draw=(0, 0)):
    return next(source.train_views(draw=draw, batch_size=10_000, device="cpu"))


def test_facts():
    source = noise(num_classes=7, image_size=12, in_channels=2, num_train=30, num_test=9)
    assert source.info.num_classes == 7
    assert (source.num_train, source.num_test) == (30, 9)
    (batch,) = source.test_batches(batch_size=9, device="cpu")
    assert batch.images.shape == (9, 2, 12, 12)
    assert batch.target.tolist() == [*range(7), 0, 1]
    assert torch.bincount(views(source).target).tolist() == [5, 5, 4, 4, 4, 4, 4]


def test_few_images_share_classes_in_pairs():
    source = noise(num_classes=10, num_train=6, num_test=3)
    assert torch.bincount(views(source).target).tolist() == [2, 2, 2]


def test_images_differ_within_a_class_and_between_the_splits():
    source = noise(num_classes=2, num_train=20, num_test=20)
    (test,) = source.test_batches(batch_size=20, device="cpu")
    images = torch.cat([views(source).images, test.images]).flatten(1)
    assert len(images.unique(dim=0)) == 40


def test_there_is_something_to_learn():
    """The mean training image of each class tells most test images' classes."""
    source = noise(num_classes=5, num_train=500, num_test=100)
    train = views(source)
    means = torch.stack([train.images[train.target == label].mean(0) for label in range(5)])
    (test,) = source.test_batches(batch_size=100, device="cpu")
    distances = torch.cdist(test.images.flatten(1), means.flatten(1))
    assert (distances.argmin(dim=1) == test.target).float().mean() > 0.9


def test_a_batch_is_made_alone_however_large_the_data():
    source = noise(num_classes=10_000, image_size=224, num_train=1_000_000, num_test=50_000)
    batches = source.train_batches(seed=0, epoch=0, batch_size=4, start_step=249_999, device="cpu")
    assert next(batches).images.shape == (4, 3, 224, 224)


@pytest.mark.parametrize("size", [1, 2, 9])
def test_any_size(size):
    source = noise(image_size=size, num_train=4, num_test=4)
    assert views(source).images.isfinite().all()


def test_fingerprints_follow_the_settings():
    first = noise().fingerprints()
    assert noise().fingerprints() == first
    assert noise(num_classes=11).fingerprints()["data"] != first["data"]
    assert noise(num_train=999).fingerprints()["data"] != first["data"]
    assert noise(image_size=16).fingerprints()["data"] != first["data"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 1}, r"num_classes must be in 2\.\.1000000, got 1"),
        ({"image_size": 0}, r"image_size must be in 1\.\.16384, got 0"),
        ({"in_channels": 0}, r"in_channels must be in 1\.\.1024, got 0"),
        ({"num_train": 0}, r"num_train must be in 1\.\.10000000, got 0"),
        ({"num_test": 10**9}, r"num_test must be in 1\.\.10000000, got 1000000000"),
    ],
)
def test_numbers_out_of_range_are_told(settings, message):
    with pytest.raises(ValueError, match=message):
        open_source("noise", **settings)
