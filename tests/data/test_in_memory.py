import numpy as np
import pytest
import torch

from softlabels.data import Batch, DataInfo
from softlabels.data.augment import Noise
from softlabels.data.in_memory import InMemorySource, Split, channel_statistics


def read(source, **changes):
    settings = {"seed": 3, "epoch": 1, "batch_size": 8, "device": "cpu"}
    return list(source.train_batches(**{**settings, **changes}))


def names(batch):
    """What the brightest pixel of each image says: the image's own index plus 100."""
    return batch.images.amax(dim=(1, 2, 3)).round().long() - 100


def test_batches_hold_the_images_and_targets_of_their_indices(memory_source):
    batches = read(memory_source)
    assert len(batches) == memory_source.steps_per_epoch(8) == 3
    for batch in batches:
        assert batch.images.shape == (8, 1, 8, 8)
        assert batch.images.dtype == torch.float32
        assert torch.equal(names(batch), batch.index)
        assert torch.equal(batch.target, batch.index % 4)
    assert len(set(torch.cat([batch.index for batch in batches]).tolist())) == 24


def test_the_same_place_gives_the_same_batch_and_another_one_does_not(memory_source):
    first = read(memory_source)[1].images
    assert torch.equal(read(memory_source)[1].images, first)
    assert not torch.equal(read(memory_source, epoch=2)[1].images, first)
    assert not torch.equal(read(memory_source, seed=4)[1].images, first)


def test_the_augmentation_of_a_sample_changes_with_the_epoch(memory_source):
    def places(epoch):
        batches = read(memory_source, epoch=epoch)
        images, index = (torch.cat([getattr(b, k) for b in batches]) for k in ("images", "index"))
        return {int(i): int(x.argmax()) for i, x in zip(index, images, strict=True)}

    before, after = places(0), places(1)
    assert any(before[i] != after[i] for i in before.keys() & after.keys())


def test_a_resume_reads_the_steps_that_were_left(memory_source):
    for late, whole in zip(read(memory_source, start_step=1), read(memory_source)[1:], strict=True):
        assert torch.equal(late.images, whole.images)
        assert torch.equal(late.index, whole.index)


def test_two_processes_read_what_one_reads(memory_source):
    whole, first, second = (
        read(memory_source, **shares)
        for shares in ({}, {"world_size": 2}, {"world_size": 2, "rank": 1})
    )
    for w, a, b in zip(whole, first, second, strict=True):
        assert torch.equal(torch.cat((a.images[:2], b.images, a.images[2:])), w.images)
        assert torch.equal(torch.cat((a.target[:2], b.target, a.target[2:])), w.target)


def test_further_images_are_those_that_they_should_be(memory_source):
    for batch in read(memory_source, extras=("second_view", "partner")):
        second, partner = (
            Batch(batch.extras[name], batch.target, batch.index)
            for name in ("second_view", "partner")
        )
        assert torch.equal(names(second), batch.index)
        assert torch.equal(names(partner) % 4, batch.target)
        assert (names(partner) != batch.index).all()


def test_further_images_follow_the_epoch_and_the_draw(memory_source):
    def second_view(epoch, draw):
        (batch,) = read(
            memory_source, epoch=epoch, draw=draw, batch_size=26, extras=["second_view"]
        )
        order = batch.index.argsort()
        return batch.images[order], batch.extras["second_view"][order]

    (images, first), (same, other), (_, third) = (
        second_view(*place) for place in ((0, (7, 0)), (1, (7, 0)), (0, (7, 1)))
    )
    assert torch.equal(images, same)  # a draw that returns shows the same images beside new ones
    assert not torch.equal(first, other)
    assert not torch.equal(first, third)
    assert torch.equal(second_view(2, None)[1], second_view(2, (3, 2))[1])


