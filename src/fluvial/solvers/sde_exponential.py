"""Exponential integrators of the reverse SDE: what is linear is solved exactly, the noise included.

At a rate kappa per unit of log-SNR, h = log(alpha/sigma), the SDE is  d(x/sigma) = e^h (1 + kappa) data dh
- kappa (x/sigma) dh + √(2 kappa) dW, so that with a tilted scale and clock

    S = sigma e^{-kappa (h - h_end)},    m = e^{h + kappa (h - h_end)},    d(x/S) = data dm + noise:

the integrals of the ODE (see `integrals`) do for any kappa, and over a step of exponent E = 2 kappa (h_end - h) comes
noise of standard deviation sigma_s √(1 - e^{-E}). A rate that varies is taken as its mean over the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fluvial.errors import OptionError, one_of
from fluvial.solvers.exponential import Adams, SingleStep
from fluvial.solvers.integrals import VARIABLES, Line, Place, half_log_snr
from fluvial.solvers.rates import Rate, Stochastic, check_rate, exponent_of_kappa, positive
from fluvial.solvers.rows import At, Row


def _tilted(line: Line, at: At, exponent: float) -> Line:
    """The line of the data at the mean rate of a step with this exponent."""
    end = half_log_snr(at.end)
    kappa = exponent / 2 / (end - half_log_snr(at.start))
    variable = VARIABLES["data"]._replace(
        scale=lambda c: c.sigma * math.exp(-kappa * (half_log_snr(c) - end)),
        clock=lambda h: math.exp(h + kappa * (h - end)),
        speed=lambda h: (1.0 + kappa) * math.exp(h + kappa * (h - end)),
        level=lambda m: (math.log(m) + kappa * end) / (1.0 + kappa),
    )
    return Line(line.path, variable, line.clock)


def _moved(line: Line, x: Row, start: Place, end: Place, values: list[tuple[Place, Row]], rule: str = "exact") -> Row:
    moved = line.moved(x, start, end, values, rule)
    assert moved is not None, "a step with an exponent is finite at both ends"
    return moved


@dataclass(frozen=True)
class _Tilted(Adams):
    """The multistep method of one step of the SDE, without its noise."""

    exponent: float = 0.0

    def line(self, at: At) -> Line:
        line = super().line(at)
        return _tilted(line, at, self.exponent) if self.exponent else line


@dataclass(frozen=True)
class _Reverse(Stochastic):
    """What both share: the rate, 1 being the time reversal of the noising SDE, and 0 the ODE."""

    kappa: Rate = 1.0
    ode_needs = "data"

    def __post_init__(self) -> None:
        check_rate("kappa", self.kappa)

    @property
    def stochastic(self) -> bool:
        return positive(self.kappa)

    def _exponent(self, at: At) -> float:
        return 0.0 if at.lands else exponent_of_kappa(at, self.kappa)


@dataclass(frozen=True)
class SDEAdams(_Reverse):
    """A multistep method for the reverse SDE: SDE-DPM-Solver++(2M), at kappa = 0 DPM-Solver++(2M) bit for bit.

        x(s) = (sigma_s/sigma_t) e^{-E/2} x + alpha_s (1 - e^{-(h_s - h_t) - E/2}) data' + sigma_s √(1 - e^{-E}) xi

    with data' interpolated from the last `steps` estimates in h. One call per step.

    Args:
        kappa: the rate, a number or a function of t (k-diffusion's eta).
        steps: how many estimates the polynomial goes through, 1 to 4.
        rule: "midpoint" takes the polynomial at the middle of the step, "exact" integrates it.

    Source: Lu et al.: DPM-Solver++ (2022), https://arxiv.org/abs/2211.01095; Xue et al.: SA-Solver (2023),
    https://arxiv.org/abs/2309.05019, for kappa
    """

    steps: int = 2
    rule: Literal["exact", "midpoint"] = "midpoint"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps not in (1, 2, 3, 4):
            raise OptionError(f"steps is {self.steps}; expected 1 to 4")
        if self.rule not in ("exact", "midpoint"):
            raise one_of("rule", self.rule, ("exact", "midpoint"))

    @property
    def order(self) -> int:
        return self._ode(0.0).order

    @property
    def memory(self) -> int:
        return self._ode(0.0).memory

    def step(self, at: At) -> Row:
        exponent = self._exponent(at)
        moved = self._ode(exponent).step(at)
        if exponent == 0.0:
            return moved
        return moved + (at.end.sigma * math.sqrt(-math.expm1(-exponent))) * at.randn()

    def _ode(self, exponent: float) -> Adams:
        return _Tilted(rule=self.rule, steps=self.steps, exponent=exponent)


@dataclass(frozen=True)
class Seeds(_Reverse):
    """SEEDS-2: two calls per step, half-way in log-SNR, with the noises of both halves; kappa = 0 is DPM-Solver++(2S).

    The state at which the second call is made has the noise of the first half in it, and that same noise, decayed over
    the second half, is part of the step's.

    Source: Gonzalez et al.: SEEDS: exponential SDE solvers for fast high-quality sampling (2023),
    https://arxiv.org/abs/2305.14267
    """

    @property
    def order(self) -> int:
        return 2

    @property
    def stages(self) -> int:
        return 2

    def step(self, at: At) -> Row:
        ode, exponent = SingleStep(variable="data", rule="midpoint"), self._exponent(at)
        if exponent == 0.0:
            return ode.step(at)
        line = _tilted(ode.line(at), at, exponent)
        start, end = line.place(at.t, at.start), line.place(at.s, at.end)
        middle = line.between(start, end, 0.5)
        # Half of the exponent belongs to each half: the noise of standard deviation `fresh`, of which `left` is left.
        fresh, left = math.sqrt(-math.expm1(-exponent / 2)), math.exp(-exponent / 4)
        first, second = at.randn(at.t, middle.t), at.randn(middle.t, at.s)
        values = [(start, line.value(at.ask(at.x, at.t)))]
        x = _moved(line, at.x, start, middle, values) + (middle.c.sigma * fresh) * first
        values.append((middle, line.value(at.ask(x, middle.t))))
        moved = _moved(line, at.x, start, end, values, "midpoint")
        return moved + (at.end.sigma * fresh * left) * first + (at.end.sigma * fresh) * second
