"""flow_matching's ODESolver (torchdiffeq's fixed-step methods) in its own scheduler's terms, alpha = t, sigma = 1 - t.

It has no variance-exploding scheduler, and its ScheduleTransformedModel (VP to CondOT) gives NaN at the ends. The
other families are therefore brought to its path exactly, as that transformation means to: x / (alpha + sigma) at
t = 1 / (1 + level). Two endings: solve to t = 1, or to the last level and let one more call give the data.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator

import torch
from torch import Tensor

from peers.method import Method
from problems import Problem

STAGES = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}


def _run(method: str, ending: str, problem: Problem, levels: list[float]) -> Tensor:
    from flow_matching.solver import ODESolver

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        data, noise = problem.network.pair(x, t.item(), 1 - t.item())
        return data - noise

    times = [0.0 if level == problem.start and problem.family == "flow" else 1 / (1 + level) for level in levels]
    times = [*times, 1.0] if ending == "to 1" else times
    x = (1 - times[0]) * problem.noise
    if len(times) > 1:
        grid = torch.tensor(times, dtype=torch.float64)
        x = ODESolver(velocity).sample(x_init=x, step_size=None, method=method, time_grid=grid)
    return x if ending == "to 1" else problem.network.pair(x, times[-1], 1 - times[-1])[0]


def _levels(ending: str, stages: int, nfe: int) -> int:
    return nfe // stages if ending == "to 1" else (nfe - 1) // stages + 1


def methods(family: str) -> Iterator[Method]:
    importlib.import_module("flow_matching.solver")
    importlib.import_module("torchdiffeq")
    for method, stages in STAGES.items():
        for ending in ("to 1", "denoise"):
            levels = functools.partial(_levels, ending, stages)
            yield Method("flow_matching", f"{method} {ending}", levels, functools.partial(_run, method, ending))


def default(problem: Problem, nfe: int) -> Tensor:
    """Midpoint in equal steps of t to 1, as in its examples, on the velocity of its own path (flow or VP)."""
    from flow_matching.solver import ODESolver

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma, dalpha, dsigma = problem.path(t.item())
        data, noise = problem.network.pair(x, alpha, sigma)
        return dalpha * data + dsigma * noise

    grid = torch.linspace(0, 1, nfe // 2 + 1, dtype=torch.float64)
    start = problem.path(0.0).sigma * problem.noise
    return ODESolver(velocity).sample(x_init=start, step_size=None, method="midpoint", time_grid=grid)
