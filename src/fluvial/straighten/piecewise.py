"""Straightening some segments of a teacher's trajectories and keeping the others.

On a straightened segment from a to b, Z the teacher's own trajectory,

    x = Z_a + (t - a)/(b - a) (Z_b - Z_a),    target (Z_b - Z_a)/(b - a):

one Euler step of a student that has learned it leads from Z_a to Z_b. On a kept segment the student is anchored to the
teacher, x = t data + (1 - t) noise with fresh noise and target the teacher's velocity there, so that what it learns
elsewhere does not wear it down.

Sources: Yan et al.: PeRFlow (2024), https://arxiv.org/abs/2405.07510 (chords of segments); the anchor is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fluvial import grids, random
from fluvial.errors import ShapeError
from fluvial.grids import Segments
from fluvial.grids.segments import TURN
from fluvial.model import Model
from fluvial.objectives import Objective
from fluvial.predictions import spread
from fluvial.training import model_hash


@dataclass(frozen=True, kw_only=True)
class Piecewise(Objective):
    """The velocity loss of a student on the rectified path, segment by segment.

    Args:
        segments: the segments, and which of them to straighten.
        teacher: whose trajectories the pairs are, in any notation, under the guidance they were made with; its network
            is only called for segments that are kept.
        times: the density of training times within each straightened segment; kept ones have a uniform one.
        distance: as for `Objective`.
    """

    segments: Segments
    teacher: Model = field(repr=False)
    coupling: Any = "pairs"

    def described(self) -> dict[str, Any]:
        return {**super().described(), "segments": self.segments.config(), "teacher": model_hash(self.teacher)}

    def draw_times(self, model: Model, index: Tensor, seed: int) -> Tensor:
        """The training times (B,), float64: each segment as often as it is long."""
        u = random.uniform(index, (1,), seed, stream=random.TIME, dtype=torch.float64, device=index.device)[:, 0]
        levels, k = self._place(u)
        low, high = levels[k], levels[k + 1]
        share = (u - low) / (high - low)
        dense = grids.density(self.times).quantile(share, model.path)
        share = torch.where(self._straight(index.device)[k], dense, share)
        # Before a joint the network turns from one velocity to the next; nothing is asked of it there.
        reach = torch.where(k < len(levels) - 2, 1.0 - TURN, 1.0)
        return low + (high - low) * reach * share

    def __call__(
        self,
        model: Model,
        data: Tensor,
        cond: Mapping[str, Tensor] | None = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        seed: int | None = None,
        index: Tensor | None = None,
        states: Tensor | None = None,
    ) -> Tensor:
        """The loss (B,) as for `Objective`; `states` (B, J, …) are those at the inner ends of the segments."""
        joints = len(self.segments.straight) - 1
        if noise is None or (joints and (states is None or states.shape[1] != joints)):
            given = "no noise" if noise is None else f"states at {0 if states is None else states.shape[1]} times"
            raise ShapeError(f"the pairs have {given}; expected their noise, and states at the {joints} inner ends")
        seed = random.fresh_seed() if seed is None else seed
        index = torch.arange(len(data), device=data.device) if index is None else index
        t = self.draw_times(model, index, seed) if t is None else t
        levels, k = self._place(t)
        ends = torch.stack([noise, *(states.to(data).unbind(1) if states is not None and joints else ()), data], 1)
        row = torch.arange(len(data), device=data.device)
        start, end, low, high = ends[row, k], ends[row, k + 1], levels[k], levels[k + 1]
        chord = end - start
        x = start + spread((t - low) / (high - low), data) * chord
        target = chord / spread(high - low, data)
        cond = dict(cond or {})
        kept = (~self._straight(data.device)[k]).nonzero()[:, 0]
        if len(kept):
            x[kept], target[kept] = self._anchor(data, cond, t, seed, index, kept)
        velocity = model(x, t, **cond).velocity
        remaining = spread(high - t, data)
        return self.measured(velocity - target, lambda: x + remaining * velocity, x + remaining * target)

    def _anchor(
        self, data: Tensor, cond: Mapping[str, Tensor], t: Tensor, seed: int, index: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """States of the forward process from the data of these rows, and the teacher's velocity there."""
        data, t = data[rows], t[rows]
        noise = random.normal(index[rows], data.shape[1:], seed, 0, random.TRAIN, data.dtype, data.device)
        x = spread(t, data) * data + spread(1.0 - t, data) * noise
        if self.teacher.device != data.device:
            self.teacher.to(data.device)
        with torch.no_grad():
            return x, self.teacher(x, t, **{name: value[rows] for name, value in cond.items()}).velocity

    def _place(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The ends of all segments, float64, and the segment (B,) each time lies in."""
        levels = torch.tensor(self.segments.levels, dtype=torch.float64, device=t.device)
        return levels, torch.bucketize(t.contiguous(), levels[1:-1], right=True)

    def _straight(self, device: torch.device) -> Tensor:
        return torch.tensor(self.segments.straight, device=device)
