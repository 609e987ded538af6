"""Plans: the rows of every step of a run, made before the first network call and kept for the next run.

A plan depends on the model's convention, the solver and the times, and not on any state: so it is made once, in
float64, and a second run with the same arguments finds it ready.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from fluvial.model import Model
from fluvial.paths import Coefficients
from fluvial.predictions import Query
from fluvial.solvers import Solver
from fluvial.solvers.base import Leg
from fluvial.solvers.rows import At, Past, Row, Step, noised_back, trace

Plan = tuple[Step, ...]
_KEPT = 8
_DATA = Coefficients(1.0, 0.0, 0.0, 0.0)


def plan(model: Model, solver: Solver, times: Sequence[float]) -> Plan:
    """The rows of every step of this solver along these rising times."""
    return _cached(model, solver, times, forward)


def plan_back(model: Model, solver: Solver, times: Sequence[float]) -> Plan:
    """The rows of the way back, from the data at the last of these rising times to the first."""
    return _cached(model, solver, times, backward)


def forward(model: Model, solver: Solver, times: Sequence[float]) -> Plan:
    """As `plan`, made anew."""
    return _Planner(model, solver, times[:-1] if times[-1] == 1.0 else times).steps(solver.legs(times, model.path))


def backward(model: Model, solver: Solver, times: Sequence[float]) -> Plan:
    """As `plan_back`, made anew."""
    back = times[-2::-1]
    planner = _Planner(model, solver, back)
    leaving = At(1.0, back[0], _DATA, planner.query_at(back[0]).c, False, model.path, planner.query_at)
    return (trace(_leave_data, leaving), *planner.steps(solver.legs(back, model.path)))


def along(model: Model, solver: Solver, times: Sequence[float]) -> Plan:
    """The rows of a run along any times, rising or falling, that never lands."""
    return _Planner(model, solver, times).steps(solver.legs(times, model.path), land=False)


def _cached(model: Model, solver: Solver, times: Sequence[float], make: Any) -> Plan:
    """The plan, from the model's own few last ones."""
    plans = model.__dict__.setdefault("_plans", {})
    # What the calls were made for: a network replaced, moved to another dtype, or a convention altered voids the plan.
    network = model.network
    parameter = next(iter(model.parameters()), None)
    token = (id(network), model.convention, None if parameter is None else parameter.dtype)
    try:
        key = (make, solver, tuple(times))
        found = plans.get(key)
    except TypeError:  # a solver of the user's own that cannot be hashed
        return make(model, solver, times)
    if found is None or found[0][0] != token[0] or found[0][1] is not token[1] or found[0][2] != token[2]:
        if len(plans) >= _KEPT:
            plans.pop(next(iter(plans)))
        plans[key] = found = (token, make(model, solver, times))
    return found[1]


class _Planner:
    """Traces the steps, asking the model for the queries of all known times at once."""

    def __init__(self, model: Model, solver: Solver, visited: Sequence[float]) -> None:
        self.model, self.solver = model, solver
        self.queries: dict[float, Query] = dict(zip(visited, model.queries(visited)))
        # Where one segment meets the next the velocity jumps.
        self.joints = [] if model.segments is None else model.segments.nodes(model.path)[1:-1]

    def query_at(self, t: float) -> Query:
        if t not in self.queries:
            self.queries[t] = self.model.queries([t])[0]
        return self.queries[t]

    def steps(self, legs: Sequence[Leg], land: bool = True) -> Plan:
        steps: list[Step] = []
        past: tuple[Past, ...] = ()
        furthest = legs[0].t
        lands = land and legs[-1].s == 1.0
        for index, leg in enumerate(legs):
            # A run that ends on the data never calls the network at sigma = 0, whatever the path's own end.
            if leg.t in self.joints:
                past = ()
            at = self._at(leg, lands and leg.s == 1.0, past)
            at.left = len(legs) - index if lands else math.inf
            if leg.t >= furthest and leg.s > furthest:
                at.stretch, furthest = (leg.t, leg.s), leg.s
            if leg.start is not None:
                at.x = noised_back(at, at.x, self.query_at(leg.t).c, at.start, leg.inflate)
            steps.append(trace(self.solver.step, at))
            past = (Past(at.t, at.start, at.kept), *past)[: self.solver.memory] if at.kept else ()
        return tuple(steps)

    def _at(self, leg: Leg, lands: bool, past: tuple[Past, ...]) -> At:
        start = leg.t if leg.start is None else leg.start
        end = _DATA if lands else self.query_at(leg.s).c
        joint, ask = max(leg.t, leg.s), self.query_at
        if joint in self.joints:
            ask = partial(self._query_before, joint)
        if self.model.jumps:
            # A flow map is asked for the way to the end of the step.
            ask = partial(self._query_to, None if lands else leg.s)
        return At(start, leg.s, self.query_at(start).c, end, lands, self.model.path, ask, past)

    def _query_to(self, end: float | None, t: float) -> Query:
        return self.model.query_to(t, end)

    def _query_before(self, joint: float, t: float) -> Query:
        """The query at t; at the joint, of the segment that ends there."""
        segments = self.model.segments
        if t != joint or segments is None:
            return self.query_at(t)
        return self.query_at(t)._replace(call=self.query_at(segments.before(self.model.path, t)).call)


def _leave_data(at: At) -> Row:
    """From the data to the first noise level: x = alpha data + sigma noise(x), by fixed-point iteration."""
    alpha, sigma = at.end.alpha, at.end.sigma
    state = alpha * at.x
    for _ in range(4):
        state = alpha * at.x + sigma * at.ask(state, at.s).noise
    return state
