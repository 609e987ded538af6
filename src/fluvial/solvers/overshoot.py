"""Forward noising undone: an ODE step goes past its target, and the path's own forward kernel leads exactly back.

    x' = (alpha'/alpha) x + √(sigma'² - (alpha' sigma/alpha)²) xi        to alpha', sigma', a higher noise level

keeps the path's law whatever amount of noise it adds: all error is the ODE step's. Going past the target and back
(`Overshoot`), back and then to the target (`Churn`), or back over a whole stretch and through it again (`Restart`) are
the same thing in different order. A churn is a step that starts earlier than the state (a `Leg` with `start`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from fluvial.errors import OptionError
from fluvial.paths import Path
from fluvial.solvers.base import Leg, Solver
from fluvial.solvers.rates import Stochastic
from fluvial.solvers.rows import At, Row
from fluvial.solvers.runge_kutta import Heun


@dataclass(frozen=True)
class Overshoot(Stochastic):
    """Euler's step past the target r to o = min(1, r + c (r - t)(1 - r)), and the forward kernel back to r.

    c = 0 is `Euler`, bit for bit; the rate is kappa = c (1 - t).

    Args:
        c: how far, >= 0: a number, or a tensor that broadcasts against a sample, one number for each position.

    Source: Hu et al.: AMO sampler: enhancing text rendering with overshooting (2024), https://arxiv.org/abs/2411.19415
    """

    c: float | Tensor = 1.0

    def __post_init__(self) -> None:
        c = self.c
        if isinstance(c, Tensor):
            # A copy: what is done to the mask later does not reach into the solver, which plans are kept by.
            c = c.detach().to("cpu", torch.float64, copy=True)
            object.__setattr__(self, "c", c)
            fits, given = bool((c >= 0.0).all() and (c < math.inf).all()), f"a tensor from {c.min():g} to {c.max():g}"
        else:
            fits, given = isinstance(c, (int, float)) and 0.0 <= c < math.inf, repr(c)
        if not fits:
            raise OptionError(f"c is {given}; expected a finite number, 0 or more, or a tensor of them")

    @property
    def stochastic(self) -> bool:
        return bool((self.c > 0.0).any()) if isinstance(self.c, Tensor) else self.c > 0.0

    def step(self, at: At) -> Row:
        estimate = at.ask(at.x, at.t)
        if at.lands:
            return estimate.data
        if not self.stochastic:
            return at.x + (at.s - at.t) * estimate.velocity
        if not isinstance(self.c, Tensor):
            ratio, added, h = (value.item() for value in self._past(at, torch.tensor(self.c, dtype=torch.float64)))
        else:
            ratio, added, h = self._past(at, self.c)
        return ratio * (at.x + h * estimate.velocity) + added * at.randn()

    @staticmethod
    def _past(at: At, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha_r/alpha_o, the kernel's standard deviation, and how long the Euler step is."""
        past = (at.s + c * (at.s - at.t) * (1.0 - at.s)).clamp(max=1.0)
        over = at.path(past)
        ratio = at.end.alpha / over.alpha
        added = (at.end.sigma**2 - (ratio * over.sigma) ** 2).clamp(min=0.0).sqrt()
        still = past == at.s
        return ratio.masked_fill(still, 1.0), added.masked_fill(still, 0.0), past - at.t


@dataclass(frozen=True)
class _Rewinding(Stochastic):
    """An ODE solver whose run goes back in between."""

    base: Solver = field(default_factory=Heun, kw_only=True)

    def __post_init__(self) -> None:
        if self.base.stochastic or self.base.memory:
            raise OptionError(f"base is {self.base.name}; expected an ODE solver of single steps, such as Heun()")

    @property
    def order(self) -> int:
        return self.base.order

    @property
    def stages(self) -> int:
        return self.base.stages

    @property
    def ode_needs(self) -> str:  # type: ignore[override]
        return self.base.needs

    def step(self, at: At) -> Row:
        return self.base.step(at)


