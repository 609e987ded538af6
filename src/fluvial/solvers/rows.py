"""Rows: a solver's step as numbers.

Every solver here is linear in what it combines: the state, the network's outputs, what earlier steps left, and noise.
So a step can be run once on symbols instead of tensors, and what comes out is the step: for each network call the
combination that makes its input, and at last the combination that is the next state. A solver is written like its
paper,

    slope = at.ask(at.x, t).velocity
    return at.x + (s - t) * slope

with `Row`s for quantities; tracing it gives Python floats, computed in float64 before the first network call. The
sampling loop then only multiplies and adds; anything else that can hand over network outputs (a scheduler in another
library, say) may drive the same rows.

A multistep method says what to remember, `at.keep(value=estimate.data)`, and finds it in `at.past` in later steps.
There is no state but the tensors that a step is handed and hands on, so one solver may serve any number of runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluvial.paths import Coefficients, Path
from fluvial.predictions import Query, solve

# Slots: where a step keeps the tensors that rows combine. The state, what is remembered (the newest first), then
# outputs and noises as they come.
STATE = 0


class Row:
    """A linear combination of slots, {slot: coefficient}. Adds, subtracts and scales like the tensor it stands for.

    A coefficient is a float, or a tensor that broadcasts against the state: a number for each position.
    """

    __slots__ = ("terms",)

    def __init__(self, terms: dict[int, Any]) -> None:
        self.terms = terms

    def __add__(self, other: Row) -> Row:
        terms = dict(self.terms)
        for slot, coefficient in other.terms.items():
            terms[slot] = terms.get(slot, 0.0) + coefficient
        return Row(terms)

    def __rmul__(self, factor: Any) -> Row:
        return Row({slot: factor * coefficient for slot, coefficient in self.terms.items()})

    def __sub__(self, other: Row) -> Row:
        return self + -1.0 * other

    def fixed(self) -> Recipe:
        """The combination as it will be computed: without zeros, a term of coefficient 1 first."""
        numbers = [(slot, c) for slot, c in self.terms.items() if not isinstance(c, Tensor) and c != 0.0]
        numbers.sort(key=lambda term: term[1] != 1.0)
        return Recipe(tuple(numbers), tuple((slot, c) for slot, c in self.terms.items() if isinstance(c, Tensor)))


class Recipe(NamedTuple):
    """A finished row: (slot, coefficient) pairs, the coefficients floats, and those that are tensors."""

    terms: tuple[tuple[int, float], ...]
    spread: tuple[tuple[int, Tensor], ...] = ()

    def __call__(self, slots: list[Any]) -> Tensor:
        """The combination of these tensors."""
        terms = self.terms
        if not terms or self.spread:
            return self._general(slots)
        slot, coefficient = terms[0]
        total = slots[slot] if coefficient == 1.0 else slots[slot] * coefficient
        if len(terms) == 1:
            return total
        slot, coefficient = terms[1]
        total = torch.add(total, slots[slot], alpha=coefficient)
        for slot, coefficient in terms[2:]:
            total.add_(slots[slot], alpha=coefficient)
        return total

    def _general(self, slots: list[Any]) -> Tensor:
        total = torch.zeros_like(slots[STATE])
        for slot, coefficient in self.terms:
            total = total + slots[slot] * coefficient
        for slot, coefficient in self.spread:
            total = total + slots[slot] * coefficient.to(total)
        return total


class Asked:
    """A network call in a step being traced: the pair, and what follows from it, as rows."""

    __slots__ = ("_out", "_query", "_x", "t")

    def __init__(self, query: Query, x: Row, out: Row, t: float) -> None:
        self._query, self._x, self._out, self.t = query, x, out, t

    @property
    def c(self) -> Coefficients:
        """The path's coefficients where the network was asked."""
        return self._query.c

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
    t: float


class Noise(NamedTuple):
    """Standard normal noise that a step draws: its slot, and the stretch of time it belongs to (None: none)."""

    slot: int
    stretch: tuple[float, float] | None


class Past(NamedTuple):
    """What an earlier step left: its time, the coefficients there, and the rows it kept, by name."""

    t: float
    c: Coefficients
    rows: Mapping[str, Row]


