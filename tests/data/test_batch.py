import pytest
import torch

from softlabels.data import DataInfo
from softlabels.data.batch import rank_positions, shard_indices, steps_per_epoch, train_indices
from softlabels.data.randomness import permutation


def indices(num_train, **changes):
    order = permutation(changes.pop("seed", 0), changes.pop("epoch", 0), num_train)
    settings = {"batch_size": 8, "rank": 0, "world_size": 1, "start_step": 0}
    return list(train_indices(order, **{**settings, **changes}))


def test_rank_positions_on_one_process_are_in_order():
    assert rank_positions(6, 0, 1).tolist() == [0, 1, 2, 3, 4, 5]
    assert rank_positions(5, 0, 1).tolist() == [0, 1, 2, 3, 4]


def test_rank_positions_of_two_processes():
    assert rank_positions(8, 0, 2).tolist() == [0, 1, 6, 7]
    assert rank_positions(8, 1, 2).tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize(("batch_size", "world_size"), [(8, 2), (24, 3), (64, 8), (6, 3), (12, 2)])
def test_reversing_a_share_pairs_what_reversing_the_whole_pairs(batch_size, world_size):
    seen = []
    for rank in range(world_size):
        positions = rank_positions(batch_size, rank, world_size)
        assert torch.equal(positions.flip(0), batch_size - 1 - positions)
        seen += positions.tolist()
    assert sorted(seen) == list(range(batch_size))


def test_rank_positions_of_an_odd_share_are_a_slice():
    assert [rank_positions(6, rank, 2).tolist() for rank in (0, 1)] == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((9, 0, 2), r"multiple of the number of processes \(2\), got 9"),
        ((8, 2, 2), r"rank must be in 0\.\.1, got 2"),
        ((8, -1, 2), r"rank must be in 0\.\.1, got -1"),
        ((0, 0, 1), "a sample for each of 1 processes, got 0"),
    ],
)
def test_rank_positions_refuses_what_cannot_be_shared(arguments, message):
    with pytest.raises(ValueError, match=message):
        rank_positions(*arguments)


def test_an_epoch_visits_each_sample_at_most_once_and_drops_the_rest():
    steps = indices(26)
    assert [len(step) for step in steps] == [8, 8, 8]
    assert steps_per_epoch(26, 8) == 3
    assert len(set(torch.cat(steps).tolist())) == 24


def test_the_order_changes_with_seed_and_epoch():
    orders = [torch.cat(indices(24, seed=s, epoch=e)).tolist() for s in (0, 1) for e in (0, 1)]
    assert all(sorted(order) == list(range(24)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_two_processes_read_the_samples_of_one():
    for whole, first, second in zip(
        indices(26), indices(26, world_size=2), indices(26, world_size=2, rank=1), strict=True
    ):
        assert torch.equal(torch.cat((first[:2], second, first[2:])), whole)


def test_a_later_start_reads_the_same_steps():
    for late, step in zip(indices(26, start_step=1), indices(26)[1:], strict=True):
        assert torch.equal(late, step)
    assert indices(26, start_step=3) == []


@pytest.mark.parametrize(("world_size", "size"), [(1, 6), (2, 6), (3, 6), (4, 4), (5, 5)])
def test_a_set_smaller_than_a_batch_gives_one_equal_share_each(world_size, size):
    shares = [
        indices(7, batch_size=60, world_size=world_size, rank=rank) for rank in range(world_size)
    ]
    assert {len(share) for share in shares} == {1}
    assert {len(share[0]) for share in shares} == {size // world_size}
    assert len(set(torch.cat([share[0] for share in shares]).tolist())) == size
    assert steps_per_epoch(7, 60) == 1


def test_a_set_of_one_sample_gives_one_batch():
    assert [step.tolist() for step in indices(1)] == [[0]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_step": 4}, r"start_step must be in 0\.\.3, got 4"),
        ({"batch_size": 0}, "batch_size must be above 0, got 26 and 0"),
        ({"batch_size": 32, "world_size": 30}, "each of 30 processes"),
    ],
)
def test_train_indices_refuses_what_makes_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        indices(26, **changes)


@pytest.mark.parametrize("world_size", [1, 2, 3, 10])
def test_shards_hold_each_sample_once(world_size):
    shards = [
        list(shard_indices(7, batch_size=12, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    parts = [part for shard in shards for part in shard]
    assert all(0 < len(part) <= 12 // world_size for part in parts)
    assert sorted(torch.cat(parts).tolist()) == list(range(7))


def test_data_info_counts_classes_and_checks_channels():
    assert DataInfo("x", ("a", "b"), 1, (4, 4), (0.5,), (0.5,)).num_classes == 2
    with pytest.raises(ValueError, match=r"mean must have one number for each of 3 channels"):
        DataInfo("x", ("a", "b"), 3, (4, 4), (0.5,), (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match=r"std must be above 0, got \(0\.0,\)"):
        DataInfo("x", ("a", "b"), 1, (4, 4), (0.5,), (0.0,))


@pytest.mark.parametrize(("name", "classes"), [("set\udcff", ("a", "b")), ("set", ("a", "\ud800"))])
def test_data_info_refuses_names_that_no_file_can_hold(name, classes):
    with pytest.raises(ValueError, match=r"is no text in UTF-8.*rename the folder"):
        DataInfo(name, classes, 1, (2, 2), (0.5,), (0.5,))
