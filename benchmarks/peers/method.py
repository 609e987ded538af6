"""What a peer's sampler is to the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from problems import Problem


@dataclass(frozen=True)
class Method:
    """One sampler of one library.

    Attributes:
        levels: how many levels (sigma/alpha) a budget of network calls affords.
        run: the samples, from that many falling levels; after them comes 0.
        grids: only the grids whose names start with one of these.
    """

    library: str
    label: str
    levels: Callable[[int], int]
    run: Callable[[Problem, list[float]], Tensor]
    grids: tuple[str, ...] = ("",)


def one_each(nfe: int) -> int:
    """One call per step."""
    return nfe


def two_each(nfe: int) -> int:
    """Two calls per step, one for the step to 0."""
    return (nfe + 1) // 2
