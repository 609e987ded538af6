"""Rows: a solver's step as numbers.

Every solver here is linear in what it combines: the state, the network's outputs, and noise. So a step can be run once
on symbols instead of tensors, and what comes out is the step: for each network call the combination that makes its
input, and at last the combination that is the next state. A solver is written like its paper,

    slope = at.ask(at.x, t).velocity
    return at.x + (s - t) * slope

with `Row`s for quantities; tracing it gives Python floats, computed in float64 before the first network call. The
sampling loop then only multiplies and adds; anything else that can hand over network outputs (a scheduler in another
library, say) may drive the same rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluvial.paths import Coefficients
from fluvial.predictions import Query, solve

# Slots: where a run keeps the tensors that rows combine. The state, then outputs and noises as they come.
STATE = 0


class Row:
    """A linear combination of slots, {slot: coefficient}. Adds, subtracts and scales like the tensor it stands for."""

    __slots__ = ("terms",)

    def __init__(self, terms: dict[int, float]) -> None:
        self.terms = terms

    def __add__(self, other: Row) -> Row:
        terms = dict(self.terms)
        for slot, coefficient in other.terms.items():
            terms[slot] = terms.get(slot, 0.0) + coefficient
        return Row(terms)

    def __rmul__(self, factor: float) -> Row:
        return Row({slot: factor * coefficient for slot, coefficient in self.terms.items()})

    def __sub__(self, other: Row) -> Row:
        return self + -1.0 * other

    def fixed(self) -> Recipe:
        """The combination as it will be computed: without zeros, a term of coefficient 1 first."""
        terms = [(slot, c) for slot, c in self.terms.items() if c != 0.0]
        terms.sort(key=lambda term: term[1] != 1.0)
        return Recipe(tuple(terms))


class Recipe(NamedTuple):
    """A finished row: (slot, coefficient) pairs."""

    terms: tuple[tuple[int, float], ...]

    def __call__(self, slots: list[Any]) -> Tensor:
        """The combination of these tensors."""
        terms = self.terms
        if not terms:
            return torch.zeros_like(slots[STATE])
        slot, coefficient = terms[0]
        if len(terms) == 1:
            return slots[slot] if coefficient == 1.0 else slots[slot] * coefficient
        start = slots[slot] if coefficient == 1.0 else slots[slot] * coefficient
        slot, coefficient = terms[1]
        total = torch.add(start, slots[slot], alpha=coefficient)
        for slot, coefficient in terms[2:]:
            total.add_(slots[slot], alpha=coefficient)
        return total


class Asked:
    """A network call in a step being traced: the pair, and what follows from it, as rows."""

    __slots__ = ("_out", "_query", "_x")

    def __init__(self, query: Query, x: Row, out: Row) -> None:
        self._query, self._x, self._out = query, x, out

    def want(self, on_data: float, on_noise: float, what: str = "estimate") -> Row:
        """on_data * data + on_noise * noise."""
        query = self._query
        on_x, on_out = solve(query.state, query.weights, (on_data, on_noise), what)
        return on_x * self._x + on_out * self._out

    @property
    def data(self) -> Row:
        return self.want(1.0, 0.0, "data")

    @property
    def noise(self) -> Row:
        return self.want(0.0, 1.0, "noise")

    @property
    def velocity(self) -> Row:
        return self.want(self._query.c.dalpha, self._query.c.dsigma, "velocity")


class Stage(NamedTuple):
    """One network call: the recipe of its input, the query that makes the call, the slot its output goes to."""

    state: Recipe
    query: Query
    slot: int


@dataclass
class At:
    """A step from t to s being traced: what a solver's `step` sees.

    Attributes:
        x: the state's row.
        t, s: its two times.
        start, end: the path's coefficients there; at a landing, `end` is the data itself (alpha 1, sigma 0).
        lands: whether s is the data, where no network call is made.
    """

    t: float
    s: float
    start: Coefficients
    end: Coefficients
    lands: bool
    query_at: Callable[[float], Query]
    x: Row = field(default_factory=lambda: Row({STATE: 1.0}))
    stages: list[Stage] = field(default_factory=list)
    noises: list[int] = field(default_factory=list)
    first: Asked | None = None
    _next_slot: int = STATE + 1

    def ask(self, x: Row, t: float) -> Asked:
        """Calls the network at state x and time t."""
        query = self.query_at(t)
        asked = Asked(query, x, Row({self._slot(): 1.0}))
        self.stages.append(Stage(x.fixed(), query, self._next_slot - 1))
        if self.first is None:
            self.first = asked
        return asked

    def randn(self) -> Row:
        """Fresh standard normal noise, its own for this step."""
        self.noises.append(self._slot())
        return Row({self.noises[-1]: 1.0})

    def _slot(self) -> int:
        self._next_slot += 1
        return self._next_slot - 1


class Step(NamedTuple):
    """A traced step: its calls in order, the slots to fill with noise, and the next state."""

    t: float
    s: float
    stages: tuple[Stage, ...]
    noises: tuple[int, ...]
    next: Recipe
    slots: int
    first: Asked

    def data(self, slots: list[Any]) -> Tensor:
        """The data estimate of the step's first call."""
        return self.first.data.fixed()(slots)


def trace(step: Callable[[At], Row], at: At) -> Step:
    """The rows of one step: runs `step` on symbols."""
    result = step(at).fixed()
    noises: tuple[int, ...] = ()
    if at.noises:
        # A noise whose coefficient came out as zero is not drawn.
        recipes = [result, *(stage.state for stage in at.stages)]
        used = {slot for recipe in recipes for slot, _ in recipe.terms}
        noises = tuple(slot for slot in at.noises if slot in used)
    if at.first is None:
        raise ValueError(f"the step from {at.t} to {at.s} asks the network nothing; expected at least one call")
    return Step(at.t, at.s, tuple(at.stages), noises, result, at._next_slot, at.first)
