"""The integrals of multistep and exponential methods: a probability-flow ODE as  d(x/S) = y dm.

Choose what to follow along the trajectory: the data estimate D, the noise estimate N, Salimans' v, or D - N. Scaled by
S, the state moves by that variable alone, on a clock m of its own that depends on the noise level and on nothing else:

| variable | y                    | S            | m               |
|---|---|---|---|
| data     | D                    | sigma        | alpha/sigma     |
| noise    | N                    | alpha        | sigma/alpha     |
| v        | (alpha N - sigma D)/r| r            | atan(sigma/alpha) |    r = √(alpha² + sigma²)
| flow     | D - N                | alpha + sigma| alpha/(alpha + sigma) |

So with y interpolated by a polynomial through known values y_j at times t_j, in any clock c,

    x(s) = S(s) [ x(t)/S(t) + sum_j W_j y_j ],        W_j = integral from t to s of L_j(c) dm,

L_j being Lagrange's polynomials. The clock c says what is taken for smooth: half the log-SNR gives the exponential
integrators (DPM-Solver++ with D, DPM-Solver and DEIS with N), c = m the plain Adams methods. With one value known each
is first order; for D, N and D - N that is natural Euler (DDIM).

Where a half log-SNR is infinite (pure noise, pure data) coefficients take their limits: m is finite at both ends for v
and D - N, at pure noise for D, at pure data for N; what remains infinite is replaced by natural Euler.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from fluvial.paths import Coefficients, Path
from fluvial.solvers.rows import Asked, Row


class Variable(NamedTuple):
    """What is followed: y = p D + q N, its scale S, its clock m and dm/dh as functions of h = log(alpha/sigma)."""

    name: str
    pair: Callable[[Coefficients], tuple[float, float]]
    scale: Callable[[Coefficients], float]
    clock: Callable[[float], float]
    speed: Callable[[float], float]
    level: Callable[[float], float]  # h of a value of the clock


def _logistic(h: float) -> float:
    return 1.0 / (1.0 + math.exp(-h)) if h > 0 else math.exp(h) / (1.0 + math.exp(h)) if h > -math.inf else 0.0


def _log(x: float) -> float:
    return math.log(x) if x > 0.0 else -math.inf


def _turned(c: Coefficients) -> tuple[float, float]:
    r = math.hypot(c.alpha, c.sigma)
    return -c.sigma / r, c.alpha / r


VARIABLES = {
    variable.name: variable
    for variable in (
        Variable("data", lambda c: (1.0, 0.0), lambda c: c.sigma, math.exp, math.exp, _log),
        Variable(
            "noise",
            lambda c: (0.0, 1.0),
            lambda c: c.alpha,
            lambda h: math.exp(-h),
            lambda h: -math.exp(-h),
            lambda m: -_log(m),
        ),
        Variable(
            "v",
            _turned,
            lambda c: math.hypot(c.alpha, c.sigma),
            lambda h: math.atan2(math.exp(-max(h, 0.0)), math.exp(min(h, 0.0))),
            lambda h: -0.5 / math.cosh(min(abs(h), 700.0)),
            lambda m: _log(math.cos(m)) - _log(math.sin(m)) if m > 0.0 else math.inf,
        ),
        Variable(
            "flow",
            lambda c: (1.0, -1.0),
            lambda c: c.alpha + c.sigma,
            _logistic,
            lambda h: _logistic(h) * _logistic(-h),
            lambda m: _log(m) - _log(1.0 - m),
        ),
    )
}

CLOCKS = ("log_snr", "time", "plain")

# Half the log-SNR of pure noise is minus infinity. On that clock it stands where alpha/sigma is 1e-5, beyond which no
# estimate changes: so the value found there is one that a polynomial can go through.
_PURE_NOISE = math.log(1e-5)

# How the polynomial is integrated: as it is, or as a method was published.
#   midpoint: a line through two values by its value half-way (DPM-Solver++(2M), UniPC)
#   halved: a parabola with half its bend (DPM-Solver++(3M), which is of order 2 for it)
#   equal: as if the values were equally far apart on the clock (iPNDM)
RULES = ("exact", "midpoint", "halved", "equal")
_EQUAL = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def half_log_snr(c: Coefficients) -> float:
    """h = log(alpha/sigma), infinite at the ends."""
    if c.alpha == 0.0 or c.sigma == 0.0:
        return math.inf if c.sigma == 0.0 else -math.inf
    return math.log(c.alpha) - math.log(c.sigma)


class Place(NamedTuple):
    """A time, the path's coefficients and h there, and the value of the interpolation's clock."""

    t: float
    c: Coefficients
    h: float
    clock: float


@dataclass(frozen=True)
class Line:
    """What a trajectory follows: a variable, and the clock in which it is interpolated, on a path."""

    path: Path
    variable: Variable
    clock: str

    def place(self, t: float, c: Coefficients) -> Place:
        """The place of time t, whose coefficients are c."""
        h = half_log_snr(c)
        if self.clock == "log_snr":
            return Place(t, c, h, _PURE_NOISE if h == -math.inf else h)
        return Place(t, c, h, t if self.clock == "time" else self._measure(h))

    def between(self, start: Place, end: Place, share: float) -> Place:
        """The place a share of the way from start to end, on the clock."""
        value = start.clock + share * (end.clock - start.clock)
        if self.clock == "time":
            return self.place(value, self.path(value))
        t = self.path.time(2.0 * (value if self.clock == "log_snr" else self.variable.level(value)))
        return self.place(t, self.path(t))

    def value(self, asked: Asked) -> Row:
        """The variable where the network was asked."""
        return asked.want(*self.variable.pair(asked.c), self.variable.name)

    def reaches(self, start: Place, end: Place) -> bool:
        """Whether nothing on the way is infinitely far, on the clock or in the variable."""
        return math.isfinite(start.clock) and math.isfinite(end.clock) and self.variable.scale(start.c) > 0.0

    @property
    def _turns(self) -> bool:
        return self.variable.name == "v" and self.clock == "plain"

    def moved(
        self, x: Row, start: Place, end: Place, values: Sequence[tuple[Place, Row]], rule: str = "exact"
    ) -> Row | None:
        """The state at `end` from x at `start`, along the values' polynomial; None where only natural Euler can go."""
        if not self.reaches(start, end) or (self._turns and len(values) == 1):
            return None
        known = [value for value in values if math.isfinite(value[0].clock)]
        scale = self.variable.scale(end.c)
        if scale == 0.0:
            # The data variable at the data: all the weight is on the end of the polynomial.
            moved, shares = Row({}), lagrange([place.clock for place, _ in known], end.clock)
        else:
            moved = (scale / self.variable.scale(start.c)) * x
            weights = self._integrals([place for place, _ in known], start, end, rule)
            shares = [scale * weight for weight in weights]
        for share, (_, value) in zip(shares, known):
            moved = moved + share * value
        return moved

    def _measure(self, h: float) -> float:
        if math.isinf(h) and self.variable.name in ("data", "noise"):
            return 0.0 if (h < 0) == (self.variable.name == "data") else math.inf
        return self.variable.clock(h)

    def _integrals(self, known: Sequence[Place], start: Place, end: Place, rule: str) -> list[float]:
        """W_j, the integral of L_j(c) dm from start to end."""
        length = self._measure(end.h) - self._measure(start.h)
        if len(known) == 1:
            return [length]
        nodes = [place.clock for place in known]
        if self._turns:
            return _turned_weights(nodes, start.clock, end.clock)
        if rule == "equal":
            return [length * weight for weight in _EQUAL[len(nodes)]]
        if rule == "midpoint" and len(nodes) == 2:
            return [length * basis for basis in lagrange(nodes, (start.clock + end.clock) / 2)]
        halved = rule == "halved" and len(nodes) == 3
        bends = [0.5 / math.prod(node - other for other in nodes if other != node) for node in nodes]
        weights = [0.0] * len(known)
        for c, dm in self._quadrature(start, end):
            for j, basis in enumerate(lagrange(nodes, c)):
                weights[j] += (basis - bends[j] * (c - nodes[0]) ** 2 if halved else basis) * dm
        return weights

    def _quadrature(self, start: Place, end: Place) -> list[tuple[float, float]]:
        """Gauss-Legendre points as (c, dm): over h where it is finite, else over the variable's own clock."""
        variable, low, high = self.variable, start.h, end.h
        beyond: list[tuple[float, float]] = []
        if self.clock == "log_snr" and low == -math.inf:
            # What lies before the stand-in of pure noise is taken as it is there.
            beyond = [(_PURE_NOISE, self._measure(_PURE_NOISE) - self._measure(low))]
            low = _PURE_NOISE
        finite = not (math.isinf(low) or math.isinf(high))
        if not finite:
            low, high = self._measure(low), self._measure(high)
        # Everything is analytic in h within |Im h| < pi/2: points enough for the last digits of float64.
        points, weights = gauss(min(8 + 4 * math.ceil(abs(high - low)), 96) if finite else 32)
        middle, half = (high + low) / 2, (high - low) / 2
        at = [middle + half * u for u in points]
        hs = at if finite else [variable.level(m) for m in at]
        dms = [half * w * (variable.speed(h) if finite else 1.0) for w, h in zip(weights, hs)]
        if self.clock == "log_snr":
            return [*beyond, *zip(hs, dms)]
        if self.clock == "plain":
            return [(variable.clock(h), dm) for h, dm in zip(hs, dms)] if finite else list(zip(at, dms))
        return list(zip(self.path.time(2.0 * torch.tensor(hs, dtype=torch.float64)).tolist(), dms))


