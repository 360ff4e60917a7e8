import random

import numpy as np
import pytest
import torch

from softlabels.data.randomness import derive_seed, normal, permutation, seeded, uniform

INDEX = torch.arange(4096)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack((a.flatten(), b.flatten())).double())[0, 1].item()


def test_derive_seed_is_the_same_in_every_process():
    assert derive_seed(1, 2, "augment") == 4327780806771272635
    assert 0 <= derive_seed(0) < 2**63


def test_derive_seed_tells_parts_apart():
    parts = [(1, 2), (2, 1), (1,), (12,), ("1", 2), ("12",), ("1, 2",), (1, "2"), (-1, 2), ()]
    assert len({derive_seed(*p) for p in parts}) == len(parts)


def test_derive_seed_refuses_other_types():
    with pytest.raises(TypeError, match=r"int or str, got float"):
        derive_seed(1.5)


def test_uniform_is_pinned():
    """Numbers from a version of the hash in plain Python integers, modulo 2^32."""
    draws = uniform(derive_seed("pinned"), torch.tensor([0, 7, 2**40]), 2)
    assert draws.dtype == torch.float32
    expected = [[11334541, 1273633], [3855368, 9838098], [606668, 4612598]]
    assert (draws * 2**24).long().tolist() == expected


@pytest.mark.parametrize("draw", [uniform, normal])
def test_draws_depend_on_key_index_and_column_alone(draw):
    order = torch.randperm(len(INDEX), generator=torch.Generator().manual_seed(0))
    together = draw(5, INDEX, 7)
    assert torch.equal(draw(5, INDEX[order], 7), together[order])
    assert torch.equal(draw(5, torch.tensor([3]), 7), together[3:4])
    assert not torch.equal(draw(6, INDEX, 7), together)


@pytest.mark.parametrize("draw", [uniform, normal])
@pytest.mark.parametrize("count", [0, 1, 4, 5])
def test_draws_have_the_asked_shape(draw, count):
    assert draw(1, INDEX[:3], count).shape == (3, count)
    assert draw(1, INDEX[:0], count).shape == (0, count)


def test_uniform_fills_the_unit_interval_evenly():
    for key in range(20):
        draws = uniform(derive_seed(key), INDEX, 16).double().flatten()
        assert draws.min() >= 0
        assert draws.max() < 1
        assert draws.mean().item() == pytest.approx(0.5, abs=5 * 12**-0.5 / 256)
        assert draws.var().item() == pytest.approx(1 / 12, abs=0.002)
        counts = torch.histc(draws, bins=64, min=0, max=1)
        chi_square = ((counts - 1024).square() / 1024).sum().item()
        # 63 degrees of freedom: mean 63, standard deviation 11.2.
        assert 25 < chi_square < 120


def test_normal_has_the_moments_of_the_normal_distribution():
    draws = normal(derive_seed("moments"), INDEX, 64).double()
    assert draws.mean().item() == pytest.approx(0, abs=0.01)
    assert draws.var().item() == pytest.approx(1, abs=0.02)
    assert draws.pow(3).mean().item() == pytest.approx(0, abs=0.03)
    assert draws.pow(4).mean().item() == pytest.approx(3, abs=0.1)
    inside = (draws.abs() < 1).double().mean().item()
    assert inside == pytest.approx(0.6827, abs=0.005)


def test_normal_is_finite_where_the_uniform_number_is_0():
    key, index = derive_seed("zero"), torch.tensor([18_890_507])
    assert uniform(key, index, 1).item() == 0
    assert normal(key, index, 2).isfinite().all()


@pytest.mark.parametrize("draw", [uniform, normal])
def test_neighbors_are_independent(draw):
    draws = draw(1000, INDEX, 16)
    assert abs(correlation(draws[1:], draws[:-1])) < 0.02
    assert abs(correlation(draws[2:], draws[:-2])) < 0.02
    assert abs(correlation(draws[:, 1:], draws[:, :-1])) < 0.02
    assert abs(correlation(draws[:, 8:], draws[:, :8])) < 0.02
    for other_key in (1001, 1002, 1000 + 2**32, -1000):
        assert abs(correlation(draws, draw(other_key, INDEX, 16))) < 0.02
    for offset in (2**31, 2**32, 2**40):
        assert abs(correlation(draws, draw(1000, INDEX + offset, 16))) < 0.02


def test_no_two_samples_share_a_sequence():
    draws = uniform(3, torch.arange(200_000), 4)
    assert len(torch.unique(draws, dim=0)) == 200_000


@pytest.mark.parametrize("index", [torch.arange(3.0), torch.zeros(2, 2, dtype=torch.int64)])
def test_draws_refuse_what_is_no_index(index):
    with pytest.raises(ValueError, match="vector of int64, got shape"):
        uniform(0, index, 1)


def test_permutation_is_one_and_changes_with_seed_and_epoch():
    orders = [permutation(seed, epoch, 50) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(50))
    assert len({tuple(order.tolist()) for order in orders}) == 4
    assert torch.equal(permutation(1, 1, 50), orders[3])


def draw_from_all() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(()).item()  # noqa: NPY002


def test_seeded_decides_all_three_generators():
    with seeded(1, "a"):
        first = draw_from_all()
    with seeded(1, "a"):
        assert draw_from_all() == first
    with seeded(1, "b"):
        other = draw_from_all()
    assert all(a != b for a, b in zip(first, other, strict=True))


def fail_while_seeded() -> None:
    try:
        with seeded("inner"):
            draw_from_all()
            raise KeyError
    except KeyError:
        return


def test_seeded_puts_the_states_back_even_after_an_error():
    with seeded("outer"):
        expected = draw_from_all()
    with seeded("outer"):
        with seeded("inner"):
            draw_from_all()
        fail_while_seeded()
        assert draw_from_all() == expected
