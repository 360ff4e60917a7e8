from dataclasses import replace

import numpy as np
import pytest
import torch

from softlabels.data import Batch, MixupCutmix, mixup_extras
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


def test_second_views_are_mixed_as_the_images_are():
    mixer = MixupCutmix(num_classes=5)
    second = replace(BATCH, images=BATCH.images.flip(3).square())
    for step in range(6):
        place = {**PLACE, "step": step}
        extras = {"second_view": second.images, "more": BATCH.index}
        mixed = mixer(replace(BATCH, extras=extras), **place)
        assert torch.equal(mixed.images, mixer(BATCH, **place).images)
        assert torch.equal(mixed.extras["second_view"], mixer(second, **place).images)
        assert mixed.extras["more"] is BATCH.index
        assert extras["second_view"] is second.images


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("partner", "a partner needs images of one class each, mixed images have two"),
        ("mixup", "expected mixup_extras after this mixing"),
    ],
)
def test_further_images_that_cannot_be_mixed_are_refused(name, message):
    mixer = MixupCutmix(num_classes=5)
    with pytest.raises(ValueError, match=message):
        mixer(replace(BATCH, extras={name: BATCH.images}), **PLACE)


def test_mixup_extras_stand_beside_the_batch():
    before = BATCH.images.clone()
    batch = mixup_extras(replace(BATCH, extras={"more": BATCH.index}), alpha=0.4, **PLACE)
    assert torch.equal(batch.images, before)
    assert batch.target is BATCH.target
    assert batch.extras["more"] is BATCH.index
    weight, index = batch.extras["mixup_weight"], batch.extras["mixup_index"]
    assert index.tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    assert (weight.shape, weight.dtype, len(weight.unique())) == ((8,), torch.float32, 1)
    share = weight[:, None, None, None]
    expected = share * before + (1 - share) * before[index]
    torch.testing.assert_close(batch.extras["mixup"], expected)


def test_two_processes_make_the_mixup_extras_of_one():
    whole = mixup_extras(BATCH, alpha=0.4, **PLACE)
    for rank in (0, 1):
        positions = rank_positions(8, rank, 2)
        part = mixup_extras(share(rank, 2), alpha=0.4, **PLACE).extras
        assert torch.equal(part["mixup"], whole.extras["mixup"][positions])
        assert torch.equal(positions[part["mixup_index"]], 7 - positions)
        assert torch.equal(part["mixup_weight"], whole.extras["mixup_weight"][:4])


def test_the_weights_of_mixup_extras_are_beta_distributed_and_belong_to_the_place():
    def weight(alpha, **place):
        return mixup_extras(TINY, alpha=alpha, **{**PLACE, **place}).extras["mixup_weight"][0]

    TINY = Batch(torch.zeros(2, 1, 1, 1), torch.zeros(2).long(), torch.arange(2))
    for alpha in (0.2, 1.0):
        weights = np.array([weight(alpha, step=step) for step in range(400)])
        # A Beta distribution of two equal parameters has the variance 1 / (4 * (2 * alpha + 1)).
        assert weights.mean() == pytest.approx(0.5, abs=0.07)
        assert weights.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.2)
    places = ({}, {"seed": 2}, {"epoch": 3}, {"step": 4})
    assert len({float(weight(0.4, **place)) for place in places}) == 4
    assert weight(0.4) == weight(0.4)


def test_mixup_extras_refuse_what_cannot_be_mixed():
    with pytest.raises(ValueError, match=r"alpha must be above 0, got 0\.0"):
        mixup_extras(BATCH, alpha=0.0, **PLACE)
    odd = Batch(BATCH.images[:7], BATCH.target[:7], BATCH.index[:7])
    with pytest.raises(ValueError, match="batch of even size, got 7 images"):
        mixup_extras(odd, alpha=0.4, **PLACE)


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
