"""What a solver is: facts, a step written on rows, and the legs that a run is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

from fluvial.paths import Path
from fluvial.solvers.rows import At, Row


class Leg(NamedTuple):
    """One step of a run: from the state at t to time s.

    With `start` < t the state is first noised back to `start`, by the path's own forward kernel, and the step goes from
    there; the noise is then scaled by `inflate`.
    """

    t: float
    s: float
    start: float | None = None
    inflate: float = 1.0


@dataclass(frozen=True)
class Solver:
    """Facts and a step. A solver has no state of its own: one object may serve any number of runs.

    Facts:
        order: of convergence, in the deterministic case.
        stages: network calls per step (the landing step makes one less, but at least one, where the last call of a step
            is at its end).
        needs: what it asks of the model: "velocity", "data", "noise", "v" or "score".
        stochastic: whether noise is added; then the model needs a score.
        memory: how many earlier steps it looks back on; 0 is a one-step method.
    """

    needs: ClassVar[str] = "velocity"

    @property
    def order(self) -> int:
        raise NotImplementedError

    @property
    def stages(self) -> int:
        return 1

    @property
    def stochastic(self) -> bool:
        return False

    @property
    def memory(self) -> int:
        return 0

    def legs(self, times: Sequence[float], path: Path) -> list[Leg]:
        """The steps of a run that visits these times."""
        return [Leg(t, s) for t, s in pairwise(times)]

    def step(self, at: At) -> Row:
        """The next state's row, for the step `at` from at.t to at.s."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        return type(self).__name__
