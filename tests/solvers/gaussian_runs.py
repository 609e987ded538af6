"""Runs on Gaussian data of mean 0, whose variance is known without a single sample.

There the exact model is linear, out = k x, so that a step is a matrix: what it leaves (the next state and what is
remembered) as a combination of what it found and of its noises. Covariances go through the steps of a plan exactly.
"""

from __future__ import annotations

import math

import torch

from fluvial.plans import plan
from problems import gaussian

DATA_STD = 0.5


def final_std(path, solver, times, start=None, data_std=DATA_STD):
    """The standard deviation at the end of a run, from its rows; it starts at sigma(t0), or at `start`."""
    model = gaussian(0.0, data_std).model(path)
    assert model.prediction.name == "v"
    std = path(times[0]).sigma if start is None else start
    covariance = torch.tensor([[std**2]], dtype=torch.float64)
    for step in plan(model, solver, times):
        covariance = through(step, covariance, data_std)
    return math.sqrt(covariance[0, 0])


def through(step, covariance, data_std=DATA_STD):
    """The covariance of the state and of what is remembered, after a step."""
    found = 1 + step.memory
    basis = torch.eye(found + len(step.noises), dtype=torch.float64)
    slots = [*basis[:found], *[None] * (step.slots - found)]
    for row, noise in zip(basis[found:], step.noises):
        slots[noise.slot] = row
    for stage in step.stages:
        alpha, sigma, *_ = stage.query.c
        # E[v | x] = k x for data Normal(0, data_std²).
        k = alpha * sigma * (1 - data_std**2) / (alpha**2 * data_std**2 + sigma**2)
        slots[stage.slot] = k * stage.state(slots)
    left = torch.stack([step.next(slots), *(kept(slots) for kept in step.kept), *basis[1:found]])
    given = basis.clone()
    given[:found, :found] = covariance[:found, :found]
    return left @ given @ left.T


def law(path, t):
    """The standard deviation of the path's own law at t."""
    c = path(t)
    return math.hypot(c.alpha * DATA_STD, c.sigma)


def uniform(steps, t_start=0.0, t_end=1.0):
    return [t_start + (t_end - t_start) * k / steps for k in range(steps)] + [t_end]


def ratio(path, solver, steps, t_end=1.0, t_start=0.0, truth=None, **given):
    """The standard deviation at the end of so many uniform steps, to the true one."""
    truth = (DATA_STD if t_end == 1.0 else law(path, t_end)) if truth is None else truth
    return final_std(path, solver, uniform(steps, t_start, t_end), **given) / truth


def errors(path, solver, steps, **given):
    return [abs(ratio(path, solver, n, **given) - 1) for n in steps]
