"""Exact models as the bare functions of other libraries: each convention written out here, without Fluvial's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fluvial.exact import GaussianMixture

Level = Callable[[Tensor], tuple[Tensor, Tensor]]  # network time (B,) -> alpha, sigma (B,)
Output = Callable[..., Tensor]  # alpha, sigma, data, noise -> output


def problem() -> GaussianMixture:
    """Three clusters of unequal weight in the plane, within [-1, 1]."""
    means = torch.tensor([[0.8, -0.8], [-0.8, -0.6], [-0.2, 0.75]], dtype=torch.float64)
    return GaussianMixture(means, torch.tensor([0.04, 0.08, 0.06]), torch.tensor([0.5, 0.3, 0.2]))


def bare(level: Level, output: Output) -> Callable[[Tensor, Tensor], Tensor]:
    """net(x, t): the exact posterior of `problem` at the noise level that t means, put out in this way."""
    gm = problem()

    def net(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = level(t.double())
        alpha, sigma = alpha[:, None], sigma[:, None]
        off = x.double()[:, None] - alpha[..., None] * gm.means  # (B, K, 2)
        variance = alpha.square() * gm.stds.square() + sigma.square()  # (B, K)
        logits = gm.weights.log() - off.square().sum(-1) / (2 * variance) - variance.log()
        weighted = (logits.softmax(-1) / variance)[..., None] * off
        noise = sigma * weighted.sum(1)
        shrink = (alpha * gm.stds.square())[..., None]
        data = (logits.softmax(-1)[..., None] * gm.means + shrink * weighted).sum(1)
        return output(alpha, sigma, data, noise).to(x.dtype)

    return net


def linear_level(steps: int = 1000, low: float = 1e-4, high: float = 0.02, unit: float = 1.0) -> Level:
    """DDPM's table at step `unit` t, interpolated in log alphas_cumprod between the steps."""
    logs = (1.0 - torch.linspace(low, high, steps, dtype=torch.float64)).log().cumsum(0)

    def level(t: Tensor) -> tuple[Tensor, Tensor]:
        step = (t * unit).clamp(0, steps - 1)
        below = step.floor().long().clamp(max=steps - 2)
        log = torch.lerp(logs[below], logs[below + 1], step - below)
        return (log / 2).exp(), (-log.expm1()).sqrt()

    return level


def cosine_level(t: Tensor) -> tuple[Tensor, Tensor]:
    """Improved DDPM's cos² with its offset, at step t of 1000: after step i, f((i + 1)/1000)/f(0)."""
    f = [((u + 0.008) / 1.008 * math.pi / 2).cos() for u in ((t + 1) / 1000, torch.zeros((), dtype=torch.float64))]
    alpha = f[0] / f[1]
    return alpha, (1 - alpha.square()).clamp(min=0).sqrt()


def vp_level(t: Tensor) -> tuple[Tensor, Tensor]:
    """Song's VP at u = t: log alpha = -u² (20 - .1)/4 - u .1/2."""
    log = -0.25 * t.square() * 19.9 - 0.05 * t
    return log.exp(), (1 - (2 * log).exp()).sqrt()


def sigma_level(t: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ones_like(t), t


def flow_level(t: Tensor) -> tuple[Tensor, Tensor]:
    """t from noise 0 to data 1."""
    return t, 1 - t


def noise_of(alpha: Tensor, sigma: Tensor, data: Tensor, noise: Tensor) -> Tensor:
    return noise


def data_of(alpha: Tensor, sigma: Tensor, data: Tensor, noise: Tensor) -> Tensor:
    return data


def v_of(alpha: Tensor, sigma: Tensor, data: Tensor, noise: Tensor) -> Tensor:
    return alpha * noise - sigma * data


def score_of(alpha: Tensor, sigma: Tensor, data: Tensor, noise: Tensor) -> Tensor:
    return -noise / sigma


def towards_data(alpha: Tensor, sigma: Tensor, data: Tensor, noise: Tensor) -> Tensor:
    return data - noise


def towards_noise(alpha: Tensor, sigma: Tensor, data: Tensor, noise: Tensor) -> Tensor:
    return noise - data


# Convention -> (the network, its options).
NETS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "ddpm": (bare(linear_level(), noise_of), {}),
    "ddpm v": (bare(linear_level(), v_of), {"prediction": "v"}),
    "ddpm of 200": (
        bare(linear_level(200, 1e-3, 0.05), noise_of),
        {"steps": 200, "beta_start": 1e-3, "beta_end": 0.05},
    ),
    "ddpm_cosine": (bare(cosine_level, noise_of), {}),
    "score_sde_vp": (bare(lambda t: vp_level(t / 999), noise_of), {}),
    "score_sde_vp function": (bare(vp_level, score_of), {"prediction": "score"}),
    "score_sde_ve": (bare(sigma_level, score_of), {}),
    "edm": (bare(sigma_level, data_of), {}),
    "k_diffusion": (bare(sigma_level, data_of), {}),
    "flow_matching": (bare(flow_level, towards_data), {}),
    "torchcfm": (lambda t, x: bare(flow_level, towards_data)(x, t), {}),
    "sit": (bare(flow_level, towards_data), {}),
    "sit gvp": (
        bare(
            lambda t: ((t * math.pi / 2).sin(), (t * math.pi / 2).cos()),
            lambda a, s, data, noise: math.pi / 2 * (s * data - a * noise),
        ),
        {"path": "gvp"},
    ),
    "rectified_flow": (bare(flow_level, towards_data), {}),
    "rectified_flow of 999": (bare(lambda t: flow_level(t / 999), towards_data), {"clock_scale": 999.0}),
    "sd3_flux": (bare(lambda t: flow_level(1 - t / 1000), towards_noise), {}),
}
