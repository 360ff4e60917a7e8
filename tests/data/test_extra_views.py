"""Which samples are partners, and what stands in for partners that cannot be read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shared.data_files import png, write_file
from softlabels.data.extra_views import Partners
from softlabels.data.randomness import permutation
from softlabels.data.sources.folder import FolderSource

TARGETS = np.array([3, 0, 0, 3, 1, 1, 1, 0, 3, 3, 1, 3])  # 3, 4, 0 and 5 samples of a class
PLAIN = {
    "augmentation": "none", "mean": (0, 0, 0), "std": (1, 1, 1), "image_size": 8,
    "in_memory": False,
}  # fmt: skip


def test_partners_are_uniform_among_the_others_of_the_class():
    partners, index = Partners(TARGETS), torch.arange(12)
    epochs = 600
    counts = np.zeros((12, 12))
    for epoch in range(epochs):
        found = partners.of(index, seed=5, epoch=epoch)
        counts[index, found] += 1
    same_class = TARGETS[:, None] == TARGETS
    others = same_class & ~np.eye(12, dtype=bool)
    share = others / others.sum(1, keepdims=True)
    assert (counts[~others] == 0).all()
    # Five standard deviations of a binomial distribution.
    assert (np.abs(counts - epochs * share) <= 5 * np.sqrt(epochs * share * (1 - share))).all()


def test_a_partner_belongs_to_its_place_in_the_run():
    partners, index = Partners(TARGETS), torch.arange(12)

    def of(index, seed=5, epoch=0):
        return partners.of(index, seed=seed, epoch=epoch)

    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(of(order), of(index)[order])
    assert not torch.equal(of(index, seed=6), of(index))
    assert not torch.equal(of(index, epoch=1), of(index))


def test_skipping_goes_once_around_the_others():
    partners = Partners(TARGETS)
    assert partners.num_others(8) == 4
    seen = [int(partners.of(torch.tensor([8]), seed=0, epoch=0, skip=skip)) for skip in range(4)]
    assert sorted(seen) == [0, 3, 9, 11]


@pytest.fixture
def folder(tmp_path):
    """3 training images of the class a, 2 of b and 4 of c; an image's darkest level is its index.

    The last one of a, 2, and the first one of b, 3, cannot be read.
    """
    for index, name in enumerate("aaabbcccc"):
        content = b"nothing" if index in (2, 3) else png(index)
        write_file(tmp_path / "train" / name / f"{index}.png", content)
        write_file(tmp_path / "val" / name / "0.png", png(100))
    return tmp_path


def read(source, epoch):
    return list(
        source.train_batches(
            seed=0,
            epoch=epoch,
            batch_size=4,
            extras=("second_view", "partner"),
            device="cpu",
        )
    )


def levels(images):
    return (images.amin(dim=(1, 2, 3)) * 255).round().long()


@pytest.mark.filterwarnings("ignore:skipped the unreadable image")
def test_unreadable_images_and_partners_are_replaced(folder):
    sources = [
        FolderSource(folder, workers=workers, bad_images="skip", **PLAIN) for workers in (0, 2)
    ]
    classes = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    # 0 and 1 have each other left; 4 has no other of its class, so that 5 is read for it.
    read_for = torch.tensor([0, 1, 5, 5, 5, 5, 6, 7, 8])
    seen = set()
    for epoch in range(12):
        ours, theirs = (read(source, epoch) for source in sources)
        expected = read_for[permutation(0, epoch, 9)[:8]]
        assert torch.equal(torch.cat([batch.index for batch in ours]), expected)
        for batch, other in zip(ours, theirs, strict=True):
            assert torch.equal(batch.index, other.index)
            assert torch.equal(batch.extras["partner"], other.extras["partner"])
            assert torch.equal(levels(batch.images), batch.index)
            assert torch.equal(batch.extras["second_view"], batch.images)
            partners = levels(batch.extras["partner"])
            assert len(partners) == 4
            assert torch.equal(classes[partners], batch.target)
            assert (partners != batch.index).all()
            seen |= {*zip(batch.index.tolist(), partners.tolist(), strict=True)}
    pairs = {(a, b) for a in range(5, 9) for b in range(5, 9) if a != b}
    assert seen == {(0, 1), (1, 0)} | pairs
    assert {name.rsplit("/", 1)[1] for name in sources[0].skipped} == {"2.png", "3.png"}
    for source in sources:
        source.close()


def test_draws_differ_between_the_samples_and_between_the_images_of_one(tmp_path):
    for name in "ab":
        for index in range(4):
            write_file(tmp_path / "train" / name / f"{index}.png", png(5))
            write_file(tmp_path / "val" / name / f"{index}.png", png(5))
    source = FolderSource(tmp_path, workers=0, **{**PLAIN, "augmentation": "crop_flip"})
    for batch in read(source, 0):
        views = (batch.images, batch.extras["second_view"], batch.extras["partner"])
        for images in (*views, *torch.stack(views, dim=1)):
            assert len(images.unique(dim=0)) > 1


def test_an_unreadable_partner_stops_the_run_and_is_named(folder):
    write_file(folder / "train" / "a" / "2.png", png(2))
    source = FolderSource(folder, workers=0, **PLAIN)
    step = permutation(0, 0, 9).tolist().index(4)  # the other image of the class
    batches = source.train_batches(
        seed=0, epoch=0, batch_size=1, start_step=step, extras=["partner"], device="cpu"
    )
    with pytest.raises(ValueError, match=r"^cannot read the image .*/train/b/3\.png"):
        next(batches)