def test_reading_leaves_the_running_generators_alone(memory_source):
    state = torch.get_rng_state()
    read(memory_source)
    list(memory_source.test_batches(batch_size=3, device="cpu"))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_test_set_is_read_once_in_order_and_not_augmented(memory_source):
    batches = list(memory_source.test_batches(batch_size=3, device="cpu"))
    assert [len(batch.index) for batch in batches] == [3, 3, 1]
    images = torch.cat([batch.images for batch in batches])
    assert torch.equal(torch.cat([batch.index for batch in batches]), torch.arange(7))
    assert images[:, 0, 3, 4].round().tolist() == list(range(100, 107))
    shards = [
        batch.index
        for rank in (0, 1)
        for batch in memory_source.test_batches(batch_size=4, rank=rank, world_size=2, device="cpu")
    ]
    assert [shard.tolist() for shard in shards] == [[0, 2], [4, 6], [1, 3], [5]]


def test_errors_come_with_the_call_not_with_the_first_batch(memory_source):
    with pytest.raises(ValueError, match="multiple of the number of processes"):
        memory_source.train_batches(seed=0, epoch=0, batch_size=5, world_size=2, device="cpu")
    with pytest.raises(ValueError, match="rank must be in"):
        memory_source.test_batches(batch_size=4, rank=1, device="cpu")


def test_normalization_with_the_channels_statistics_gives_mean_0_and_std_1():
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (50, 6, 5, 3), dtype=np.uint8)
    images[..., 1] //= 3
    split = Split.from_arrays(images, np.arange(50) % 2)
    mean, std = channel_statistics(split.images)
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)))
    np.testing.assert_allclose(std, (images / 255).std((0, 1, 2)))
    source = InMemorySource(split, split, DataInfo("x", ("a", "b"), 3, (6, 5), mean, std))
    (batch,) = source.test_batches(batch_size=50, device="cpu")
    torch.testing.assert_close(batch.images.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        batch.images.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0
    )
    (train,) = source.train_batches(seed=0, epoch=0, batch_size=50, device="cpu")
    assert torch.equal(train.images, batch.images[train.index])


def test_a_channel_that_never_changes_has_std_1():
    assert channel_statistics(torch.full((2, 1, 3, 3), 51, dtype=torch.uint8)) == ((0.2,), (1.0,))


def test_a_fixed_draw_is_what_the_augmentation_gives_rounded():
    images = torch.randint(60, 200, (300, 1, 4, 4), dtype=torch.uint8)
    split = Split(images, torch.zeros(300, dtype=torch.int64))
    drawn = split.augmented(Noise(0.05), 7).images
    assert torch.equal(drawn, split.augmented(Noise(0.05), 7).images)
    assert not torch.equal(drawn, split.augmented(Noise(0.05), 8).images)
    index = torch.tensor([270, 2])
    exact = Noise(0.05)(images[index] / 255, index, 7) * 255
    assert (drawn[index] - exact).abs().max() <= 0.501


@pytest.mark.parametrize(
    ("images", "target", "error", "message"),
    [
        (np.zeros((2, 4, 4)), np.zeros(2, int), TypeError, "must be uint8, got float64"),
        (np.zeros((2, 4, 4), np.uint8), np.zeros(2), TypeError, "integers, got float64"),
        (np.zeros((2, 4), np.uint8), np.zeros(2, int), ValueError, r"\[N, H, W\] or .* \(2, 4\)"),
        (np.zeros((2, 4, 4), np.uint8), np.zeros(3, int), ValueError, r"\(2, 4, 4\) and \(3,\)"),
        (np.zeros((0, 4, 4), np.uint8), np.zeros(0, int), ValueError, "there must be images"),
    ],
)
def test_arrays_that_are_no_images_are_refused(images, target, error, message):
    with pytest.raises(error, match=message):
        Split.from_arrays(images, target)


def test_splits_must_fit_the_facts():
    split = Split.from_arrays(np.zeros((4, 5, 6), np.uint8), np.arange(4))
    info = DataInfo("tiny", ("a", "b", "c", "d"), 1, (5, 6), (0.0,), (1.0,))
    with pytest.raises(ValueError, match=r"images of tiny must be \(1, 6, 5\).*got \(1, 5, 6\)"):
        InMemorySource(split, split, DataInfo("tiny", info.class_names, 1, (6, 5), (0,), (1,)))
    with pytest.raises(ValueError, match=r"training targets of tiny .* 0\.\.2, got 0\.\.3"):
        InMemorySource(split, split, DataInfo("tiny", ("a", "b", "c"), 1, (5, 6), (0,), (1,)))
    InMemorySource(split, split, info).close()