@dataclass
class At:
    """A step from t to s being traced: what a solver's `step` sees.

    Attributes:
        t, s: its two times.
        start, end: the path's coefficients there; at a landing, `end` is the data itself (alpha 1, sigma 0).
        lands: whether s is the data, where no network call is made.
        path: what the state lies on.
        query_at: the model's query at a time.
        x: the state's row.
        past: what the steps before left, the newest first.
        left: the steps until the run lands on the data, this one included; infinite where it does not.
        stretch: the time that is this step's alone among all steps of the run, if any: what its noise belongs to.
    """

    t: float
    s: float
    start: Coefficients
    end: Coefficients
    lands: bool
    path: Path
    query_at: Callable[[float], Query]
    past: Sequence[Past] = ()
    left: float = math.inf
    stretch: tuple[float, float] | None = None
    x: Row = field(default_factory=lambda: Row({STATE: 1.0}))
    stages: list[Stage] = field(default_factory=list)
    noises: list[Noise] = field(default_factory=list)
    kept: dict[str, Row] = field(default_factory=dict)
    first: Asked | None = None
    _next_slot: int = STATE + 1

    def __post_init__(self) -> None:
        numbered = []
        for past in self.past:
            numbered.append(past._replace(rows={name: Row({self._slot(): 1.0}) for name in past.rows}))
        self.past = numbered
        self.memory = self._next_slot - 1

    def ask(self, x: Row, t: float) -> Asked:
        """Calls the network at state x and time t."""
        query = self.query_at(t)
        asked = Asked(query, x, Row({self._slot(): 1.0}), t)
        self.stages.append(Stage(x.fixed(), query, self._next_slot - 1, t))
        if self.first is None:
            self.first = asked
        return asked

    def randn(self, start: float | None = None, end: float | None = None) -> Row:
        """Fresh standard normal noise, its own for this step.

        It belongs to the time from `start` to `end`, a part of the step's own stretch (by default all of it, for the
        first noise of a step): as an increment of a Brownian path it then stays much the same when the number of
        steps changes. No two noises may share time; further ones belong to none.
        """
        if start is None or end is None or self.stretch is None:
            stretch = None if self.noises else self.stretch
        else:
            stretch = (start, end)
        self.noises.append(Noise(self._slot(), stretch))
        return Row({self.noises[-1].slot: 1.0})

    def keep(self, **rows: Row) -> None:
        """Remembers these rows for the steps to come."""
        self.kept = rows

    def _slot(self) -> int:
        self._next_slot += 1
        return self._next_slot - 1


def noised_back(at: At, x: Row, of: Coefficients, to: Coefficients, inflate: float = 1.0) -> Row:
    """x, a state where the coefficients are `of`, noised back to where they are `to` by the path's forward kernel.

    x' = (alpha'/alpha) x + √(sigma'² - (alpha' sigma/alpha)²) noise.
    """
    ratio = to.alpha / of.alpha
    added = math.sqrt(max(to.sigma**2 - (ratio * of.sigma) ** 2, 0.0))
    return ratio * x + (inflate * added) * at.randn()


class Step(NamedTuple):
    """A traced step: its calls in order, the noises to draw, what it remembers, and the next state.

    `memory` is how many of the remembered tensors it reads.
    """

    t: float
    s: float
    stages: tuple[Stage, ...]
    noises: tuple[Noise, ...]
    kept: tuple[Recipe, ...]
    next: Recipe
    memory: int
    slots: int
    first: Asked
    lands: bool

    def data(self, slots: list[Any]) -> Tensor:
        """The data estimate of the step's first call; what a landing step lands on."""
        return (self.next if self.lands else self.first.data.fixed())(slots)

    def __call__(
        self, x: Tensor, memory: Sequence[Tensor], noises: Sequence[Tensor], cond: Mapping[str, Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Any]]:
        """One step, a pure function: the next state, the tensors remembered (the newest first), and all slots.

        Args:
            x: the state (B, …).
            memory: what was remembered so far, `memory` tensors or more.
            noises: standard normal, one for each of `noises`.
            cond: the conditions.
        """
        slots: list[Any] = [x, *memory[: self.memory], *[None] * (self.slots - self.memory - 1)]
        for noise, drawn in zip(self.noises, noises):
            slots[noise.slot] = drawn
        for state, query, slot, _ in self.stages:
            slots[slot] = query.call(state(slots), cond)
        return self.next(slots), [recipe(slots) for recipe in self.kept], slots


def trace(step: Callable[[At], Row], at: At) -> Step:
    """The rows of one step: runs `step` on symbols."""
    result = step(at).fixed()
    if at.first is None:
        raise ValueError(f"the step from {at.t} to {at.s} asks the network nothing; expected at least one call")
    kept = tuple(row.fixed() for row in at.kept.values())
    # A noise whose coefficient came out as zero is not drawn.
    recipes = [result, *kept, *(stage.state for stage in at.stages)]
    used = {slot for recipe in recipes for slot, _ in (*recipe.terms, *recipe.spread)} if at.noises else set()
    noises = tuple(noise for noise in at.noises if noise.slot in used)
    first, lands = at.first, at.lands
    return Step(at.t, at.s, tuple(at.stages), noises, kept, result, at.memory, at._next_slot, first, lands)
