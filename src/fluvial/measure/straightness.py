"""How straight a model's trajectories are, and where they bend.

A straight trajectory is exact in one Euler step, so straightness says how few steps a model can be sampled in. It is
of the ODE, on the Rectified path: whatever its notation, a model is converted first, and its own trajectories followed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fluvial import inputs, sampling, solvers
from fluvial.errors import OptionError
from fluvial.grids import Split
from fluvial.measure.transport import Ends
from fluvial.model import Model, convert
from fluvial.paths import Rectified
from fluvial.sampling import Trajectory
from fluvial.solvers import Solver

_CHUNK_BYTES = 256 * 2**20  # of trajectories held at a time


@dataclass(frozen=True)
class Straightness:
    """What `straightness` found; squares are means over the dimensions, in squared path units.

    Attributes:
        total: S, the mean over samples; 0 for straight trajectories.
        per_t: E|(Z_1 - Z_0) - v|² on each step interval.
        per_segment: the same integral against each segment's own chord; [total] without segments.
        per_sample: (n,) float64, the integral along each trajectory. Their mean is `total`.
        curvature: E|dv/dt| (root mean square over dimensions) at each time but the first and the last.
        times: the nodes, one more than there are steps.
        segments: as given; [0, 1] without.
        ends: (noise, data), each (n, …) in path units: what `transport_cost` and `crossing` take.
        n: how many samples.
        nfe: network calls for each.
        seed: of their noise.
    """

    total: float
    per_t: list[float]
    per_segment: list[float]
    per_sample: Tensor
    curvature: list[float]
    times: list[float]
    segments: list[float]
    ends: Ends
    n: int
    nfe: int
    seed: int

    def split(self, k: int = 2) -> list[float]:
        """The k + 1 nodes [0, …, 1] of the k segments that share ∫ curvature dt evenly: see `even_split`."""
        return even_split(self.times, self.curvature, k)


def straightness(
    model: Model,
    noise: int | Sequence[int] | Tensor,
    *,
    steps: int = 64,
    solver: str | Solver = "heun",
    seed: int = 0,
    cond: Mapping[str, Tensor] | None = None,
    guidance: Callable[[Model], Model] | None = None,
    segments: Sequence[float] | None = None,
) -> Straightness:
    """Straightness of a model's ODE trajectories Z_t on the Rectified path, in path units.

        S = ∫₀¹ E|(Z_1 - Z_0) - v(Z_t, t)|² dt,    |·|² the mean over dimensions,
        S_[a,b] = 1/(b-a) ∫_a^b E|(Z_b - Z_a)/(b-a) - v(Z_t, t)|² dt

    v is the mean velocity of a step, (Z_{k+1} - Z_k)/h, and costs no calls of its own. Against the velocity itself that
    leaves out h²/12 E|dv/dt|² in each step, the variance within it: an error of the same order as that of Heun's
    trajectory, h² for S, per_segment and per_sample. The chord is then exactly the mean of v, as in the continuum, so
    that an Euler model of one step is straight. In the last step, which lands on the data and makes no call there, v is
    that of its beginning: per_t is of order 1 in that one interval, of order 2 in all others.

    The curvature at a node is the difference of v on both sides over the distance of their midpoints: of order 2
    where the two steps are equal, of order 1 where a segment changes their length. The node before the landing takes
    the value of the one before it, as the landing's v is not that of its midpoint (of two steps there is none to take).
    A model whose path has no pure noise (VP, EDM) is asked at its own first level instead, a little later than 0,
    which shows in the curvature of the first node alone.

    Args:
        model: any model, in any notation.
        noise: a count, a shape (B, …) or the noise itself, as for `sample`.
        steps: equal steps, shared among the segments by length.
        solver: of an ODE. One of order 1 makes S of order 1.
        seed: of the noise, where it is drawn.
        cond, guidance: as for `sample`.
        segments: nodes [0, …, 1], each of which becomes a node of the grid.

    Raises:
        OptionError: for a stochastic solver, segments that do not rise from 0 to 1, fewer steps than segments.

    Source: Liu, Gong, Liu: Flow straight and fast (2022), https://arxiv.org/abs/2209.03003, eq. 3; by segments: Yan
    et al.: PeRFlow (2024), https://arxiv.org/abs/2405.07510
    """
    solver = solvers.named(solver)
    if solver.stochastic:
        raise OptionError(f"solver {solver.name} is stochastic; straightness is of the ODE: expected an ODE solver")
    grid = Split.shared([0.0, 1.0] if segments is None else segments, steps)
    if grid.nodes[0] != 0.0 or grid.nodes[-1] != 1.0:
        raise OptionError(f"segments is {list(grid.nodes)}; expected rising times from 0 to 1, such as [0, 0.5, 1]")
    seed = inputs.checked_seed(seed)
    model = convert(model, path=Rectified())
    start = inputs.start(model, noise, 0.0, seed, 0, None, None)
    cond = inputs.conditions(model, cond, start)
    chunk = max(1, _CHUNK_BYTES // (2 * (steps + 1) * start[0].numel() * start.element_size()))
    parts: list[_Part] = []
    for k in range(0, len(start), chunk):
        some, given = start[k : k + chunk], {name: value[k : k + chunk] for name, value in cond.items()}
        run = sampling.sample(
            model, some, solver=solver, times=grid, seed=seed, cond=given, guidance=guidance, record=True
        )
        parts.append(_measured(run, grid.nodes))
    per_t, per_segment, curvature, per_sample = (
        torch.cat(columns, dim=-1) for columns in zip(*(part.values for part in parts))
    )
    return Straightness(
        total=float(per_sample.mean()),
        per_t=per_t.mean(1).tolist(),
        per_segment=per_segment.mean(1).tolist(),
        per_sample=per_sample,
        curvature=curvature.mean(1).tolist(),
        times=parts[0].times,
        segments=list(grid.nodes),
        ends=Ends(start, torch.cat([part.end for part in parts])),
        n=len(start),
        nfe=parts[0].nfe,
        seed=seed,
    )


class _Part(NamedTuple):
    """Of some of the samples: what was measured, each (…, B), where they ended, at what cost."""

    values: tuple[Tensor, Tensor, Tensor, Tensor]  # per interval, segment, interior node, and over all times
    end: Tensor
    times: list[float]
    nfe: int


def _measured(run: Trajectory, nodes: Sequence[float]) -> _Part:
    x = run.x.cpu().double().flatten(2)  # (steps + 1, B, D)
    h = torch.tensor(run.times, dtype=torch.float64).diff()
    v = x.diff(dim=0) / h[:, None, None]
    per_t = (v - (x[-1] - x[0])).square().mean(2)
    segments = []
    for first, last in pairwise(bisect_left(run.times, node) for node in nodes):
        width = run.times[last] - run.times[first]
        off = v[first:last] - (x[last] - x[first]) / width
        segments.append(h[first:last] @ off.square().mean(2) / width)
    curvature = v.diff(dim=0).square().mean(2).sqrt() / ((h[1:] + h[:-1]) / 2)[:, None]
    if len(curvature) > 1:
        curvature[-1] = curvature[-2]
    return _Part((per_t, torch.stack(segments), curvature, h @ per_t), run.x[-1], run.times, run.nfe)


def even_split(times: Sequence[float], curvature: Sequence[float], k: int = 2) -> list[float]:
    """The k + 1 nodes [0, …, 1] of the k segments with equal shares of ∫ curvature dt.

    The curvature of a node holds between the midpoints of the steps beside it, and on to the ends: the integral is of
    order 2 at the midpoints and linear between them. Where there is no curvature at all the segments are equal.

    Args:
        times: the nodes, from 0 to 1.
        curvature: at each node but the first and the last.
        k: how many segments.

    Raises:
        OptionError: k below 1.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise OptionError(f"k is {k!r}; expected a whole number of segments, 1 or more")
    middles = [(a + b) / 2 for a, b in pairwise(times)]
    edges = [times[0], *middles[1:-1], times[-1]] if len(middles) > 1 else [times[0], times[-1]]
    grown = [0.0]
    for (a, b), value in zip(pairwise(edges), curvature):
        grown.append(grown[-1] + value * (b - a))
    if not grown[-1] > 0.0:
        edges, grown = [times[0], times[-1]], [0.0, 1.0]
    nodes = [times[0]]
    for share in (grown[-1] * j / k for j in range(1, k)):
        after = min(max(bisect_left(grown, share), 1), len(grown) - 1)
        inside = (share - grown[after - 1]) / (grown[after] - grown[after - 1])
        nodes.append(edges[after - 1] + inside * (edges[after] - edges[after - 1]))
    return [*nodes, times[-1]]
