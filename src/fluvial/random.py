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
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# What is drawn, so that no two uses ever share a number.
START, STEP, TIME, TRAIN, ORDER, DROP, COUPLING, DATA, BROWNIAN, PROBE, DEQUANTISE = range(11)

_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF

_PIECE = 1 << 14


def philox(counter: Sequence[Tensor | int], key: tuple[int, int], rounds: int = 10) -> tuple[Tensor, ...]:
    """Philox 4x32: four words of 32 random bits (as int64 tensors) for a counter of four words and a key of two."""
    device = next((word.device for word in counter if isinstance(word, Tensor)), None)
    words = torch.broadcast_tensors(*(torch.as_tensor(word, dtype=torch.int64, device=device) for word in counter))
    c0, c1, c2, c3 = (word.clone() for word in words)
    k0, k1 = key
    for _ in range(rounds):
        # The product of two 32-bit words wraps in int64 but keeps its 64 bits: shift and mask give both halves.
        p0, p1 = c0.mul_(_MULTIPLIER[0]), c2.mul_(_MULTIPLIER[1])
        high0, high1 = (p0 >> 32).bitwise_and_(_LOW), (p1 >> 32).bitwise_and_(_LOW)
        c0, c2 = high1.bitwise_xor_(c1).bitwise_xor_(k0), high0.bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = p1.bitwise_and_(_LOW), p0.bitwise_and_(_LOW)
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def fresh_seed() -> int:
    """A seed for those who gave none, from torch's global generator (so `torch.manual_seed` governs it)."""
    return int(torch.randint(1 << 48, ()))


def _bits(samples: Tensor, count: int, seed: int, draw: int, stream: int) -> Iterator[tuple[Tensor, ...]]:
    """Four words of random bits for `count` elements of each sample, flat, in pieces that fit the processor's cache."""
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed is {seed}; expected an integer from 0 to 2**64 - 1")
    total = len(samples) * count
    piece = _PIECE if samples.device.type == "cpu" else max(total, 1)
    for start in range(0, total, piece):
        place = torch.arange(start, min(start + piece, total), device=samples.device)
        sample = samples[place // count]
        # Samples may number past 2**32: the high half goes into the stream's word, where 24 bits are free.
        counter = (place % count, sample & _LOW, draw, (sample >> 32 << 8) | stream)
        yield philox(counter, (seed & _LOW, seed >> 32))


def _indices(samples: int | Tensor | range, device: torch.device | str) -> Tensor:
    if isinstance(samples, int):
        samples = range(samples)
    if isinstance(samples, range):
        return torch.arange(samples.start, samples.stop, samples.step, device=device)
    return samples.to(device=device, dtype=torch.int64)


def _unit(word: Tensor) -> Tensor:
    """32 bits -> the open interval (0, 1), never 0 nor 1."""
    exact = torch.float32 if word.device.type == "mps" else torch.float64
    return word.to(exact).add_(0.5).mul_(2.0**-32)


def _shaped(pieces: list[Tensor], n: int, shape: Sequence[int]) -> Tensor:
    """The elements of all pieces, four to a counter, as (n, *shape)."""
    size = math.prod(shape)
    flat = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return flat.reshape(n, (size + 3) // 4 * 4)[:, :size].reshape(n, *shape)


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
    pieces = [torch.empty(0, dtype=dtype, device=indices.device)]
    for w0, w1, w2, w3 in _bits(indices, (math.prod(shape) + 3) // 4, seed, draw, stream):
        four = torch.empty(len(w0), 4, dtype=dtype, device=indices.device)
        for column, (first, second) in enumerate(((w0, w1), (w2, w3))):
            # Box, Muller: A note on the generation of random normal deviates (1958).
            radius = _unit(first).log_().mul_(-2.0).sqrt_()
            angle = _unit(second).mul_(2.0 * math.pi)
            four[:, 2 * column] = angle.cos().mul_(radius)
            four[:, 2 * column + 1] = angle.sin_().mul_(radius)
        pieces.append(four.flatten())
    return _shaped(pieces[1:] or pieces, len(indices), shape)


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
    below_one = 1.0 - torch.finfo(dtype).eps / 2
    pieces = [torch.empty(0, dtype=dtype, device=indices.device)]
    for words in _bits(indices, (math.prod(shape) + 3) // 4, seed, draw, stream):
        numbers = torch.stack([_unit(word) for word in words], dim=-1)
        pieces.append(numbers.to(dtype).clamp_(max=below_one).flatten())
    return _shaped(pieces[1:] or pieces, len(indices), shape)


def permutation(n: int, seed: int, draw: int = 0, stream: int = ORDER) -> Tensor:
    """A random order of 0 … n-1, an int64 tensor on the CPU: a function of (n, seed, draw) alone."""
    keys = [(word0 << 31) ^ word1 for word0, word1, *_ in _bits(torch.arange(n), 1, seed, draw, stream)]
    return torch.argsort(torch.cat([torch.empty(0, dtype=torch.int64), *keys]), stable=True)
