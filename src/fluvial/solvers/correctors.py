"""Langevin steps at a fixed time, between the steps that change it.

    x ← x + epsilon score + √(2 epsilon) xi        leaves the law at that time, for small epsilon, as it is

and pulls a state that is off it back. The step is taken in proportion to sigma², the scale on which the score varies:
epsilon = step sigma², so that with score = -noise/sigma

    x ← x - step sigma noise + √(2 step) sigma xi.

Langevin steps are not corrected by a Metropolis test: at a level of variance V they run to a variance greater by
1/(1 - step sigma²/2V), a bias that vanishes with `step`, and towards the data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from fluvial.errors import OptionError
from fluvial.paths import Path
from fluvial.solvers.adaptive import Dopri5
from fluvial.solvers.base import Leg, Solver
from fluvial.solvers.deterministic import DDIM
from fluvial.solvers.rates import Stochastic
from fluvial.solvers.rows import At, Row


def _langevin(at: At, x: Row, step: float, count: int) -> Row:
    """`count` Langevin steps at the step's end."""
    sigma = at.end.sigma
    for _ in range(count):
        noise = at.ask(x, at.s).noise
        x = x - (step * sigma) * noise + (math.sqrt(2.0 * step) * sigma) * at.randn()
    return x


@dataclass(frozen=True)
class PredictorCorrector(Stochastic):
    """A step of any solver, then Langevin steps at the time it came to; none on the data. The double loop.

    The paper's step, epsilon = 2 (snr |xi|/|score|)², is taken with both norms at their expectations, √d and
    √d/sigma, so that it does not depend on the batch: step = 2 snr².

    Args:
        correctors: how many Langevin steps; 0 is the predictor, bit for bit. Each costs a call.
        snr: how long they are; 0.16 as in the paper.
        predictor: any solver with steps of its own; default `DDIM()`.

    Source: Song et al.: Score-based generative modeling through SDEs (2021), https://arxiv.org/abs/2011.13456, alg. 4-5
    """

    correctors: int = 1
    snr: float = 0.16
    predictor: Solver = field(default_factory=DDIM)

    def __post_init__(self) -> None:
        if not 0.0 <= self.snr < math.inf:
            raise OptionError(f"snr is {self.snr}; expected a finite number, 0 or more, such as 0.16")
        if not (isinstance(self.correctors, int) and self.correctors >= 0):
            raise OptionError(f"correctors is {self.correctors}; expected how many Langevin steps, 0 or more")
        if isinstance(self.predictor, Dopri5):
            raise OptionError("predictor is Dopri5, which chooses its own steps; expected a solver of given steps")

    @property
    def order(self) -> int:
        return self.predictor.order

    @property
    def stages(self) -> int:
        return self.predictor.stages + self._count

    @property
    def ode_needs(self) -> str:  # type: ignore[override]
        return self.predictor.needs

    @property
    def stochastic(self) -> bool:
        return self._count > 0 or self.predictor.stochastic

    @property
    def memory(self) -> int:
        return self.predictor.memory

    def legs(self, times: Sequence[float], path: Path) -> list[Leg]:
        return self.predictor.legs(times, path)

    def step(self, at: At) -> Row:
        x = self.predictor.step(at)
        return x if at.lands else _langevin(at, x, 2.0 * self.snr**2, self._count)

    @property
    def _count(self) -> int:
        return self.correctors if self.snr > 0.0 else 0


@dataclass(frozen=True)
class AnnealedLangevin(Stochastic):
    """Langevin steps at every noise level of the run: the sampler of score networks, without an ODE in it.

    Between levels x/alpha stays as it is (from pure noise, where that does not exist, the pair is mixed at the first
    level by one call more); the last step lands on the data estimate. It takes many levels, or many steps at each: what
    is off the law at one level is corrected at the next ones only.

    Args:
        step_size: epsilon/sigma². The paper's epsilon counts twice: its 2e-5 at sigma = 0.01 is 0.1 here (and its count
            100).
        count: how many Langevin steps at each level; each costs a call.

    Source: Song, Ermon: Generative modeling by estimating gradients of the data distribution (2019),
    https://arxiv.org/abs/1907.05600, alg. 1; Song, Ermon: Improved techniques for training score-based generative
    models (2020), https://arxiv.org/abs/2006.09011, for the landing
    """

    step_size: float = 0.1
    count: int = 20

    def __post_init__(self) -> None:
        if not 0.0 < self.step_size < 1.0:
            raise OptionError(f"step_size is {self.step_size}; expected a share of sigma² above 0 and below 1")
        if not (isinstance(self.count, int) and self.count >= 1):
            raise OptionError(f"count is {self.count}; expected how many Langevin steps, 1 or more")

    @property
    def stages(self) -> int:
        return self.count

    @property
    def stochastic(self) -> bool:
        return True

    def step(self, at: At) -> Row:
        if at.lands:
            return at.ask(at.x, at.t).data
        if at.start.alpha == 0.0:
            x = at.ask(at.x, at.t).want(at.end.alpha, at.end.sigma, "state")
        else:
            x = (at.end.alpha / at.start.alpha) * at.x
        return _langevin(at, x, self.step_size, self.count)
