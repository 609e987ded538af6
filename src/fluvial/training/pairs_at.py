"""Pairs with their states where they are wanted, whatever path they were made on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fluvial.errors import OptionError
from fluvial.grids import level_of
from fluvial.training.source import Source


class PairsAt(Source):
    """A source of pairs, its states those at these times alone, on the rectified path.

    Args:
        pairs: a source of pairs, of a model on any path.
        times: rectified times, between 0 and 1.

    Raises:
        OptionError: for pairs that have no states there.
    """

    def __init__(self, pairs: Any, times: Sequence[float]) -> None:
        self._pairs, self._scales, self._places = pairs, [], []
        self.waits = pairs.waits
        path, own = pairs.path, list(pairs.times or ())
        known = [level_of(path, t) for t in own]
        for level in times:
            place = min(range(len(known)), key=lambda j: abs(known[j] - level), default=None)
            if place is None or abs(known[place] - level) > 1e-6:
                raise OptionError(
                    f"states are asked for at {level:g}, and the pairs have them at {[round(k, 6) for k in known]} "
                    "(rectified times); expected pairs made with states= there"
                )
            c = path(own[place])
            self._places.append(place)
            self._scales.append(1.0 / (c.alpha + c.sigma))
        self.name, self.size, self.shape, self.measured = pairs.name, pairs.size, pairs.shape, pairs.measured
        self.conditions = tuple(name for name in pairs.conditions if name != "states" or self._places)
        self.num_classes, self.class_names = pairs.num_classes, pairs.class_names
        self.normalisation, self.skipped = pairs.normalisation, pairs.skipped

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        rows = self._pairs.batch(indices)
        states = rows.pop("states", None)
        if self._places and states is not None:
            scales = torch.tensor(self._scales, dtype=states.dtype).reshape(-1, *[1] * (states.ndim - 2))
            rows["states"] = states[:, self._places] * scales
        return rows
