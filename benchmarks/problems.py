"""Sampling problems whose answer is known: a mixture of Gaussians, its exact network, and the ODE's solution.

A problem is a mixture of 8 modes on one of three families of noise levels (level = sigma/alpha):

    edm    alpha = 1,                level from 80 to .002     (fl.paths.EDM)
    vp     alpha² + sigma² = 1,      level from 152 to 0       (fl.paths.VP, beta from .1 to 20)
    flow   alpha + sigma = 1,        level from inf to 0       (fl.paths.Rectified)

Every sampler starts from sigma(0) * noise and ends on the data. The truth is the ODE followed from there in float64.
In the angle a = atan(level), with y = x / √(alpha² + sigma²), it is the same smooth equation for all three,

    dy/da = cos(a) E[noise | x] - sin(a) E[data | x],

which is solved by RK4 down to a = 0. Run as a script: prints by how much twice the steps change that solution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

import fluvial as fl

FAMILIES = ("edm", "vp", "flow")
SAMPLES = {2: 2048, 64: 1024}  # start noises by dimension; 512 for any other
# The flow starts at level infinity, where solvers written in log(level) cannot; they start here, within 1e-5 of it.
FLOW_START = 1e5
TOP, BOTTOM = 80.0, 0.002  # the levels between which grids in level lie


class Network:
    """The exact E[data | x] and E[noise | x] of a mixture, counting its calls."""

    def __init__(self, mixture: fl.exact.GaussianMixture) -> None:
        self.means, self.variances = mixture.means.flatten(1), mixture.stds.square()
        self.log_weights = mixture.weights.log()
        self.calls = 0

    def pair(self, x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        """(data, noise) at the states x (B, D) = alpha data + sigma noise, in x's dtype."""
        self.calls += 1
        y = x.double()
        variance = alpha**2 * self.variances + sigma**2  # (K,)
        inner = y @ self.means.T  # (B, K)
        square = y.square().sum(1, keepdim=True) - 2 * alpha * inner + alpha**2 * self.means.square().sum(1)
        logits = self.log_weights - square / (2 * variance) - y.shape[1] / 2 * variance.log()
        weight = logits.softmax(-1)
        pull = weight * self.variances / variance * alpha
        push = weight * sigma / variance
        data = pull.sum(1, keepdim=True) * y + (weight - alpha * pull) @ self.means
        noise = push.sum(1, keepdim=True) * y - alpha * push @ self.means
        return data.to(x.dtype), noise.to(x.dtype)


@dataclass
class Problem:
    """One mixture on one family, the noises every sampler starts from, and where the ODE takes them."""

    family: str
    mixture: fl.exact.GaussianMixture
    noise: Tensor  # (B, D)
    truth: Tensor  # (B, D)
    network: Network
    path: fl.paths.Path = field(init=False)

    def __post_init__(self) -> None:
        self.path = {"edm": fl.paths.EDM(), "vp": fl.paths.VP(), "flow": fl.paths.Rectified()}[self.family]

    @property
    def start(self) -> float:
        """The level at which the peers start."""
        return FLOW_START if self.family == "flow" else math.exp(-self.path.log_snr(0.0) / 2)

    def coefficients(self, level: float) -> tuple[float, float]:
        """alpha and sigma of the family at a level."""
        norm = {"edm": 1.0, "vp": math.hypot(1.0, level), "flow": 1.0 + level}[self.family]
        return 1.0 / norm, level / norm

    def time(self, level: float) -> float:
        """The time of a level on fluvial's path; 0 at the start."""
        return 0.0 if level >= self.start else self.path.time(-2.0 * math.log(level))

    def model(self) -> fl.Model:
        """The same counted network as a model of fluvial's."""

        def v(x: Tensor, t: Tensor) -> Tensor:
            alpha, sigma, *_ = self.path(t[0].item())
            data, noise = self.network.pair(x, alpha, sigma)
            return alpha * noise - sigma * data

        return fl.Model(v, self.path, "v")

    def error(self, sample: Tensor) -> float:
        """Root mean square of the distance to the truth, over samples and dimensions."""
        return (sample.double() - self.truth).square().mean().sqrt().item()

    def median_error(self, sample: Tensor) -> float:
        """The median over samples of each one's RMS over dimensions: blind to the few that end in another mode."""
        return (sample.double() - self.truth).square().mean(1).sqrt().median().item()


