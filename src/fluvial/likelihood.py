"""Likelihood: how probable a model holds data to be, by the instantaneous change of variables along its ODE.

Along dx/dt = v(x, t) the log density of a state changes by d log p/dt = -div v, so with the ODE run from the data, at
time t_e, back to the noise at t_0,

    log p(data) = log p_start(x_start) + ∫ div v dt  (t from t_e to t_0)  + D log alpha_e - sum log scale,

where the last two terms are the changes of variables from the data's own units to the state alpha_e data in path units
(scale: the stored normalisation's). The integral rides along: the state gets one more coordinate, whose velocity is
the divergence, and the sampler's own loop integrates both.

Two numbers are approximations. The ODE starts next to the data, at log-SNR 15 (sigma/alpha = 0.0006, or the path's
own last level), where the density is that of data blurred by this noise: (sigma/alpha)²/2 · laplacian(p)/p nats off.
And at t_0 the state's density is taken for the Gaussian with the data's mean and variance,
Normal(alpha_0 mean, sigma_0² + alpha_0² std²), exact where alpha_0 = 0; elsewhere it is off by about alpha_0/sigma_0
(0.007 on VP, 0.013 on EDM) times what a standard normal noise projects on the difference between each coordinate's mean
and `mean`, and by the square of that ratio for what is not isotropic in the data's covariance.

Sources: Chen, Rubanova, Bettencourt, Duvenaud: Neural ordinary differential equations (2018),
https://arxiv.org/abs/1806.07366; Grathwohl et al.: FFJORD (2019), https://arxiv.org/abs/1810.01367; Song et al.:
Score-based generative modeling through SDEs (2021), https://arxiv.org/abs/2011.13456, app. D.2
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap

from fluvial import inputs, random, running, sampling, solvers
from fluvial.errors import NonFiniteError, OptionError, one_of
from fluvial.model import Model
from fluvial.predictions import Estimate, Query, Velocity, solve
from fluvial.solvers import Solver

__all__ = ["Levels", "Likelihood", "log_likelihood"]

DEFAULT_STEPS = 64
_LAST_LOG_SNR = 15.0
_PROBES = "the probes of the divergence"  # the condition they go by: a name that no network has


@dataclass(frozen=True)
class Levels:
    """Data on a grid: `count` values from `low` to `high`, both included, evenly spaced."""

    count: int = 256
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not (isinstance(self.count, int) and self.count >= 2 and self.low < self.high):
            raise OptionError(f"{self}; expected 2 levels or more, and low < high")

    @property
    def width(self) -> float:
        """The distance of neighbours, and the width of the uniform noise that fills the gaps."""
        return (self.high - self.low) / (self.count - 1)


@dataclass
class Likelihood:
    """What `log_likelihood` found.

    Attributes:
        log_prob: (B,) log density in nats, in the data's own units; with dequantisation, its mean over the draws.
        standard_error: (B,) of log_prob, from the spread over probes, or over draws where there are several; 0 where
            nothing is random, nan where a single probe tells nothing of its spread.
        nfe: evaluations of the velocity with its divergence, over all draws.
        dims: the number of dimensions of a sample.
        levels: what was dequantised.
        seed: what probes and dequantisation came from.
    """

    log_prob: Tensor
    standard_error: Tensor
    nfe: int
    dims: int
    levels: Levels | None
    seed: int

    @property
    def bits_per_dim(self) -> Tensor:
        """(B,) -log2 of the probability per dimension: of the data's grid cell (an upper bound on average, Theis et
        al.: A note on the evaluation of generative models, 2016, https://arxiv.org/abs/1511.01844) with dequantisation,
        of the density otherwise."""
        cell = 0.0 if self.levels is None else math.log(self.levels.width)
        return -(self.log_prob / self.dims + cell) / math.log(2.0)


def log_likelihood(
    model: Model,
    data: Tensor,
    *,
    divergence: str = "exact",
    probes: int = 8,
    solver: str | Solver = "dopri5",
    steps: int | None = None,
    times: Any = None,
    seed: int | None = None,
    first: int = 0,
    cond: Mapping[str, Tensor] | None = None,
    guidance: Callable[[Model], Model] | None = None,
    dequantise: int | Levels | None = None,
    draws: int = 1,
    moments: tuple[float | Tensor, float | Tensor] | None = None,
) -> Likelihood:
    """The log density (B,) of these data (B, …) under the model's ODE.

    The noise need not be independent of the data, only Gaussian. The network must be differentiable in x; one that
    runs under no_grad counts as constant. The state is float64, and the network gets the data's own precision.

    Args:
        model: any model.
        data: in their own units.
        divergence: "exact" is the Jacobian's trace, at a cost of D directional derivatives; "hutchinson" its unbiased
            estimate by mean e·(J e) over random signs e, which are drawn once for the whole run.
        probes: how many of them for "hutchinson".
        solver: dopri5, or a fixed Runge-Kutta method (euler, heun, midpoint, rk4), on the model's own path.
        steps, times: as in `sample`; by default 64 steps, and for dopri5 as many as it needs.
        seed, first: of probes and dequantisation: data row i is sample first + i.
        cond, guidance: as in `sample`.
        dequantise: for data on a grid, its `Levels` (256: that many in [0, 1]): uniform noise fills the cells.
        draws: of that noise, over which the log density is averaged.
        moments: (mean, std) of the data in their own units, numbers or tensors like a sample: of the density at the
            start, where alpha is not 0. Default: those measured in the model's normalisation, else 0 and 1 in path
            units.

    Raises:
        OptionError: for a solver that is not one of velocities, or other arguments that do not fit.
        PathTimeError: where the model's velocity does not exist at one of the ends.
        NonFiniteError: when a number that is not finite comes out.
    """
    solver = _velocity_solver(solvers.named(solver))
    levels = Levels(dequantise) if isinstance(dequantise, int) else dequantise
    _check(divergence, probes, draws, levels)
    model = inputs.guided(model, guidance)
    seed, first = inputs.checked_seed(seed), inputs.checked_first(first)
    data = inputs.fitting(model, inputs.as_state(data), "data")
    cond = inputs.conditions(model, cond, data)
    nodes, samples = _nodes(model, solver, times, steps), range(first, first + len(data))
    values, nfe = [], 0
    for draw in range(draws):
        x = data if levels is None else data + levels.width * _centred(samples, data, seed, draw)
        signs = None if divergence == "exact" else _signs(samples, probes, data, seed, draw)
        value, calls = _along_the_ode(model, solver, nodes, x, signs, cond, moments)
        values.append(value)
        nfe += calls
    log_prob, error = _summary(torch.stack(values), divergence == "exact")
    if not running.finite(log_prob):
        raise NonFiniteError(f"the log density holds {running.what(log_prob)}; expected finite data and networks")
    return Likelihood(log_prob, error, nfe, data[0].numel(), levels, seed)


def _along_the_ode(
    model: Model,
    solver: Solver,
    nodes: Sequence[float],
    data: Tensor,
    signs: Tensor | None,
    cond: Mapping[str, Tensor],
    moments: tuple[float | Tensor, float | Tensor] | None,
) -> tuple[Tensor, int]:
    """Log densities (P, B), one for each probe, and the number of evaluations."""
    exact = torch.float32 if data.device.type == "mps" else torch.float64
    x, c = model.normalisation.apply(data).flatten(1), model.path(nodes[-1])
    dims, count = x.shape[1], 1 if signs is None else signs.shape[1]
    augmented = _Augmented(model, data.shape[1:], data.dtype)
    given = dict(cond) if signs is None else {**cond, _PROBES: signs}
    nfe = 0

    def reported(step: running.StepReport) -> None:
        nonlocal nfe
        nfe = step.nfe

    z = torch.cat([c.alpha * x.to(exact), x.new_zeros(len(x), count, dtype=exact)], dim=1)
    z = sampling.integrate(augmented, z, nodes[::-1], solver=solver, cond=given, callback=reported)
    scale = model.normalisation.scale
    units = dims * math.log(c.alpha) - dims / len(scale) * sum(math.log(abs(s)) for s in scale)
    start = _log_start(model, nodes[0], z[:, :dims], data.shape[1:], moments)
    return (start[:, None] + z[:, dims:] + units).T, nfe


def _log_start(
    model: Model, t: float, x: Tensor, shape: Sequence[int], moments: tuple[float | Tensor, float | Tensor] | None
) -> Tensor:
    """The log density (B,) at the first time: the Gaussian with the data's mean and variance, noised."""
    c, norm = model.path(t), model.normalisation
    if moments is None and norm.mean is not None and norm.std is not None:
        moments = (norm.mean, norm.std)
    mean, std = torch.zeros((), dtype=x.dtype, device=x.device), torch.ones((), dtype=x.dtype, device=x.device)
    if moments is not None:
        low, high = (torch.as_tensor(v).to(x).expand(1, *shape) for v in (moments[0], moments[0] + moments[1]))
        mean = norm.apply(low).flatten(1)
        std = norm.apply(high).flatten(1) - mean
    variance = c.sigma**2 + (c.alpha * std).square()
    logs = (x - c.alpha * mean).square() / variance + (2.0 * math.pi * variance).log()
    return -0.5 * logs.sum(1)


