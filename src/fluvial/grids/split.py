"""A grid of segments, each with its own number of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from fluvial.errors import OptionError
from fluvial.grids.base import Clocked, Grid, Segment
from fluvial.grids.names import named


@dataclass(frozen=True)
class Split:
    """A budget of steps for each segment of the path: `Split([0, .5, 1], steps=[1, 9])` is 1 step, then 9.

    The nodes are among the times exactly as they were given. The number of steps is the sum of the budgets.

    Args:
        nodes: rising times in [0, 1], at least two.
        steps: how many steps in each segment.
        grids: the grid in each segment, an object, a name or None for equal steps of the path's own clock. It sees the
            segment as a path of its own: `Karras` in the last takes its levels from the node's down to sigma_min.
    """

    nodes: Sequence[float] = (0.0, 0.5, 1.0)
    steps: Sequence[int] = (1, 9)
    grids: Sequence[Grid | str | None] | None = None

    def __post_init__(self) -> None:
        nodes, steps = tuple(float(t) for t in self.nodes), tuple(self.steps)
        rising = all(a < b for a, b in pairwise(nodes)) and all(0.0 <= t <= 1.0 for t in nodes)
        if len(nodes) < 2 or not rising:
            raise OptionError(f"nodes is {list(nodes)}; expected at least two times in [0, 1] that rise strictly")
        if len(steps) != len(nodes) - 1 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in steps):
            raise OptionError(
                f"steps is {list(steps)} for {len(nodes) - 1} segments; expected a whole number, 1 or more, for each"
            )
        grids = tuple(self.grids) if self.grids is not None else (None,) * len(steps)
        if len(grids) != len(steps):
            raise OptionError(f"grids has {len(grids)} entries for {len(steps)} segments; expected one for each")
        grids = tuple(named(grid or "uniform") if grid is None or isinstance(grid, str) else grid for grid in grids)
        for name, value in (("nodes", nodes), ("steps", steps), ("grids", grids)):
            object.__setattr__(self, name, value)

    @classmethod
    def shared(cls, nodes: Sequence[float], steps: int) -> Split:
        """Steps as nearly equal as they can be made in all segments together, one at least in each.

        Raises:
            OptionError: for nodes that do not rise within [0, 1], and fewer steps than segments.
        """
        counts = [1] * (len(nodes) - 1)
        grid = cls(nodes, counts)
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < len(counts):
            raise OptionError(
                f"steps is {steps!r} for {len(counts)} segment{'s'[: len(counts) > 1]} between {list(grid.nodes)}; "
                f"expected a whole number, {len(counts)} or more"
            )
        widths = [b - a for a, b in pairwise(grid.nodes)]
        for _ in range(steps - len(counts)):
            # The next step goes where the steps are longest; of equals, nearest to the data.
            counts[max(range(len(counts)), key=lambda k: (round(widths[k] / counts[k], 12), k))] += 1
        return cls(nodes, counts)

    @property
    def count(self) -> int:
        """The number of steps in all."""
        return sum(self.steps)

    def times(self, path: Clocked, steps: int) -> list[float]:
        if steps != self.count:
            parts = " + ".join(map(str, self.steps))
            raise OptionError(f"steps is {steps} but the segments have {parts} = {self.count}; expected one number")
        times = []
        for (start, end), count, grid in zip(pairwise(self.nodes), self.steps, self.grids or ()):
            inner = grid.times(Segment(path, start, end), count)  # type: ignore[union-attr]
            last = math.nextafter(end, 0.0)
            times += [start, *(min(start + (end - start) * share, last) for share in inner[1:-1])]
        return [*times, self.nodes[-1]]