def lagrange(nodes: Sequence[float], c: float) -> list[float]:
    """Lagrange's polynomials of these nodes at c."""
    return [
        math.prod((c - other) / (node - other) for k, other in enumerate(nodes) if k != j)
        for j, node in enumerate(nodes)
    ]


def _turned_weights(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """Weights exact for the cosine, the sine, 1 and the angle itself, as many of them as there are nodes.

    Where the pair stays the same, v = alpha N - sigma D turns with the angle: so a pair that stays is followed exactly.
    """

    def basis(angle: float) -> tuple[float, ...]:
        return math.cos(angle), math.sin(angle), 2.0 * math.sin(angle / 2) ** 2, angle - math.sin(angle)

    n, length = len(nodes), end - start
    _, sine, bend, lag = basis(length)
    areas = (sine, bend, lag, length**2 / 2 - bend)
    matrix = torch.tensor([basis(node - start)[:n] for node in nodes], dtype=torch.float64).T
    return torch.linalg.solve(matrix, torch.tensor(areas[:n], dtype=torch.float64)).tolist()


@cache
def gauss(n: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Gauss-Legendre points and weights on [-1, 1]: the eigenvalues of the Jacobi matrix.

    Source: Golub, Welsch: Calculation of Gauss quadrature rules (1969), https://doi.org/10.1090/S0025-5718-69-99647-1
    """
    k = torch.arange(1, n, dtype=torch.float64)
    off = k / (4 * k * k - 1).sqrt()
    points, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return tuple(points.tolist()), tuple((2 * vectors[0].square()).tolist())
