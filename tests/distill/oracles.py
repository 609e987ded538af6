"""The flow map of one Gaussian, as a network that is right at first and can be bent: what no loss must want to move.

For data Normal(mean, std² I) the rectified state at t is Normal(t mean, w(t)² I) with w² = t² std² + (1 - t)², and the
ODE carries quantiles to quantiles: X(x, t -> r) = r mean + w(r)/w(t) (x - t mean), whose average velocity is

    u = mean + ((r + t) std² - (2 - r - t)) / (w(t) (w(t) + w(r))) (x - t mean),

with the ODE's own velocity at r = t. Everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

import fluvial as fl
from fluvial import paths, predictions
from fluvial.distill import Distillation
from fluvial.exact import GaussianMixture
from fluvial.flow_maps import FlowMap


@dataclass(frozen=True)
class Gaussian:
    """Data Normal(mean, std² I), as many dimensions as `mean` has numbers."""

    mean: tuple[float, ...] = (0.7,)
    std: float = 0.4

    @property
    def mixture(self) -> GaussianMixture:
        mean, std = (torch.tensor([v], dtype=torch.float64) for v in (self.mean, self.std))
        return GaussianMixture(mean, std, torch.ones(1))

    def teacher(self, path="rectified"):
        """The exact model of the ODE."""
        return self.mixture.model(paths.named(path))

    def samples(self, n: int, seed: int = 1) -> Tensor:
        return self.mixture.sample(n, seed=seed, dtype=torch.float64)

    def width(self, t):
        """w(t), for a float or a tensor (B,)."""
        t = torch.as_tensor(t, dtype=torch.float64)
        return (t.square() * self.std**2 + (1 - t).square()).sqrt()

    def average(self, x: Tensor, t, r) -> Tensor:
        """u (B, D) from x (B, D) at t to r: floats, or (B,)."""
        t, r = (torch.as_tensor(v, dtype=torch.float64).reshape(-1, 1) for v in (t, r))
        w, end = self.width(t), self.width(r)
        mean = torch.tensor(self.mean, dtype=torch.float64)
        return mean + ((r + t) * self.std**2 - (2 - r - t)) / (w * (w + end)) * (x - t * mean)

    def carried(self, x: Tensor, t, r) -> Tensor:
        """X(x, t -> r), (B, D)."""
        t, r = (torch.as_tensor(v, dtype=torch.float64).reshape(-1, 1) for v in (t, r))
        return x + (r - t) * self.average(x, t, r)

    def flow_map(self, kind: str = "consistency", bend: Tensor | None = None, steps: int = 1) -> FlowMap:
        """The exact flow map of this kind, bent by so much; the step of an "euler" one is 1/steps."""
        return FlowMap(fl.Model(Bent(self, kind, bend, steps), "rectified"), kind)


class Bent(nn.Module):
    """u (B, D) of (x, t), or of (x, t, r), + bend @ bends(x, t, r).

    `bend` is the only parameter: (BENDS,), or (B, BENDS) with numbers for each sample, and so a gradient for each.
    """

    def __init__(self, truth: Gaussian, kind: str, bend: Tensor | None, steps: int) -> None:
        super().__init__()
        self.truth, self.kind, self.steps = truth, kind, steps
        self.bend = nn.Parameter(torch.zeros(BENDS, dtype=torch.float64) if bend is None else bend.double())

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None, **cond: Tensor) -> Tensor:
        if r is None:
            r = t + 1 / self.steps if self.kind == "euler" else torch.ones_like(t)
        bent = (self.bend.reshape(-1, BENDS, 1) * bends(x, t[:, None], r[:, None])).sum(1)
        return self.truth.average(x, t, r) + bent


BENDS = 4


def bends(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Smooth functions (B, BENDS, D) of x (B, D), t and r (B, 1)."""
    return torch.stack([torch.ones_like(x), x, t * torch.sin(2 * x), torch.cos(x + 2 * t) * r], 1)


def pull(
    objective: Distillation, student: Gaussian, data: Tensor, *, step: int = 0, seed: int = 0, steps: int = 1
) -> tuple[Tensor, Tensor]:
    """Where the loss would bend a student that is right for this Gaussian: d loss / d bend.

    Args:
        objective: with its teacher on the objective's own path.
        step: of the training, from 0; `steps` of an "euler" student.

    Returns:
        its mean (BENDS,) over these data, and the standard error of that.
    """
    judge = seen(objective, student.flow_map(objective.kind, steps=steps))
    learner = seen(objective, student.flow_map(objective.kind, torch.zeros(len(data), BENDS), steps=steps))
    objective.at(step, judge, judge)(learner, data, seed=seed).sum().backward()
    (bend,) = learner.parameters()
    assert bend.grad is not None
    return bend.grad.mean(0), bend.grad.std(0) / len(data) ** 0.5


def seen(objective: Distillation, student: FlowMap) -> FlowMap:
    """The student on the path of the objective."""
    return student.seen(paths.named(objective.path), predictions.Velocity())


def lognormal_shares(levels: Sequence[float], mean: float, std: float) -> Tensor:
    """How often iCT draws each but the last of these falling sigmas: by the source's error function."""
    z = [math.erf((math.log(level) - mean) / (math.sqrt(2) * std)) for level in levels]
    shares = torch.tensor([high - low for high, low in pairwise(z)], dtype=torch.float64)
    return shares / shares.sum()
