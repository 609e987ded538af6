"""k-diffusion's samplers, in sigma space: every family's state divided by alpha, as its CompVis wrapper does.

The stochastic samplers run with eta = 0, where dpmpp_sde is dpmpp_2s. dpm_fast has a grid of its own.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from peers.method import Method, one_each, two_each
from problems import Problem


@functools.cache
def samplers() -> types.ModuleType:
    """Its samplers alone."""
    found = importlib.util.find_spec("k_diffusion")
    if found is None or not found.submodule_search_locations:
        raise ImportError("No module named 'k_diffusion'")
    # Its package imports training and evaluation code with many dependencies; the samplers need none of them.
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["k_diffusion"] = package
    stand_ins = {n: types.ModuleType(n) for n in ("torchvision", "torchvision.transforms", "torchvision.datasets")}
    for name in stand_ins:
        sys.modules.setdefault(name, stand_ins[name])
    stand_ins["torchvision.transforms"].functional = types.ModuleType("functional")  # type: ignore[attr-defined]
    stand_ins["torchvision"].transforms = stand_ins["torchvision.transforms"]  # type: ignore[attr-defined]
    stand_ins["torchvision"].datasets = stand_ins["torchvision.datasets"]  # type: ignore[attr-defined]
    return importlib.import_module("k_diffusion.sampling")


def _denoiser(problem: Problem) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, sigma: problem.network.pair(x, 1.0, sigma.flatten()[0].item())[0]


def sample(name: str, problem: Problem, levels: list[float], **options: Any) -> Tensor:
    """VP and flow models in sigma space: x / alpha, as its CompVis wrapper does."""
    sigmas = torch.tensor([*levels, 0.0], dtype=torch.float64)
    sampler = getattr(samplers(), name)
    return sampler(_denoiser(problem), levels[0] * problem.noise, sigmas, disable=True, **options)


def _dpm_fast(problem: Problem, levels: list[float]) -> Tensor:
    """Its own grid between the two end levels; the last call lands on the data."""
    sampler, n = samplers().sample_dpm_fast, len(levels)
    denoise, high, low = _denoiser(problem), torch.tensor(levels[0]), torch.tensor(levels[-1])
    return denoise(sampler(denoise, levels[0] * problem.noise, low.item(), high.item(), n - 1, disable=True), low)


def methods(family: str) -> Iterator[Method]:
    samplers()
    silent = {"eta": 0.0, "noise_sampler": lambda *_: 0.0}

    def method(label: str, name: str, levels: Callable[[int], int] = one_each, **options: Any) -> Method:
        return Method("k-diffusion", label, levels, functools.partial(sample, name, **options))

    yield method("euler", "sample_euler")
    yield method("heun", "sample_heun", two_each)
    yield method("dpm_2", "sample_dpm_2", two_each)
    for order in (2, 3, 4):
        yield method(f"lms {order}", "sample_lms", order=order)
    yield method("dpmpp_2m", "sample_dpmpp_2m")
    yield method("dpmpp_2s eta 0", "sample_dpmpp_2s_ancestral", two_each, **silent)
    yield method("dpmpp_2m_sde heun eta 0", "sample_dpmpp_2m_sde", solver_type="heun", **silent)
    yield method("dpmpp_3m_sde eta 0", "sample_dpmpp_3m_sde", **silent)
    yield Method("k-diffusion", "dpm_fast", one_each, _dpm_fast, ("exponential",))
