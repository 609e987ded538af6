"""Models known in closed form: the ground truth for tests, documentation and diagnosis.

A mixture of Gaussians stays one along any path: component k at time t is Normal(alpha m_k, V_k I) with
V_k = alpha² s_k² + sigma², so with r_k(x) its posterior weight,

    E[data | x]  = sum_k r_k [m_k + alpha s_k²/V_k (x - alpha m_k)],
    E[noise | x] = sum_k r_k sigma/V_k (x - alpha m_k).

A finite data set is the mixture of its points, E[data | x] = sum_i w_i d_i with
w = softmax_i(-|x - alpha d_i|²/(2 sigma²)), which is attention: query x alpha/sigma², keys and values d_i, bias
-alpha²|d_i|²/(2 sigma²).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fluvial import random
from fluvial.errors import DataError, ShapeError
from fluvial.model import Model
from fluvial.paths import Coefficients, Path
from fluvial.predictions import Query, spread


class GaussianMixture:
    """sum_k weights_k Normal(means_k, stds_k² I), sampled and evaluated exactly, and its exact model on any path.

    Args:
        means: (K, *shape), any sample shape.
        stds: (K,), above 0: the standard deviation of each component.
        weights: (K,), above 0; normalised here.

    The model takes an optional condition label (B,): k asks for component k alone, K (the null) for the whole mixture.
    """

    def __init__(self, means: Tensor, stds: Tensor, weights: Tensor) -> None:
        self.means, self.stds, self.weights = (torch.as_tensor(v, dtype=torch.float64) for v in (means, stds, weights))
        count = len(self.means)
        if self.means.ndim < 2 or self.stds.shape != (count,) or self.weights.shape != (count,):
            raise ShapeError(
                f"means {tuple(self.means.shape)}, stds {tuple(self.stds.shape)}, weights {tuple(self.weights.shape)}; "
                "expected (K, D), (K,), (K,)"
            )
        if not (bool((self.stds > 0).all()) and bool((self.weights > 0).all())):
            raise DataError("stds and weights of a mixture must be above 0")
        self.weights = self.weights / self.weights.sum()
        self.shape = tuple(self.means.shape[1:])

    def sample(self, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """n exact samples (n, *shape)."""
        return self.sample_with_labels(n, seed, dtype)[0]

    def sample_with_labels(self, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """n exact samples (n, *shape) and the component (n,) each came from."""
        u = random.uniform(n, (1,), seed, stream=random.DATA, dtype=torch.float64)[:, 0]
        label = torch.searchsorted(self.weights.cumsum(0), u.contiguous()).clamp(max=len(self.weights) - 1)
        noise = random.normal(n, self.shape, seed, draw=1, stream=random.DATA, dtype=torch.float64)
        return (self.means[label] + spread(self.stds[label], noise) * noise).to(dtype), label

    def log_prob(self, x: Tensor) -> Tensor:
        """log density (B,) at x (B, *shape), in nats."""
        data_end = Coefficients(1.0, 0.0, 0.0, 0.0)
        logits, _, _ = self._components(x, data_end, None)
        return logits.logsumexp(-1)

    def model(self, path: Path) -> Model:
        """The exact model on this path."""
        return ExactModel(self, path)

    def _components(self, x: Tensor, c: Any, label: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Log-weights (B, K), variances (B or 1, K), and alpha m_k's alpha (B or 1, 1) at state x, in x's dtype."""
        means = self.means.flatten(1).to(x)
        alpha, sigma = (torch.as_tensor(v, device=x.device, dtype=x.dtype).reshape(-1, 1) for v in c[:2])
        variance = alpha.square() * self.stds.to(x).square() + sigma.square()
        flat = x.flatten(1)
        # |x - alpha m|² by differences: the expanded square loses all digits near the data.
        distance = torch.stack([(flat - alpha * m).square().sum(1) for m in means], dim=1)
        logits = self.weights.to(x).log() - distance / (2 * variance)
        logits = logits - 0.5 * flat.shape[1] * (2 * math.pi * variance).log()
        if label is not None:
            k = torch.arange(len(means), device=x.device)
            logits = logits.masked_fill((label[:, None] != k) & (label[:, None] != len(means)), -torch.inf)
        return logits, variance, alpha

    def _v(self, x: Tensor, c: Any, label: Tensor | None = None) -> Tensor:
        """alpha E[noise | x] - sigma E[data | x]: finite at both ends, and it determines the pair at both."""
        logits, variance, alpha = self._components(x, c, label)
        sigma = torch.as_tensor(c.sigma, device=x.device, dtype=x.dtype).reshape(-1, 1)
        weight = logits.softmax(-1)  # (B, K)
        # v = sum_k r_k [-sigma m_k + alpha sigma (1 - s_k²)/V_k (x - alpha m_k)]
        gain = weight * alpha * sigma * (1 - self.stds.to(x).square()) / variance
        means = self.means.flatten(1).to(x)
        on_means = -sigma * weight - gain * alpha
        return (gain.sum(1, keepdim=True) * x.flatten(1) + on_means @ means).reshape(x.shape)


