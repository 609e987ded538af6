"""What is known in closed form, without any solver: where a flow goes, and the law of a run.

On the line a probability flow keeps the order of the states, so it carries the q-quantile at one time to the q-quantile
at another; those of a mixture of Gaussians are found by bisection. On one Gaussian of mean 0 the exact model is linear,
so that a solver's step is a matrix: the covariance of the state and of what is remembered goes through it exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fluvial.exact import GaussianMixture
from fluvial.paths import Path
from fluvial.plans import forward
from fluvial.solvers import Solver
from fluvial.solvers.rows import Step

DATA_STD = 0.5


def line() -> GaussianMixture:
    """Two components on the line, near enough that the flow does not part between them."""
    means = torch.tensor([[0.8], [-0.6]], dtype=torch.float64)
    return GaussianMixture(means, torch.tensor([0.8, 0.6]), torch.tensor([0.4, 0.6]))


def plane() -> GaussianMixture:
    """Three unequal components in the plane."""
    means = torch.tensor([[1.5, 0.0], [-1.0, 1.0], [-0.5, -1.5]], dtype=torch.float64)
    return GaussianMixture(means, torch.tensor([0.3, 0.5, 0.2]), torch.tensor([0.5, 0.3, 0.2]))


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Standard normal numbers from torch's own generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def quantiles(path: Path, t: float, count: int = 16) -> Tensor:
    """States (count, 1) of the mixture `line` on this path at time t, at fixed quantiles from 3 to 97 %."""
    gm, c = line(), path(t)
    means = c.alpha * gm.means[:, 0]
    stds = (c.alpha**2 * gm.stds.square() + c.sigma**2).sqrt()
    wanted = torch.linspace(0.03, 0.97, count, dtype=torch.float64)
    reach = float(means.abs().max() + 10.0 * stds.max())
    low, high = torch.full_like(wanted, -reach), torch.full_like(wanted, reach)
    for _ in range(100):
        middle = (low + high) / 2
        below = torch.special.ndtr((middle[:, None] - means) / stds) @ gm.weights < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return ((low + high) / 2)[:, None]


def std_ratio(path: Path, solver: Solver, steps: int, end: float) -> float:
    """The standard deviation after so many uniform steps from 0 to `end`, to the true one; data Normal(0, 0.5²)."""
    gm = GaussianMixture(torch.zeros(1, 1), torch.tensor([DATA_STD], dtype=torch.float64), torch.ones(1))
    times = [end * k / steps for k in range(steps)] + [end]
    covariance = torch.tensor([[path(0.0).sigma ** 2]], dtype=torch.float64)
    for step in forward(gm.model(path), solver, times):
        covariance = _through(step, covariance)
    c = path(end)
    truth = DATA_STD if end == 1.0 else math.hypot(c.alpha * DATA_STD, c.sigma)
    return math.sqrt(float(covariance[0, 0])) / truth


def _through(step: Step, covariance: Tensor) -> Tensor:
    """The covariance of the state and of what is remembered, after a step of a linear model."""
    found = 1 + step.memory
    # One sample for each thing that goes in: with that alone at 1, what comes out are its coefficients.
    basis = torch.eye(found + len(step.noises), dtype=torch.float64)[:, :, None]
    after, kept, _ = step(basis[0], list(basis[1:found]), list(basis[found:]), {})
    left = torch.stack([after, *kept, *basis[1:found]])[:, :, 0]
    given = torch.eye(len(basis), dtype=torch.float64)
    given[:found, :found] = covariance[:found, :found]
    return left @ given @ left.T


def uniform(steps: int, low: float = 0.0, high: float = 1.0) -> list[float]:
    """steps + 1 times."""
    return [low + (high - low) * k / steps for k in range(steps)] + [high]
