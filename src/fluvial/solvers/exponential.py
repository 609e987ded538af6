"""Exponential and Adams methods: the ODE integrated in a variable of choice, by one-step and multistep rules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fluvial.errors import OptionError, one_of
from fluvial.solvers.base import Solver
from fluvial.solvers.integrals import CLOCKS, RULES, VARIABLES, Line, Place
from fluvial.solvers.rows import Asked, At, Row


@dataclass(frozen=True)
class Exponential(Solver):
    """What these methods share: the variable they follow and the clock they interpolate it in (see `integrals`)."""

    variable: Literal["data", "noise", "v", "flow"] = "data"
    clock: Literal["log_snr", "time", "plain"] = "log_snr"
    rule: Literal["exact", "midpoint", "halved", "equal"] = "exact"

    def __post_init__(self) -> None:
        for name, allowed in (("variable", VARIABLES), ("clock", CLOCKS), ("rule", RULES)):
            if getattr(self, name) not in allowed:
                raise one_of(name, getattr(self, name), allowed)

    @property
    def needs(self) -> str:  # type: ignore[override]
        return "velocity" if self.variable == "flow" else self.variable

    def line(self, at: At) -> Line:
        return Line(at.path, VARIABLES[self.variable], self.clock)


def one_step(at: At, line: Line, asked: Asked, order: int, rule: str) -> Row:
    """A one-step method of order 1, 2 or 3 from the call `asked` at its start."""
    start, end = line.place(at.t, at.start), line.place(at.s, at.end)
    values = [(start, line.value(asked))]
    # From pure noise on the clock of log-SNR there is no half-way; the pair is kept, as natural Euler does.
    endless = line.clock == "log_snr" and math.isinf(start.h)
    if order > 1 and not at.lands and not endless and line.reaches(start, end):
        for share in ((0.5,), (1 / 3, 2 / 3))[order - 2]:
            middle = line.between(start, end, share)
            x = _moved(line, asked, at.x, start, middle, values)
            values = [values[0], (middle, line.value(at.ask(x, middle.t)))]
    return _moved(line, asked, at.x, start, end, values, rule)


def _moved(
    line: Line, asked: Asked, x: Row, start: Place, end: Place, values: list[tuple[Place, Row]], rule: str = "exact"
) -> Row:
    """The state at `end` along the values' polynomial, or by natural Euler from the call at the start."""
    moved = line.moved(x, start, end, values, rule)
    return asked.want(end.c.alpha, end.c.sigma, "state") if moved is None else moved


@dataclass(frozen=True)
class SingleStep(Exponential):
    """A one-step method: DPM-Solver++(2S), (3S) with the data, DPM-Solver-2, -3 with the noise.

    Order 2 asks half-way on the clock, order 3 at a third and two thirds; each value is interpolated linearly with that
    of the start. The landing step makes one call.

    Source: Lu et al.: DPM-Solver (2022), https://arxiv.org/abs/2206.00927; DPM-Solver++ (2022),
    https://arxiv.org/abs/2211.01095
    """

    steps: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps not in (1, 2, 3):
            raise OptionError(f"steps is {self.steps}; expected 1, 2 or 3 calls per step")

    @property
    def order(self) -> int:
        return self.steps

    @property
    def stages(self) -> int:
        return self.steps

    def step(self, at: At) -> Row:
        return one_step(at, self.line(at), at.ask(at.x, at.t), self.steps, self.rule)


@dataclass(frozen=True)
class Adams(Exponential):
    """A multistep method: x/S moved by the polynomial through the last `steps` values. One call per step.

    The first steps have fewer values behind them and so a lower order: started by one first-order step, a method
    converges with order 2 at most, however many values it uses later. `start="single"` makes those steps with one-step
    methods of its order - 1 instead, for a call or two more.

    Args:
        variable, clock, rule: see `integrals`.
        steps: how many values the polynomial goes through, 1 to 4.
        correct: correct each state by the value found there, without another call (UniPC); this gains an order.
        start: "ramp" or "single".
        taper: go through no more values than there are steps left before the landing (as UniPC does).

    Source: Zhang, Chen: Fast sampling of diffusion models with exponential integrator (2023),
    https://arxiv.org/abs/2204.13902; Lu et al.: DPM-Solver++ (2022), https://arxiv.org/abs/2211.01095; Zhao et al.:
    UniPC (2023), https://arxiv.org/abs/2302.04867
    """

    steps: int = 2
    correct: bool = False
    start: Literal["ramp", "single"] = "ramp"
    taper: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps not in (1, 2, 3, 4) or self.steps + self.correct > 4:
            raise OptionError(f"steps is {self.steps}; expected 1 to {3 if self.correct else 4}")
        if self.start not in ("ramp", "single"):
            raise one_of("start", self.start, ("ramp", "single"))

    @property
    def order(self) -> int:
        full = self.steps + self.correct
        # Steps of fewer values at the start, or weights that are not the polynomial's, hold it to the second order.
        exact = self.start == "single" and self.rule == "exact"
        return full if exact else min(full, 2 + self.correct)

    @property
    def memory(self) -> int:
        return self.steps

    def step(self, at: At) -> Row:
        line, asked = self.line(at), at.ask(at.x, at.t)
        start, end = line.place(at.t, at.start), line.place(at.s, at.end)
        values = [(start, line.value(asked))]
        values += [(line.place(past.t, past.c), past.rows["value"]) for past in at.past]
        known = len(values) + self.correct
        if self.start == "single" and known < self.order - 1:
            at.keep(value=values[0][1])
            return one_step(at, line, asked, self.order - 1, self.rule)
        x = self._corrected(at, line, start, values) if self.correct else at.x
        at.keep(value=values[0][1], **({"state": x} if self.correct else {}))
        return _moved(line, asked, x, start, end, values[: self._through(at.left)], self.rule)

    def _through(self, left: float) -> int:
        """How many values the polynomial goes through, so many steps before the landing."""
        return min(self.steps, int(left)) if self.taper and math.isfinite(left) else self.steps

    def _corrected(self, at: At, line: Line, here: Place, values: list[tuple[Place, Row]]) -> Row:
        """The last step taken again, its polynomial going through the value at its end too."""
        if not at.past or "state" not in at.past[0].rows:
            return at.x
        through = values[: self._through(at.left + 1) + 1]
        moved = line.moved(at.past[0].rows["state"], values[1][0], here, through, self.rule)
        return at.x if moved is None else moved