@dataclass(frozen=True)
class Churn(_Rewinding):
    """Each step starts at a noise level raised by (1 + g), g = min(s_churn/N, √2 - 1), noised by the forward kernel.

    EDM's algorithm 2, on any path, with level = sigma/alpha for its sigma and N the number of steps;
    `Churn(base=Heun(along=EDM(rho=1)))` steps in sigma as EDM does. It never goes back beyond t = 0, and the step that
    lands on the data adds no noise.

    Args:
        s_churn: how much, >= 0; 0 is the base solver, bit for bit. The rate on a uniform clock is
            kappa = s_churn alpha sigma/w.
        s_tmin, s_tmax: the noise levels between which to churn.
        s_noise: factor on the noise that is added; above 1 makes up for lost detail.
        base: an ODE solver of single steps; default `Heun()`.

    Source: Karras, Aittala, Aila, Laine: Elucidating the design space (2022), https://arxiv.org/abs/2206.00364, alg. 2
    """

    s_churn: float = 10.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("s_churn", "s_noise"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise OptionError(f"{name} is {getattr(self, name)}; expected a finite number, 0 or more")
        if not 0.0 <= self.s_tmin <= self.s_tmax:
            raise OptionError(f"s_tmin is {self.s_tmin} and s_tmax {self.s_tmax}; expected 0 <= s_tmin <= s_tmax")

    @property
    def stochastic(self) -> bool:
        return self.s_churn > 0.0

    def legs(self, times: Sequence[float], path: Path) -> list[Leg]:
        raised = 1.0 + min(self.s_churn / (len(times) - 1), math.sqrt(2.0) - 1.0)
        legs = []
        for t, s in pairwise(times):
            level = _level(path, t)
            start = t
            if raised > 1.0 and s < 1.0 and level < math.inf and self.s_tmin <= level <= self.s_tmax:
                start = _time(path, level * raised)
            legs.append(Leg(t, s, start, self.s_noise) if start < t else Leg(t, s))
        return legs


@dataclass(frozen=True)
class Restart(_Rewinding):
    """From a low noise level the state is noised back to a high one and integrated down again, several times.

    Levels are sigma/alpha. The low level is that of the run's node nearest to it; the way down is spaced as EDM's grid
    (rho = 7). An interval of whose inside the run has no node is passed over: there is no place to restart from.

    Args:
        intervals: (low, high, times, steps) for each: the two levels, how many restarts, how many steps in each.
            Without any it is the base solver, bit for bit.
        base: an ODE solver of single steps; default `Heun()`.

    Source: Xu et al.: Restart sampling for improving generative processes (2023), https://arxiv.org/abs/2306.14878
    """

    intervals: Sequence[tuple[float, float, int, int]] = ((0.06, 0.3, 2, 5),)

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            object.__setattr__(self, "intervals", tuple(_interval(*interval) for interval in self.intervals))
        except TypeError:
            raise OptionError(f"intervals is {self.intervals!r}; expected (low, high, times, steps) tuples") from None

    @property
    def stochastic(self) -> bool:
        return any(count for _, _, count, _ in self.intervals)

    def legs(self, times: Sequence[float], path: Path) -> list[Leg]:
        places: dict[float, list[tuple[float, int, int]]] = {}
        levels = {t: _level(path, t) for t in times[1:] if t < 1.0}
        most = _level(path, 0.0)
        for low, high, count, steps in self.intervals:
            high = min(high, most)
            near = [t for t, level in levels.items() if level < high]
            if near:
                place = min(near, key=lambda t: abs(math.log(levels[t] / low)))
                places.setdefault(place, []).append((high, count, steps))
        legs = []
        for t, s in pairwise(times):
            legs.append(Leg(t, s))
            for high, count, steps in places.get(s, ()):
                legs += count * _again(path, s, levels[s], high, steps)
        return legs


def _interval(low: float, high: float, count: int, steps: int) -> tuple[float, float, int, int]:
    if not (0.0 < low < high < math.inf and count >= 0 and steps >= 1):
        raise OptionError(
            f"the interval is {(low, high, count, steps)}; expected (low, high, times, steps) with 0 < low < high"
        )
    return low, high, count, steps


def _again(path: Path, t: float, low: float, high: float, steps: int) -> list[Leg]:
    """From the state at t, of level `low`, back to `high` and down to t again."""
    ends = low ** (1 / 7), high ** (1 / 7)
    inner = [_time(path, (ends[1] + k / steps * (ends[0] - ends[1])) ** 7) for k in range(steps)]
    first, *rest = pairwise([*inner, t])
    return [Leg(t, first[1], first[0]), *(Leg(*leg) for leg in rest)]


def _level(path: Path, t: float) -> float:
    alpha, sigma, *_ = path(t)
    return sigma / alpha if alpha else math.inf


def _time(path: Path, level: float) -> float:
    return path.time(-2.0 * math.log(level))