class _Augmented(Model):
    """The ODE of state and divergence: z (B, D + P) is the flat state and an integral for each probe.

    The velocity is a model's, on its own path, so that the sampling loop runs it like any other.
    """

    def __init__(self, source: Model, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.source, self.network = source, source.network
        self.convention = replace(source.convention, prediction=Velocity(), shape=None)
        self.sample_shape, self.dtype = tuple(shape), dtype
        self.derivatives = _forward

    def query(self, t: float | Tensor) -> Query:
        return self._around(self.source.query(t))

    def queries(self, times: Sequence[float]) -> list[Query]:
        return [self._around(query) for query in self.source.queries(times)]

    def _around(self, query: Query) -> Query:
        c = query.c
        return Query(query.path, c, c, (c.dalpha, c.dsigma), partial(self._flow, query), Velocity(), True)

    def _flow(self, query: Query, z: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """The velocity of z: that of the state, and the divergence as each probe sees it."""
        own = {name: value for name, value in cond.items() if name != _PROBES}
        x = z[:, : math.prod(self.sample_shape)].to(self.dtype)
        if _PROBES in cond:
            directions = cond[_PROBES].transpose(0, 1)  # (P, B, D)
        else:
            directions = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)[:, None]  # (D, 1, D)

        def velocity(x: Tensor) -> Tensor:
            return Estimate(query, x.reshape(len(x), *self.sample_shape), own).velocity.flatten(1)

        try:
            out, along = self.derivatives(velocity, x, directions)
        except RuntimeError:
            # Not every network can be differentiated forwards, or vectorised: then backwards, one by one.
            if self.derivatives is _backward:
                raise
            self.derivatives = _backward
            out, along = _backward(velocity, x, directions)
        integrals = along.T if _PROBES in cond else along.sum(0)[:, None]
        return torch.cat([out.to(z.dtype), integrals.to(z.dtype)], dim=1)


def _forward(velocity: Callable[[Tensor], Tensor], x: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """The velocity (B, D) at x, and e·(J e) (P, B) for directions e (P, B or 1, D), many at once."""

    def along(e: Tensor) -> tuple[Tensor, Tensor]:
        out, change = jvp(velocity, (x,), (e.expand_as(x),))[:2]
        return out, (change * e).sum(1)

    at_once = max(1, (1 << 20) // max(x.numel(), 1))
    with warnings.catch_warnings():
        # torch compiles a few of its own forward derivatives by what it calls deprecated.
        warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
        mapped = vmap(along, out_dims=(None, 0))  # pyright: ignore[reportArgumentType]
        pieces = [mapped(piece) for piece in directions.split(at_once)]
    return pieces[0][0], torch.cat([products for _, products in pieces])


def _backward(velocity: Callable[[Tensor], Tensor], x: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """As `_forward`, by reverse differentiation, one direction after the other."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        out = velocity(x) + 0.0 * x  # so that a constant has a gradient too
        products = []
        for e in directions:
            (grad,) = torch.autograd.grad(out, x, e.expand_as(x), retain_graph=True)
            products.append((grad * e).sum(1))
    return out.detach(), torch.stack(products)


def _nodes(model: Model, solver: Solver, times: Any, steps: int | None) -> list[float]:
    """The times, rising; an end at the data is put at the last noise level that is asked for."""
    default = 1 if isinstance(solver, solvers.Dopri5) else DEFAULT_STEPS
    nodes = model.times(times, steps, default)
    if nodes[-1] == 1.0:
        end = model.path.time(_LAST_LOG_SNR)
        nodes = [*(t for t in nodes[:-1] if t < end), end]
    for t in (nodes[0], nodes[-1]):
        query = model.query(t)
        solve(query.state, query.weights, (query.c.dalpha, query.c.dsigma), "velocity")
    return nodes


def _signs(samples: range, probes: int, like: Tensor, seed: int, draw: int) -> Tensor:
    """Random signs (B, P, D)."""
    shape = (probes, like[0].numel())
    u = random.uniform(samples, shape, seed, draw, random.PROBE, device=like.device)
    return torch.where(u < 0.5, -1.0, 1.0).to(like)


def _centred(samples: range, like: Tensor, seed: int, draw: int) -> Tensor:
    """Uniform noise in (-1/2, 1/2), like the data."""
    return random.uniform(samples, like.shape[1:], seed, draw, random.DEQUANTISE, like.dtype, like.device) - 0.5


def _summary(values: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """Mean and standard error (B,) of log densities (draws, P, B)."""
    draws, probes, _ = values.shape
    mean = values.mean((0, 1))
    if draws > 1:
        return mean, values.mean(1).std(0) / math.sqrt(draws)
    if exact:
        return mean, torch.zeros_like(mean)
    spread = values[0].std(0) if probes > 1 else torch.full_like(mean, torch.nan)
    return mean, spread / math.sqrt(probes)


def _velocity_solver(solver: Solver) -> Solver:
    if not isinstance(solver, (solvers.RungeKutta, solvers.Dopri5)):
        raise OptionError(
            f"solver {solver.name} does more than add velocities, so that a divergence cannot ride along; expected "
            "dopri5, euler, heun, midpoint or rk4"
        )
    if solver.along is not None:
        raise OptionError(f"along is {solver.along}; expected None: convert the model to that path instead")
    return solver


def _check(divergence: str, probes: int, draws: int, levels: Any) -> None:
    if divergence not in ("exact", "hutchinson"):
        raise one_of("divergence", divergence, ("exact", "hutchinson"))
    for name, value in (("probes", probes), ("draws", draws)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(f"{name} is {value!r}; expected a whole number, 1 or more")
    if levels is not None and not isinstance(levels, Levels):
        raise OptionError(f"dequantise is {levels!r}; expected a number of levels, fl.likelihood.Levels, or None")
    if draws > 1 and levels is None:
        raise OptionError(f"draws is {draws} without dequantise; expected the data's levels, such as dequantise=256")
