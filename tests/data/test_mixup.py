import pytest
import torch

from softlabels.data import Batch, MixupCutmix
from softlabels.data.batch import rank_positions

GENERATOR = torch.Generator().manual_seed(0)
BATCH = Batch(
    torch.rand(8, 3, 16, 16, generator=GENERATOR), torch.arange(8) % 5, torch.arange(100, 108)
)
PLACE = {"seed": 1, "epoch": 2, "step": 3}


def share(rank: int, world_size: int) -> Batch:
    positions = rank_positions(8, rank, world_size)
    return Batch(BATCH.images[positions], BATCH.target[positions], BATCH.index[positions])


def test_mixup_mixes_a_batch_with_its_reverse():
    before = BATCH.images.clone()
    mixed = MixupCutmix(mixup_alpha=0.8, cutmix_alpha=0, num_classes=5)(BATCH, **PLACE)
    assert torch.equal(BATCH.images, before)
    assert torch.equal(mixed.index, BATCH.index)
    share_of_own = mixed.target[0, 0].item()
    assert 0 < share_of_own < 1
    expected = share_of_own * before + (1 - share_of_own) * before.flip(0)
    torch.testing.assert_close(mixed.images, expected)
    torch.testing.assert_close(mixed.target.sum(1), torch.ones(8))
    # Unsmoothed: two classes at most have a label.
    assert ((mixed.target > 0).sum(1) <= 2).all()


def test_cutmix_pastes_a_box_and_labels_by_its_area():
    mixer = MixupCutmix(mixup_alpha=0, cutmix_alpha=1, num_classes=5)
    mixed = mixer(BATCH, **PLACE)
    own = (mixed.images == BATCH.images).all(dim=1)
    other = (mixed.images == BATCH.images.flip(0)).all(dim=1)
    assert (own | other).all()
    assert 0 < own[0].float().mean() < 1
    assert mixed.target[0, 0].item() == pytest.approx(own[0].float().mean().item())


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_two_processes_mix_as_one(alphas):
    mixer = MixupCutmix(mixup_alpha=alphas[0], cutmix_alpha=alphas[1], num_classes=5)
    for step in range(6):
        place = {"seed": 1, "epoch": 0, "step": step}
        whole = mixer(BATCH, **place)
        for world_size in (2, 4):
            for rank in range(world_size):
                positions = rank_positions(8, rank, world_size)
                part = mixer(share(rank, world_size), **place)
                assert torch.equal(part.images, whole.images[positions])
                assert torch.equal(part.target, whole.target[positions])


def test_draws_belong_to_the_place_in_the_run():
    mixer = MixupCutmix(num_classes=5)
    state = torch.get_rng_state()
    results = [
        mixer(BATCH, seed=seed, epoch=epoch, step=step).images
        for seed, epoch, step in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    assert torch.equal(mixer(BATCH, seed=0, epoch=0, step=0).images, results[0])
    assert len(torch.unique(torch.stack(results), dim=0)) == 4
    assert torch.equal(torch.get_rng_state(), state)


def test_both_kinds_occur_and_the_probability_holds():
    def count(**settings) -> tuple[int, int, int]:
        mixer = MixupCutmix(num_classes=5, **settings)
        kinds = [0, 0, 0]
        for step in range(40):
            images = mixer(BATCH, seed=0, epoch=0, step=step).images
            pasted = ((images == BATCH.images) | (images == BATCH.images.flip(0))).all()
            kinds[0 if torch.equal(images, BATCH.images) else 1 if pasted else 2] += 1
        return tuple(kinds)

    none, cutmix, mixup = count()
    assert none <= 2
    assert cutmix > 8
    assert mixup > 8
    assert 10 < count(probability=0.5)[0] < 30
    assert count(probability=0.0)[0] == 40


def test_a_batch_that_was_not_mixed_has_one_hot_targets():
    result = MixupCutmix(probability=0, num_classes=5)(BATCH, **PLACE)
    assert torch.equal(result.target, torch.nn.functional.one_hot(BATCH.target, 5).float())


def test_batches_that_cannot_be_mixed_are_refused():
    mixer = MixupCutmix(num_classes=5)
    with pytest.raises(ValueError, match="batch of even size, got 7 images"):
        mixer(Batch(BATCH.images[:7], BATCH.target[:7], BATCH.index[:7]), **PLACE)
    with pytest.raises(ValueError, match=r"needs class indices \[B\], got a target of \(8, 5\)"):
        mixer(mixer(BATCH, **PLACE), **PLACE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixup_alpha": 0, "cutmix_alpha": 0}, "not both 0, got 0 and 0"),
        ({"mixup_alpha": -1}, r"at least 0 .* got -1 and 1\.0"),
        ({"probability": 1.5}, r"must be in 0\.\.1, got 1\.5 and 0\.5"),
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MixupCutmix(**{"num_classes": 5, **settings})
