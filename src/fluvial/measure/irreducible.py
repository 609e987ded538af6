"""The velocity loss that no network can go below: what the interpolation's crossings leave undecided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fluvial import grids, random
from fluvial.errors import OptionError, ShapeError
from fluvial.exact import Empirical, GaussianMixture
from fluvial.measure.distances import rows
from fluvial.paths import Rectified

# Beside the streams of fluvial.random and of the other measures.
_DRAWN = 132

_CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Irreducible:
    """The least velocity loss on the Rectified path, in squared path units, with its standard error.

    Attributes:
        total: the integral over `times` (Simpson's rule); total_error: its standard error.
        per_t: at each time; per_t_error: its standard error.
        times: the times.
        n: how many (data, noise) were drawn, the same at every time.
        seed: of what was drawn.
    """

    total: float
    total_error: float
    per_t: list[float]
    per_t_error: list[float]
    times: list[float]
    n: int
    seed: int


def irreducible_loss(
    data: Tensor | Empirical | GaussianMixture,
    times: int | Sequence[float] = 33,
    n: int = 512,
    seed: int = 0,
    labels: Tensor | None = None,
) -> Irreducible:
    """E Var(data - noise | x), x = t data + (1 - t) noise, mean over the dimensions: the least possible velocity loss.

        Var(data - noise | x) = Var(data | x) / (1 - t)²

    It is 0 where every x lies on a single line between noise and data, and measures how much those lines cross. The
    posterior variance is in closed form, so that only (data, noise) are drawn:

        points      Σ w_i |d_i - d_j|² - |Σ w_i d_i - d_j|²,    w_i = softmax(-|x - t d_i|² / 2 (1-t)²),
        a mixture   Σ r_k (s_k²/V_k D + |u_k - Σ r_k u_k|²),    V_k = t² s_k² + (1-t)²,

    d_j the point that x was made from, u_k = m_k + (t s_k² - (1-t))/V_k (x - t m_k) the velocity of component k:
    nothing cancels near the data. For one Gaussian it is s²/V, and s π/2 in all. At t = 1 it is the limit from below.
    A finite set of points is known by heart there, and its loss falls to 0, which the law they come from need not;
    where that fall is within the last step, the integral is short by up to a third of it.

    Args:
        data: points (N, …) in path units, taken as all there is; or an `Empirical` or a `GaussianMixture`.
        times: how many, equally apart from 0 to 1; or rising times in [0, 1], over which is then integrated.
        n: (data, noise) to draw, 2 or more.
        seed: of these.
        labels: (N,) classes of the points: then it is E Var(data - noise | x, label), the least loss of a model that
            is told the class.

    Raises:
        ShapeError: no points, or labels that do not go with them.
        OptionError: NaN or infinity; fewer than two draws or times; times that do not rise in [0, 1]; labels of a
            mixture.

    Source: Liu, Gong, Liu: Flow straight and fast (2022), https://arxiv.org/abs/2209.03003, section 3.4 (V); the closed
    forms are this library's
    """
    from scipy.integrate import simpson  # type: ignore[import-untyped]

    if isinstance(n, bool) or not isinstance(n, int) or n < 2:
        raise OptionError(f"n is {n!r}; expected a whole number, 2 or more")
    nodes = _nodes(times)
    if isinstance(data, GaussianMixture):
        if labels is not None:
            raise OptionError("labels go with points, and a mixture was given; expected points, or no labels")
        losses = _of_mixture(data, nodes, n, seed)
    else:
        points = rows(data.points if isinstance(data, Empirical) else data, "data")
        losses = _of_points(points, _classes(labels, len(points)), nodes, n, seed)
    whole = torch.from_numpy(simpson(losses.numpy(), x=nodes, axis=0))
    return Irreducible(
        float(whole.mean()), float(whole.std()) / n**0.5,
        losses.mean(1).tolist(), (losses.std(1) / n**0.5).tolist(), nodes, n, seed,
    )  # fmt: skip


def _nodes(times: int | Sequence[float]) -> list[float]:
    if isinstance(times, int):
        if times < 2:
            raise OptionError(f"times is {times}; expected 2 or more of them")
        return [k / (times - 1) for k in range(times)]
    return grids.resolve(list(times), Rectified(), None, 1)


def _classes(labels: Tensor | None, count: int) -> Tensor | None:
    if labels is not None and labels.shape != (count,):
        raise ShapeError(f"labels have shape {tuple(labels.shape)}; expected ({count},), one for each point")
    return None if labels is None else labels.cpu()


def _of_points(points: Tensor, labels: Tensor | None, times: list[float], n: int, seed: int) -> Tensor:
    """Var(data - noise | x) (T, n) of points (N, D), mean over the dimensions."""
    points = points - points.mean(0)
    size, width = points.square().sum(1), points.shape[1]
    u = random.uniform(n, (1,), seed, stream=_DRAWN, dtype=torch.float64)[:, 0]
    drawn = (u * len(points)).long()
    columns = []
    for part in torch.arange(n).split(max(1, _CHUNK_BYTES // (32 * len(points)))):
        own = drawn[part]
        noise = random.normal(part, (width,), seed, draw=1, stream=_DRAWN, dtype=torch.float64)
        apart = (size[own, None] + size - 2.0 * points[own] @ points.T).clamp(min=0.0)  # |d_i - d_j|²
        apart[torch.arange(len(own)), own] = 0.0
        along = (noise * points[own]).sum(1)[:, None] - noise @ points.T  # noise·(d_j - d_i)
        if labels is not None:
            along = along.masked_fill(labels[own, None] != labels, torch.inf)
        columns.append(torch.stack([_variance(t, apart, along, points, own) for t in times]))
    return torch.cat(columns, dim=1) / width


def _variance(t: float, apart: Tensor, along: Tensor, points: Tensor, own: Tensor) -> Tensor:
    sigma = 1.0 - t
    if sigma == 0.0:
        return torch.zeros_like(apart[:, 0])
    # |x - t d_i|² = |sigma noise + t (d_j - d_i)|², less what all have in common. At t = 0 an excluded class stays so.
    excluded = along.isinf()
    logits = -apart * (t * t / (2.0 * sigma * sigma)) - along.masked_fill(excluded, 0.0) * (t / sigma)
    weight = logits.masked_fill(excluded, -torch.inf).softmax(1)
    off = weight @ points - points[own]
    return ((weight * apart).sum(1) - off.square().sum(1)).clamp(min=0.0) / (sigma * sigma)


def _of_mixture(mixture: GaussianMixture, times: list[float], n: int, seed: int) -> Tensor:
    """Var(data - noise | x) (T, n) of a mixture, mean over the dimensions."""
    means, variances = mixture.means.flatten(1), mixture.stds.square()
    data = mixture.sample(n, seed, torch.float64).flatten(1)
    width = means.shape[1]
    noise = random.normal(n, (width,), seed, draw=1, stream=_DRAWN, dtype=torch.float64)
    columns = []
    for part in torch.arange(n).split(max(1, _CHUNK_BYTES // (32 * means.numel()))):
        rows_of_t = []
        for t in times:
            sigma = 1.0 - t
            spread = t * t * variances + sigma * sigma  # (K,)
            off = (t * data[part] + sigma * noise[part])[:, None] - t * means  # (n, K, D)
            logits = mixture.weights.log() - off.square().sum(2) / (2.0 * spread) - 0.5 * width * spread.log()
            weight = logits.softmax(1)
            velocity = means + ((t * variances - sigma) / spread)[:, None] * off
            about = velocity - torch.einsum("nk,nkd->nd", weight, velocity)[:, None]
            rows_of_t.append((weight * (variances / spread + about.square().mean(2))).sum(1))
        columns.append(torch.stack(rows_of_t))
    return torch.cat(columns, dim=1)