def mixture(dim: int, seed: int, std: float, modes: int = 8) -> fl.exact.GaussianMixture:
    """Normal means, stds from .15 to .6, weights within a factor of 4; scaled to data of this standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(modes, generator=generator, dtype=torch.float64) * 3 + 1
    weights = weights / weights.sum()
    stds = 0.15 * 4.0 ** torch.rand(modes, generator=generator, dtype=torch.float64)
    means = torch.randn(modes, dim, generator=generator, dtype=torch.float64)
    centred = means - weights @ means
    # Scale the means so that the mean variance of a dimension is 1, then everything to std.
    wanted = 1.0 - (weights @ stds.square()).item()
    means = means * math.sqrt(wanted / (weights @ centred.square()).mean().item())
    return fl.exact.GaussianMixture(std * means, std * stds, weights)


def problems(dim: int, families: tuple[str, ...], count: int, seed: int, samples: int | None = None) -> list[Problem]:
    """`count` mixtures (data std 1 and .5 in turn), each on these families."""
    made = []
    for k in range(count):
        gm = mixture(dim, 1000 * seed + k, (1.0, 0.5)[k % 2])
        generator = torch.Generator().manual_seed(seed + 100 * k)
        n = samples or SAMPLES.get(dim, 512)
        noise = torch.randn(n, dim, generator=generator, dtype=torch.float64)
        for family in families:
            problem = Problem(family, gm, noise, noise, Network(gm))
            problem.truth = solution(problem)
            problem.network.calls = 0
            made.append(problem)
    return made


def solution(problem: Problem, steps: int = 400) -> Tensor:
    """The ODE's end from the problem's noises: RK4 in the angle, which falls as the square of equal steps."""
    first = math.pi / 2 if problem.family == "flow" else math.atan(problem.start)
    y = math.sin(first) * problem.noise

    def slope(y: Tensor, s: float) -> Tensor:
        angle = first * (1 - s) ** 2
        data, noise = problem.network.pair(y, math.cos(angle), math.sin(angle))
        return (math.cos(angle) * noise - math.sin(angle) * data) * (-2 * first * (1 - s))

    h = 1.0 / steps
    for k in range(steps):
        s = k * h
        k1 = slope(y, s)
        k2 = slope(y + h / 2 * k1, s + h / 2)
        k3 = slope(y + h / 2 * k2, s + h / 2)
        k4 = slope(y + h * k3, s + h)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return y


# Grids for the peers: n levels falling from the problem's start, after which comes 0.


def karras(problem: Problem, n: int, rho: float = 7.0, bottom: float = BOTTOM, top: float = TOP) -> list[float]:
    """Equal steps of level^(1/rho) (Karras et al.), the first moved to the problem's start."""
    high, low = min(top, problem.start) ** (1 / rho), bottom ** (1 / rho)
    return _from_start(problem, [(high + (low - high) * k / max(n - 1, 1)) ** rho for k in range(n)])


def exponential(problem: Problem, n: int, bottom: float = BOTTOM, top: float = TOP) -> list[float]:
    """Equal steps of log(level): diffusers' exponential and Lu (lambda) grids, azula's own on VE."""
    ratio = bottom / min(top, problem.start)
    return _from_start(problem, [bottom / ratio ** (1 - k / max(n - 1, 1)) for k in range(n)])


def beta(problem: Problem, n: int, bottom: float = BOTTOM) -> list[float]:
    """Quantiles of Beta(.6, .6) between bottom and top (Lee et al.), in level, or in sigma for a flow."""
    from scipy import stats

    flow = problem.family == "flow"
    high = 1.0 if flow else min(TOP, problem.start)
    values = [bottom + (high - bottom) * stats.beta.ppf(1 - k / max(n - 1, 1), 0.6, 0.6) for k in range(n)]
    return _from_start(problem, [v / max(1.0 - v, 1e-9) if flow else v for v in values])


def uniform(problem: Problem, n: int, shift: float = 1.0) -> list[float]:
    """Equal steps of the path's own clock, then SD3's shift: diffusers' linspace/trailing, azula's only grid."""
    times = [k / n for k in range(1, n)]
    inner = [math.exp(-problem.path.log_snr(t / (t + shift * (1.0 - t))) / 2) for t in times]
    return _from_start(problem, [problem.start, *inner])


def _from_start(problem: Problem, levels: list[float]) -> list[float]:
    return [problem.start, *levels[1:]]


def _from_top(grid: LevelGrid, problem: Problem, n: int) -> list[float]:
    return [TOP, *grid(problem, n)[1:]]


LevelGrid = Callable[[Problem, int], list[float]]


def level_grids(family: str) -> dict[str, LevelGrid]:
    """Every grid given to the peers, by name."""
    grids: dict[str, LevelGrid] = {"uniform": uniform, "beta": beta}
    for bottom in (0.002, 0.02, 0.1):
        grids[f"karras/{bottom:g}"] = partial(karras, bottom=bottom)
        grids[f"exponential/{bottom:g}"] = partial(exponential, bottom=bottom)
    for bottom in (0.002, 0.02):
        grids[f"karras rho 3/{bottom:g}"] = partial(karras, rho=3.0, bottom=bottom)
    if family == "vp":  # as from a table of 1000 steps: between its own two ends
        grids["karras table"] = partial(karras, bottom=0.01, top=200.0)
        grids["exponential table"] = partial(exponential, bottom=0.01, top=200.0)
    if family == "flow":
        # Not moved to the start, as steps in sigma cannot cross from 1e5 to 80 in one: inexact by the mean / 80.
        for bottom in (0.002, 0.02):
            grids[f"karras from 80/{bottom:g}"] = partial(_from_top, partial(karras, bottom=bottom))
            grids[f"exponential from 80/{bottom:g}"] = partial(_from_top, partial(exponential, bottom=bottom))
        grids["shift 3"] = partial(uniform, shift=3.0)
        grids["shift .5"] = partial(uniform, shift=0.5)
    return grids


def main() -> None:
    print("largest change of the true solution when the steps are doubled, RMS over samples and dimensions")
    for dim in (2, 64):
        for problem in problems(dim, FAMILIES, 1, seed=1):
            change = problem.error(solution(problem, 800))
            # The network against the library's own exact model, at a middle level.
            alpha, sigma = problem.coefficients(0.3)
            x = alpha * problem.truth + sigma * problem.noise
            exact = problem.mixture.model(problem.path)(x, problem.time(0.3)).data
            gap = (problem.network.pair(x, alpha, sigma)[0] - exact).abs().max().item()
            print(f"{problem.family:>5} dim {dim:<3} {change:.1e}   network against fl.exact {gap:.1e}")


if __name__ == "__main__":
    main()
