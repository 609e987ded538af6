"""One step of a teacher's ODE, by any solver, for samples that are each at a time of their own.

A solver's step is rows of numbers, made for one pair of times. Here those of a whole grid are stacked into tables, and
each sample takes the numbers of its own place: one network call a stage, for the whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fluvial import plans, solvers
from fluvial.errors import OptionError
from fluvial.model import Model
from fluvial.predictions import spread
from fluvial.solvers import Solver
from fluvial.solvers.rows import STATE, Recipe, Step


class TeacherSteps:
    """From each time of a grid to the next, as `fl.sample(model, state=x, times=[t, s], solver=…)` goes.

    Args:
        model: the teacher.
        solver: a name or an object. One that remembers earlier steps has none to remember here.
        times: the grid, rising; where it ends at 1 the last step lands on the data.

    Raises:
        OptionError: for a solver that draws noise, or makes steps of its own.
    """

    def __init__(self, model: Model, solver: str | Solver, times: Sequence[float]) -> None:
        solver = solvers.named(solver)
        if solver.stochastic or isinstance(solver, solvers.Dopri5):
            kind = "stochastic" if solver.stochastic else "adaptive"
            raise OptionError(f"solver {solver.name} is {kind}; expected one that makes one ODE step, such as heun")
        self.model = model
        steps = [plans.forward(model, solver, pair)[0] for pair in pairwise(times)]
        # A landing step has fewer stages: the others' are then asked at the state it has, and count for nothing.
        self.stages = max(len(step.stages) for step in steps)
        asked = [[self._time(step, j) for j in range(self.stages)] for step in steps]
        self.times = torch.tensor(asked, dtype=torch.float64)  # (places, stages)
        rows = [[self._numbers(self._stage(step, j)) for j in range(self.stages)] for step in steps]
        self.states = torch.tensor(rows, dtype=torch.float64)  # (places, stages, slots)
        self.ends = torch.tensor([self._numbers(step.next) for step in steps], dtype=torch.float64)  # (places, slots)

    def __call__(self, x: Tensor, place: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """The states (B, …) at the times after those of number `place` (B,), from the states x there."""
        times, states, ends = (table.to(place.device)[place] for table in (self.times, self.states, self.ends))
        slots = [x]
        for j in range(self.stages):
            slots.append(self.model.query(times[:, j]).call(_combined(states[:, j], slots), cond))
        return _combined(ends, slots)

    def _numbers(self, recipe: Recipe) -> list[float]:
        row = [0.0] * (1 + self.stages)
        for slot, number in recipe.terms:
            row[slot] = number
        return row

    def _stage(self, step: Step, j: int) -> Recipe:
        return step.stages[j].state if j < len(step.stages) else Recipe(((STATE, 1.0),))

    def _time(self, step: Step, j: int) -> float:
        return step.stages[j].t if j < len(step.stages) else step.t


def _combined(numbers: Tensor, slots: Sequence[Tensor]) -> Tensor:
    """The sum of the slots (B, …), each sample's times its own numbers (B, slots)."""
    total = spread(numbers[:, 0], slots[0]) * slots[0]
    for k, slot in enumerate(slots[1:], start=1):
        total = total + spread(numbers[:, k], slot) * slot
    return total
