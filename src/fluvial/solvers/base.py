"""What a solver is: facts, and a step written on rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fluvial.solvers.rows import At, Row


@dataclass(frozen=True)
class Solver:
    """Facts and a step. A solver has no memory of its own: one object may serve any number of runs.

    Facts:
        order: of convergence, in the deterministic case.
        stages: network calls per step (the landing step makes `stages - 1`, but at least one).
        stochastic: whether noise is added; then the model needs a score.
    """

    order: ClassVar[int]
    stages: ClassVar[int]

    @property
    def stochastic(self) -> bool:
        return False

    def step(self, at: At) -> Row:
        """The next state's row, for the step `at` from at.t to at.s."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        return type(self).__name__
