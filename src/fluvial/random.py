"""Noise that depends on (seed, sample, draw) and on nothing else.

Sample i gets the same numbers in any batch, in any order, on any device and on any rank, because each number is a
pure function of its address: Philox 4x32 with ten rounds, a counter-based generator

    (seed; element, sample, draw, stream) -> 4 x 32 random bits

computed with integer tensor operations. The bits agree on every device. Normals come from them by Box-Muller in
float64, where CPU and GPU may differ in the last place of a logarithm or cosine, so that float32 noise agrees except
for rare differences of one unit in the last place. (MPS has no float64: there it is float32 throughout, and agrees
to about 1e-6.)

Source: Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (2011),
https://doi.org/10.1145/2063384.2063405
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# What is drawn, so that no two uses ever share a number.
START, STEP, TIME, TRAIN, ORDER, DROP, COUPLING, DATA = range(8)

_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox(counter: Sequence[Tensor | int], key: tuple[int, int], rounds: int = 10) -> tuple[Tensor, ...]:
    """Philox 4x32: four words of 32 random bits (as int64 tensors) for a counter of four words and a key of two."""
    c0, c1, c2, c3 = (torch.as_tensor(word, dtype=torch.int64) for word in counter)
    k0, k1 = key
    for _ in range(rounds):
        # The product of two 32-bit words wraps in int64 but keeps its 64 bits: shift and mask give both halves.
        p0, p1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _LOW) ^ c1 ^ k0,
            p1 & _LOW,
            ((p0 >> 32) & _LOW) ^ c3 ^ k1,
            p0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def fresh_seed() -> int:
    """A seed for those who gave none, from torch's global generator (so `torch.manual_seed` governs it)."""
    return int(torch.randint(1 << 48, ()))


def _bits(count: int, samples: Tensor, seed: int, draw: int, stream: int) -> tuple[Tensor, ...]:
    """Four words (len(samples), count) of random bits for these samples."""
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed is {seed}; expected an integer from 0 to 2**64 - 1")
    element = torch.arange(count, device=samples.device)
    # Samples may number past 2**32: the high half goes into the stream's word, where 24 bits are free.
    high = (samples[:, None] >> 32) << 8
    counter = (element[None, :], samples[:, None] & _LOW, draw, high | stream)
    return philox(counter, (seed & _LOW, seed >> 32))


def _indices(samples: int | Tensor | range, device: torch.device | str) -> Tensor:
    if isinstance(samples, int):
        samples = range(samples)
    if isinstance(samples, range):
        return torch.arange(samples.start, samples.stop, samples.step, device=device)
    return samples.to(device=device, dtype=torch.int64)


def _unit(word: Tensor) -> Tensor:
    """32 bits -> the open interval (0, 1), never 0 nor 1."""
    exact = torch.float32 if word.device.type == "mps" else torch.float64
    return (word.to(exact) + 0.5) * 2.0**-32


def normal(
    samples: int | Tensor | range,
    shape: Sequence[int],
    seed: int,
    draw: int = 0,
    stream: int = START,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal noise (len(samples), *shape).

    Args:
        samples: which samples: a count (0 … n-1), a range, or an int64 tensor (n,) of indices.
        shape: the shape of one sample.
        seed: 0 … 2**64 - 1.
        draw: which draw of this stream, such as the number of the solver's step.
        stream: what it is for (`START`, `STEP`, …), so that two uses never share numbers.
        dtype: float32 noise is the float64 noise, rounded.
    """
    indices = _indices(samples, device)
    size = math.prod(shape)
    w0, w1, w2, w3 = _bits((size + 3) // 4, indices, seed, draw, stream)
    parts = []
    for first, second in ((w0, w1), (w2, w3)):
        radius = _unit(first).log_().mul_(-2.0).sqrt_()
        angle = _unit(second).mul_(2.0 * math.pi)
        parts += [(radius * angle.cos()).to(dtype), (radius * angle.sin()).to(dtype)]
    return torch.stack(parts, dim=-1).flatten(1)[:, :size].reshape(len(indices), *shape)


def uniform(
    samples: int | Tensor | range,
    shape: Sequence[int],
    seed: int,
    draw: int = 0,
    stream: int = TIME,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Uniform numbers in the open interval (0, 1), (len(samples), *shape); arguments as for `normal`.

    In float32 the largest values are rounded down to the largest number below 1.
    """
    indices = _indices(samples, device)
    size = math.prod(shape)
    words = _bits((size + 3) // 4, indices, seed, draw, stream)
    numbers = torch.stack([_unit(word) for word in words], dim=-1).flatten(1)[:, :size]
    below_one = 1.0 - torch.finfo(dtype).eps / 2
    return numbers.to(dtype).clamp_(max=below_one).reshape(len(indices), *shape)


def permutation(n: int, seed: int, draw: int = 0, stream: int = ORDER) -> Tensor:
    """A random order of 0 … n-1, an int64 tensor on the CPU: a function of (n, seed, draw) alone."""
    word0, word1, *_ = _bits(1, torch.arange(n), seed, draw, stream)
    return torch.argsort((word0[:, 0] << 31) ^ word1[:, 0], stable=True)
