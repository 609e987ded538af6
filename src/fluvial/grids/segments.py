"""The segments of a model that was straightened piece by piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fluvial.errors import OptionError
from fluvial.grids.base import Clocked
from fluvial.grids.fitted import log_snr_of

# The last part of a segment that training leaves out. The velocity jumps where two segments meet, a network is smooth:
# it turns from the one to the other here, and samplers do not ask it for anything in between.
TURN = 0.03


@dataclass(frozen=True)
class Segments:
    """Where a model's velocity was made straight, and where it was kept.

    Args:
        levels: the ends of the segments, rising from 0 to 1, as tau = alpha/(alpha + sigma): the rectified path's time,
            and the same in every notation.
        straight: for each segment whether it was straightened: one Euler step then crosses it.
    """

    levels: Sequence[float]
    straight: Sequence[bool]

    def __post_init__(self) -> None:
        try:
            levels = tuple(float(level) for level in self.levels)
        except (TypeError, ValueError):
            raise OptionError(f"segments is {self.levels!r}; expected numbers such as [0, 0.5, 1]") from None
        if len(levels) < 2 or (levels[0], levels[-1]) != (0.0, 1.0) or not all(a < b for a, b in pairwise(levels)):
            raise OptionError(f"segments is {list(levels)}; expected times that rise strictly from 0 to 1")
        straight = tuple(self.straight)
        if len(straight) != len(levels) - 1 or not all(isinstance(s, bool) for s in straight):
            raise OptionError(
                f"straighten is {list(straight)} for {len(levels) - 1} segments; expected True or False for each"
            )
        object.__setattr__(self, "levels", levels)
        object.__setattr__(self, "straight", straight)

    def nodes(self, path: Clocked) -> list[float]:
        """The ends of the segments as times of this path."""
        times = [path.time(log_snr_of(level)) for level in self.levels[1:-1]]
        # On the rectified path they are the levels themselves, to the last digit.
        return [0.0, *(b if abs(t - b) < 1e-12 else t for t, b in zip(times, self.levels[1:-1])), 1.0]

    def before(self, path: Clocked, node: float) -> float:
        """The last time before an inner node at which the segment that ends there was trained."""
        nodes = self.nodes(path)
        k = nodes.index(node)
        low, high = self.levels[k - 1 : k + 1]
        return path.time(log_snr_of(high - TURN * (high - low)))

    def config(self) -> dict[str, Any]:
        """A JSON-able description from which `from_config` makes the same again."""
        return {"levels": list(self.levels), "straight": list(self.straight)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Segments:
        """What `config` described."""
        return cls(**config)

    def __str__(self) -> str:
        words = ("straight" if straight else "kept" for straight in self.straight)
        return ", ".join(f"{a:g} to {b:g} {word}" for (a, b), word in zip(pairwise(self.levels), words))
