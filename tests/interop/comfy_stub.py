"""What stands for ComfyUI in the tests: written from what its samplers are called with, and keeping its names.

With it, two problems: a denoiser with no closed form, and the exact one of data Normal(MEAN, STD²).
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

MEAN, STD = 0.6, 0.5


class EPS:
    """x = data + sigma noise."""

    def __init__(self):
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
        table = (1 - betas).cumprod(0)
        self.sigmas = ((1 - table) / table).sqrt().float()
        self.sigma_min, self.sigma_max = self.sigmas[0], self.sigmas[-1]

    def noise_scaling(self, sigma, noise, latent, max_denoise=False):
        return noise * (torch.sqrt(1 + sigma**2) if max_denoise else sigma) + latent

    def inverse_noise_scaling(self, sigma, latent):
        return latent


class CONST:
    """x = (1 - sigma) data + sigma noise."""

    def __init__(self, shift=3.0, noise_scale=1.0):
        u = torch.arange(1, 1001) / 1000
        self.sigmas, self.noise_scale = shift * u / (1 + (shift - 1) * u), noise_scale
        self.sigma_min, self.sigma_max = self.sigmas[0], self.sigmas[-1]

    def noise_scaling(self, sigma, noise, latent, max_denoise=False):
        return sigma * self.noise_scale * noise + (1 - sigma) * latent

    def inverse_noise_scaling(self, sigma, latent):
        return latent / (1 - sigma)


class Flow(CONST):
    """A subclass, as ComfyUI makes them."""


def column(sigma, x):
    return sigma.reshape(-1, *[1] * (x.ndim - 1))


def spread_of(sigma, flow, scale=1.0):
    """(mean, standard deviation) of the closed-form problem at a noise level: data Normal(MEAN, STD²)."""
    alpha = 1 - sigma if flow else 1.0
    return alpha * MEAN, (alpha**2 * STD**2 + (scale * sigma) ** 2) ** 0.5


class Guider:
    """What wraps the model in a workflow; it keeps the noise levels that it was asked at."""

    def __init__(self, sampling, denoise):
        self.inner_model = SimpleNamespace(model_sampling=sampling)
        self.denoise, self.asked = denoise, []

    def __call__(self, x, sigma, model_options=None, seed=None):
        assert sigma.shape == (len(x),)
        assert sigma.dtype == x.dtype
        self.asked.append(float(sigma[0]))
        return self.denoise(x, column(sigma, x))


class Inpaint:
    """The outermost wrapper: outside of the mask the latent is noised anew, and kept."""

    def __init__(self, model, latent=None, noise=None):
        self.inner_model, self.latent, self.noise = model, latent, noise

    def __call__(self, x, sigma, denoise_mask=None, **options):
        if denoise_mask is None:
            return self.inner_model(x, sigma, **options)
        scaling = self.inner_model.inner_model.model_sampling.noise_scaling
        x = x * denoise_mask + scaling(column(sigma, x), self.noise, self.latent) * (1 - denoise_mask)
        return self.inner_model(x, sigma, **options) * denoise_mask + self.latent * (1 - denoise_mask)


class KSAMPLER:
    def __init__(self, sampler_function, extra_options=None, inpaint_options=None):
        self.sampler_function, self.extra_options = sampler_function, extra_options or {}

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None):
        sampling, total = model_wrap.inner_model.model_sampling, len(sigmas) - 1
        x = sampling.noise_scaling(sigmas[0], noise, latent_image)
        tell = None if callback is None else lambda d: callback(d["i"], d["denoised"], d["x"], total)
        model_k = Inpaint(model_wrap, latent_image, noise)
        out = self.sampler_function(
            model_k,
            x,
            sigmas,
            extra_args={**extra_args, "denoise_mask": denoise_mask},
            callback=tell,
            disable=True,
            **self.extra_options,
        )
        return sampling.inverse_noise_scaling(sigmas[-1], out)


def install(monkeypatch):
    """`import comfy.samplers` finds the KSAMPLER above."""
    package, samplers = ModuleType("comfy"), ModuleType("comfy.samplers")
    samplers.KSAMPLER = KSAMPLER  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfy", package)
    monkeypatch.setitem(sys.modules, "comfy.samplers", samplers)


def curved(x, sigma):
    """A denoiser with no closed form."""
    return torch.tanh(0.7 * x + 0.2 * x.flip(-1)) * torch.cos(0.3 * sigma / (1 + sigma))


def gaussian(flow, scale=1.0):
    """The exact denoiser of Normal(MEAN, STD²)."""

    def denoise(x, sigma):
        alpha = 1 - sigma if flow else 1.0
        return MEAN + alpha * STD**2 / (alpha**2 * STD**2 + (scale * sigma) ** 2) * (x - alpha * MEAN)

    return denoise


def model(flow, denoise=None, **options):
    sampling = Flow(**options) if flow else EPS()
    return Inpaint(Guider(sampling, denoise or curved))


def levels(flow, steps=6, start=1.0, dtype=torch.float32):
    """Falling noise levels, the last 0."""
    if flow:
        u = torch.linspace(start, 0, steps + 1, dtype=torch.float64)
        return (3 * u / (1 + 2 * u)).to(dtype)
    roots = torch.linspace((14.6 * start) ** (1 / 7), 0.03 ** (1 / 7), steps, dtype=torch.float64)
    return torch.cat([roots**7, torch.zeros(1, dtype=torch.float64)]).to(dtype)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


FLOW = pytest.mark.parametrize("flow", [False, True], ids=["eps", "const"])