class Empirical:
    """A finite data set as a distribution: its exact model knows every point, and its ODE ends on one of them.

    Args:
        points: (n, *shape), n >= 1.

    The posterior mean is one scaled-dot-product attention over the centred points: no (batch, n, dim) tensor is made.
    """

    def __init__(self, points: Tensor) -> None:
        if points.ndim < 2 or len(points) == 0:
            raise ShapeError(f"points has shape {tuple(points.shape)}; expected (n, …) with n >= 1")
        self.points = points if points.is_floating_point() else points.float()
        self.shape = tuple(points.shape[1:])
        self._keys: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def model(self, path: Path) -> Model:
        """The exact model on this path: it predicts the data."""
        return EmpiricalModel(self, path)

    def posterior_mean(self, x: Tensor, alpha: Any, sigma: Any) -> Tensor:
        """E[data | x = alpha data + sigma noise] (B, *shape) for x (B, *shape); alpha, sigma floats or (B,)."""
        centre, keys = self._attended(x.dtype, x.device)
        a, s = (torch.as_tensor(v, device=x.device, dtype=torch.float64).reshape(-1, 1) for v in (alpha, sigma))
        # At sigma = 0 the nearest point: far below any distance of the data, but its square is still a number.
        precision = (a / s.clamp(min=1e-12).square()).clamp(max=torch.finfo(x.dtype).max ** 0.5).to(x.dtype)
        query = (x.flatten(1) - a.to(x.dtype) * centre) * precision
        query = torch.cat([query, (-a.to(x.dtype) * precision).expand(len(x), 1)], dim=1)
        mean = torch.nn.functional.scaled_dot_product_attention(
            query[None, None], keys[None, None], keys[None, None], scale=1.0
        )[0, 0, :, :-1]
        return (mean + centre).reshape(x.shape)

    def _attended(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """The points' mean, and the keys: the centred points with half their squared norm as one more column."""
        if (dtype, device) not in self._keys:
            flat = self.points.flatten(1).to(device=device, dtype=torch.float64)
            centre = flat.mean(0)
            centred = flat - centre
            keys = torch.cat([centred, 0.5 * centred.square().sum(1, keepdim=True)], dim=1)
            self._keys[dtype, device] = (centre.to(dtype), keys.to(dtype))
        return self._keys[dtype, device]


class ExactModel(Model):
    """The exact model of a mixture. Its coefficients come from the query itself, so no time is ever rounded."""

    def __init__(self, mixture: GaussianMixture, path: Path) -> None:
        super().__init__(self._at_network_time, path, "v", null={"label": len(mixture.means)}, shape=mixture.shape)
        self.mixture = mixture

    def _query(self, t: Any, c: Coefficients) -> Query:
        return super()._query(t, c)._replace(call=lambda x, cond: self.mixture._v(x, c, **cond))

    def _at_network_time(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self.mixture._v(x, self.path(t), label)


class EmpiricalModel(Model):
    """The exact model of a finite data set: predicts the data by attention over it."""

    def __init__(self, empirical: Empirical, path: Path) -> None:
        super().__init__(self._at_network_time, path, "data", shape=empirical.shape)
        self.empirical = empirical

    def _query(self, t: Any, c: Coefficients) -> Query:
        return (
            super()
            ._query(t, c)
            ._replace(call=lambda x, cond: self.empirical.posterior_mean(x, c.alpha, c.sigma, **cond))
        )

    def _at_network_time(self, x: Tensor, t: Tensor) -> Tensor:
        c = self.path(t)
        return self.empirical.posterior_mean(x, c.alpha, c.sigma)
