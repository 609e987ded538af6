"""Dopri5: the ODE to a tolerance, every sample with its own steps."""

from __future__ import annotations

from dataclasses import dataclass

from fluvial.errors import OptionError
from fluvial.paths import Path
from fluvial.solvers.base import Solver
from fluvial.solvers.rows import At, Row


@dataclass(frozen=True)
class Dopri5(Solver):
    """Dormand and Prince's pair of orders 5 and 4, with the step of each sample chosen from its own error.

    Args:
        rtol, atol: a step is taken where its error is below atol + rtol |x|, root mean square over a sample, in path
            units. The error of a whole run is of that order for most samples, and tens of times larger for those that
            pass where the flow parts.
        along: the path in whose clock to integrate; None: the model's own. Noise levels that this path lacks are
            crossed in one DDIM step, whatever the tolerances.

    Every sample takes its own steps, whatever the batch: six network calls each, and two to begin with. The given times
    are visited on the way; by default there is none between start and end. See `fluvial.adaptive` for the control of
    steps and for the landing.

    Source: Dormand, Prince: A family of embedded Runge-Kutta formulae (1980),
    https://doi.org/10.1016/0771-050X(80)90013-3
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    along: Path | None = None

    def __post_init__(self) -> None:
        if not (self.rtol > 0 and self.atol > 0):
            raise OptionError(f"rtol is {self.rtol} and atol {self.atol}; expected positive numbers")

    @property
    def order(self) -> int:
        return 5

    @property
    def stages(self) -> int:
        return 6

    def step(self, at: At) -> Row:
        raise OptionError(
            "Dopri5 chooses its own steps, which depend on the samples: it has no rows, and its number of network "
            "calls is known only after a run (Trajectory.nfe, or a callback's step.nfe)"
        )
