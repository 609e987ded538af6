"""The order that a solver declares, observed: float64, exact model, inside the path."""

from __future__ import annotations

import functools
import math

import pytest
import torch

import fluvial as fl
from fluvial.exact import GaussianMixture
from problems import PATHS, state

LOW, HIGH = 0.05, 0.95


def overlapping():
    """Two components that overlap: nonlinear, and without the ridge between modes where errors blow up."""
    means = torch.tensor([[0.8, 0.0], [-0.6, 0.5]], dtype=torch.float64)
    return GaussianMixture(means, torch.tensor([0.8, 0.6]), torch.tensor([0.4, 0.6]))


def deterministic():
    return [name for name in fl.solvers.names() if not fl.solvers.named(name).stochastic]


def end(model, solver, steps, x):
    times = torch.linspace(LOW, HIGH, steps + 1, dtype=torch.float64)
    return fl.sample(model, state=x, solver=solver, times=times, steps=steps)


@functools.cache
def problem(name):
    """The exact model on this path, a state at LOW, and where the flow takes it, to order 3 or more."""
    path = PATHS[name]
    model, x = overlapping().model(path), state(overlapping(), path, LOW, 16, seed=4)
    fine, finer = end(model, "heun", 500, x), end(model, "heun", 1000, x)
    return model, x, finer + (finer - fine) / 3


def observed_order(solver, name, steps=150):
    """log2 of the ratio of errors, from `steps` to twice as many."""
    model, x, truth = problem(name)
    first, second = (float((end(model, solver, n, x) - truth).norm()) for n in (steps, 2 * steps))
    assert second > 1e-9
    return math.log2(first / second)


@pytest.mark.parametrize("name", ["rectified", "cosine", "vp", "ve", "edm"])
@pytest.mark.parametrize("solver", deterministic())
def test_observed_order_is_the_declared_one(solver, name):
    assert observed_order(solver, name) == pytest.approx(fl.solvers.named(solver).order, abs=0.2)


def test_a_wrong_formula_shows_in_the_order():
    """Heun with its second slope taken at the first's place is Euler; the measure must say so."""

    class Lazy(fl.solvers.Heun):
        def step(self, at):
            first = at.ask(at.x, at.t)
            second = at.ask(at.x + (at.s - at.t) * first.velocity, at.t)
            return at.x + ((at.s - at.t) / 2) * (first.velocity + second.velocity)

    assert observed_order(Lazy(), "cosine") < 1.2


@pytest.mark.parametrize(
    ("name", "order", "stages"),
    [("euler", 1, 1), ("heun", 2, 2), ("ddim", 1, 1), ("euler_maruyama", 1, 1), ("langevin", 1, 1)],
)
def test_declared_facts(name, order, stages):
    solver = fl.solvers.named(name)
    assert (solver.order, solver.stages) == (order, stages)
