"""Runge-Kutta: dx/dt = velocity, integrated in the path's own clock or in any other path's.

A method is its tableau: stage i asks at time t + c_i h, h = s - t, and state x + h sum_j a_ij k_j, and the step ends at
x + h sum_i b_i k_i. `along=` names another path: the same trajectory, x' = x √(alpha'² + sigma'²)/√(alpha² + sigma²) at
equal log-SNR, is then integrated in that path's clock and velocity; "Euler on VP" and "Euler on rectified" are one
argument apart.

At sigma = 0 no network is called. The step that lands on the data makes the calls of its interior stages and closes
with the data estimate of the last of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from fluvial.paths import Coefficients, Path
from fluvial.solvers.base import Solver
from fluvial.solvers.rows import Asked, At, Row


@dataclass(frozen=True)
class RungeKutta(Solver):
    """An explicit method: stage i is (c_i, (a_i0, a_i1, …)), the closing weights are b.

    Args:
        along: the path in whose clock to integrate; None: the model's own.
    """

    along: Path | None = None
    tableau: ClassVar[tuple[tuple[float, tuple[float, ...]], ...]]
    weights: ClassVar[tuple[float, ...]]
    _order: ClassVar[int]

    @property
    def order(self) -> int:
        return self._order

    @property
    def stages(self) -> int:
        return len(self.weights)

    def step(self, at: At) -> Row:
        frame = _Frame(at, self.along)
        slopes: list[Row] = []
        for c, coefficients in self.tableau:
            if c == 1.0 and frame.stops:
                break
            x = frame.x if not slopes else _advanced(frame.x, frame.h, coefficients, slopes)
            slopes.append(frame.slope(x, c))
        if at.lands:
            return frame.last.data
        if frame.stops:
            return frame.last.want(at.end.alpha, at.end.sigma, "state")
        return frame.out(_advanced(frame.x, frame.h, self.weights, slopes))


def _advanced(x: Row, h: float, coefficients: tuple[float, ...], slopes: list[Row]) -> Row:
    """x + h sum_j coefficients_j slopes_j."""
    for coefficient, slope in zip(coefficients, slopes):
        if coefficient:
            x = x + (h * coefficient) * slope
    return x


class _Frame:
    """A step seen on another path: its times there, the state, and the velocity."""

    def __init__(self, at: At, along: Path | None) -> None:
        self.at, self.own = at, at.path
        self.along = None if along is None or along == at.path else along
        self.stops = at.lands
        self.t, self.x = at.t, at.x
        if self.along is None:
            self.h = at.s - at.t
            return
        low, high = self.along.log_snr(0.0), self.along.log_snr(1.0)
        self.t = self.along.time(_log_snr(at.start))
        # From beyond the other path's ends the pair is first mixed at the nearer of them.
        self.outside = not low <= _log_snr(at.start) <= high
        if not self.outside:
            self.x = self._scale(self.along(self.t), at.start) * at.x
        self.s = 1.0 if at.lands else self.along.time(_log_snr(at.end))
        self.stops = at.lands or not low <= _log_snr(at.end) <= high or self.s == self.t
        self.h = self.s - self.t

    def slope(self, x: Row, c: float) -> Row:
        """The velocity on this frame's path at state x, time t + c h."""
        at = self.at
        if self.along is None:
            self.last = at.ask(x, at.s if c == 1.0 else at.t if c == 0.0 else at.t + c * self.h)
            return self.last.velocity
        here = self.along(self.t + c * self.h)
        if c == 0.0:
            self.last = at.ask(at.x, at.t)
            if self.outside:
                self.x = self.last.want(here.alpha, here.sigma, "state")
        else:
            time = at.s if c == 1.0 else self.own.time(_log_snr(here))
            self.last = at.ask(self._scale(self.own(time), here) * x, time)
        return self.last.want(here.dalpha, here.dsigma, "velocity")

    def out(self, x: Row) -> Row:
        """A state of the frame's path at the step's end, on the model's own path."""
        return x if self.along is None else self._scale(self.at.end, self.along(self.s)) * x

    @staticmethod
    def _scale(to: Coefficients, of: Coefficients) -> float:
        return math.hypot(to.alpha, to.sigma) / math.hypot(of.alpha, of.sigma)

    last: Asked


def _log_snr(c: Coefficients) -> float:
    if c.alpha == 0.0 or c.sigma == 0.0:
        return math.inf if c.sigma == 0.0 else -math.inf
    return 2.0 * math.log(c.alpha / c.sigma)


@dataclass(frozen=True)
class Euler(RungeKutta):
    """x + (s - t) velocity(x, t). It lands on the data estimate, which on the rectified path is the same thing."""

    tableau = ((0.0, ()),)
    weights = (1.0,)
    _order = 1


@dataclass(frozen=True)
class Heun(RungeKutta):
    """x + (s - t)/2 (velocity(x, t) + velocity(x + (s - t) velocity(x, t), s)): the trapezoidal rule, explicit.

    EDM's algorithm 1, which steps in sigma, is `Heun(along=EDM(rho=1))`. The last step lands on the first call's
    data estimate, so N steps make 2N - 1 network calls.

    Source: Karras, Aittala, Aila, Laine: Elucidating the design space (2022), https://arxiv.org/abs/2206.00364, alg. 1
    """

    tableau = ((0.0, ()), (1.0, (1.0,)))
    weights = (0.5, 0.5)
    _order = 2


@dataclass(frozen=True)
class Midpoint(RungeKutta):
    """x + (s - t) velocity at the half-way point of an Euler step: two calls per step."""

    tableau = ((0.0, ()), (0.5, (0.5,)))
    weights = (0.0, 1.0)
    _order = 2


@dataclass(frozen=True)
class RK4(RungeKutta):
    """The classical Runge-Kutta method: four calls per step, three on landing.

    Source: Kutta: Beitrag zur näherungsweisen Integration totaler Differentialgleichungen (1901)
    """

    tableau = ((0.0, ()), (0.5, (0.5,)), (0.5, (0.0, 0.5)), (1.0, (0.0, 0.0, 1.0)))
    weights = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
    _order = 4
