"""Random draws that are functions of their place, not of a generator that runs along.

Everything random about the data is computed from a key (made of the seed, the epoch and a purpose)
and the index of a sample. So it does not matter which process or worker draws first, or where a run
was resumed.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor

# Odd multipliers with about half of their bits set, as signed 32-bit numbers: multiplication by
# one of them, modulo 2^32, loses no information.
_COLUMN_STEP = 0x9E3779B9 - 2**32
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32, 0x2C1B3C6D, 0x297A2D39)


def derive_seed(*parts: int | str) -> int:
    """Hash integers and words to one seed, the same on every machine and in every process.

    Args:
        *parts: What the draws belong to, for example `(seed, epoch, index, "augment")`. The
            integer 1 and the word `"1"` give different seeds, and the order matters.

    Returns:
        An integer of 63 bits, 0 <= seed < 2^63.

    Raises:
        TypeError: If a part is neither an integer nor a string.
    """
    for part in parts:
        if not isinstance(part, (int, str)):
            raise TypeError(f"parts of a seed must be int or str, got {type(part).__name__}")
    # repr() quotes the words, so that no two different tuples give the same text.
    text = repr(tuple(part if isinstance(part, str) else int(part) for part in parts))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _signed(value: int) -> int:
    """Fold the low 32 bits of an integer into the range of int32."""
    value &= 0xFFFFFFFF
    return value - 2**32 if value >= 2**31 else value


def _xor_shift_(x: Tensor, bits: int) -> Tensor:
    """`x ^= x >> bits` in place, shifting in zeros (for int32, torch shifts in the sign)."""
    shifted = x.bitwise_right_shift(bits).bitwise_and_((1 << (32 - bits)) - 1)
    return x.bitwise_xor_(shifted)


def _mix_(x: Tensor, first: int, second: int) -> Tensor:
    """Scramble int32 numbers in place: each input bit flips about half of the output bits."""
    _xor_shift_(x, 16).mul_(first)
    _xor_shift_(x, 15).mul_(second)
    return _xor_shift_(x, 16)


def _random_bits(key: int, index: Tensor, count: int) -> Tensor:
    """32 random bits for each sample and column, [B, K] int32; see `uniform`.

    Every sample has 64 bits of state, made of key and index; a column number is scrambled together
    with the first half, and the result together with the second. The low 64 bits of the key count.
    """
    if index.ndim != 1 or index.dtype != torch.int64:
        raise ValueError(
            f"index must be a vector of int64, got shape {tuple(index.shape)} of {index.dtype}"
        )
    a, b, c, d = _MULTIPLIERS
    # A cast from int64 keeps the low 32 bits, so both halves of the index enter.
    low, high = index.to(torch.int32), index.bitwise_right_shift(32).to(torch.int32)
    first = _mix_(low.bitwise_xor(_signed(key)), a, b).add_(high)
    first = _mix_(first.bitwise_xor_(_signed(key >> 32)), c, d)
    second = _mix_(first.mul(_COLUMN_STEP).add_(low).bitwise_xor_(_signed(key >> 32)), b, c)
    columns = torch.arange(1, count + 1, dtype=torch.int32, device=index.device)
    x = columns.mul_(_COLUMN_STEP).unsqueeze(0) + first.unsqueeze(1)
    _xor_shift_(x, 16).mul_(a).bitwise_xor_(second.unsqueeze(1))
    return _mix_(x, d, b)


def uniform(key: int, index: Tensor, count: int) -> Tensor:
    """Uniform numbers in [0, 1) that depend on key, index and column alone.

    Args:
        key: Seed of the draws' purpose, from `derive_seed`.
        index: Indices of the samples, [B] int64.
        count: Numbers for each sample, K >= 0.

    Returns:
        [B, K] float32 on the index's device; multiples of 2^-24.

    Raises:
        ValueError: If `index` is not a vector of int64.
    """
    bits = _random_bits(key, index, count)
    return bits.bitwise_right_shift_(8).bitwise_and_(0xFFFFFF).float().mul_(2.0**-24)


def normal(key: int, index: Tensor, count: int) -> Tensor:
    """Standard normal numbers that depend on key, index and column alone; see `uniform`.

    Returns:
        [B, K] float32 on the index's device.
    """
    # Box and Muller: two uniform numbers give two normal ones.
    pairs = (count + 1) // 2
    draws = uniform(key, index, 2 * pairs)
    # 1 - u lies in (0, 1], where the logarithm is finite.
    radius = draws[:, :pairs].neg().add_(1).log_().mul_(-2).sqrt_()
    angle = draws[:, pairs:].mul(2 * math.pi)
    return torch.cat((radius * angle.cos(), angle.sin_().mul_(radius)), dim=1)[:, :count]


def permutation(seed: int, epoch: int, size: int) -> Tensor:
    """The order in which an epoch visits N samples, [N] int64 on the CPU: each of 0..N-1 once."""
    generator = torch.Generator().manual_seed(derive_seed(seed, epoch, "order"))
    return torch.randperm(size, generator=generator)


@contextmanager
def seeded(*parts: int | str, torch_alone: bool = False) -> Iterator[None]:
    """Seed torch (CPU), `random` and NumPy for a block, and put their states back after it.

    Args:
        *parts: What the draws belong to, as for `derive_seed`.
        torch_alone: Leave `random` and NumPy as they are; that takes a tenth of the time.
    """
    seed = derive_seed(*parts)
    with ExitStack() as after:
        after.enter_context(torch.random.fork_rng(devices=[]))
        torch.default_generator.manual_seed(seed)
        if not torch_alone:
            after.callback(random.setstate, random.getstate())
            after.callback(np.random.set_state, np.random.get_state())  # noqa: NPY002
            random.seed(seed)
            np.random.seed([seed & 0xFFFFFFFF, seed >> 32])  # noqa: NPY002
        yield
