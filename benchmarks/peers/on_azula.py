"""azula's samplers on any levels: a schedule whose clock is the level itself, and a sampler's `timesteps` set to them.

Some of them divide by sigma or take its logarithm, so that none can step to 0 with all methods. Three endings, then:
"to 0" (where the method can), "denoise" (the last call's data estimate), and "stop" (the state at the lowest level,
azula's own way). REAB has a wrong variable in its last line (sigma_t where sigma_s belongs), which makes it first
order; as a library apart, "azula (patched)" is REAB with that letter mended.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from peers.method import Method
from problems import Problem


def _denoiser(problem: Problem) -> Any:
    from azula.denoise import Denoiser, DiracPosterior

    class Exact(Denoiser):
        def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
            norm = {"edm": torch.ones_like(t), "vp": (1 + t.square()).sqrt(), "flow": 1 + t}[problem.family]
            return 1 / norm, t / norm

        def forward(self, x_t: Tensor, t: Tensor, **kwargs: Any) -> Any:
            alpha, sigma = problem.coefficients(t.item())
            return DiracPosterior(mean=problem.network.pair(x_t, alpha, sigma)[0])

    return Exact()


def _run(name: str, ending: str, problem: Problem, levels: list[float], **options: Any) -> Tensor:
    sampler_type = _patched_reab() if name == "patched" else getattr(importlib.import_module("azula.sample"), name)
    nodes = torch.tensor([*levels, 0.0] if ending == "to 0" else levels, dtype=torch.float64)

    class On(sampler_type):
        timesteps = property(lambda self: nodes)

    denoiser = _denoiser(problem)
    x = problem.coefficients(levels[0])[1] * problem.noise
    if len(nodes) > 1:
        x = On(denoiser, silent=True, **options)(x)
    if ending == "denoise":
        return denoiser(x, nodes[-1]).mean
    return x / problem.coefficients(nodes[-1].item())[0]


@functools.cache
def _patched_reab() -> Any:
    """REAB with alpha_s² + sigma_s² where it has alpha_s² + sigma_t²; itself if that is mended already."""
    module = importlib.import_module("azula.sample")
    source = textwrap.dedent(inspect.getsource(module.REABSampler.__call__))
    scope = dict(vars(module))
    exec(source.replace("alpha_s**2 + sigma_t**2", "alpha_s**2 + sigma_s**2"), scope)
    return type("PatchedREAB", (module.REABSampler,), {"__call__": scope["__call__"]})


def _levels(ending: str, stages: int) -> Any:
    """N nodes are N - 1 steps; "denoise" makes one call more, and "to 0" has one node more."""
    extra = {"denoise": lambda nfe: nfe - 1, "stop": lambda nfe: nfe}
    return (lambda nfe: nfe) if ending == "to 0" else (lambda nfe: extra[ending](nfe) // stages + 1)


def methods(family: str) -> Iterator[Method]:
    importlib.import_module("azula.sample")
    logarithmic = ("denoise", "stop")
    variants: list[tuple[str, str, dict[str, Any], tuple[str, ...], int]] = [
        ("ddim", "DDIMSampler", {}, ("to 0",), 1),
        ("heun", "HeunSampler", {}, logarithmic, 2),
    ]
    for order in (2, 3):
        for name, endings in (
            ("zAB", ("to 0",)),
            ("vAB", ("to 0", "denoise")),
            ("zEAB", logarithmic),
            ("xEAB", logarithmic),
        ):
            variants.append((f"{name}{order}", f"{name}Sampler", {"order": order}, endings, 1))
        variants.append((f"REAB{order}", "REABSampler", {"order": order}, ("denoise",), 1))
        variants.append((f"REAB{order} patched", "patched", {"order": order}, logarithmic, 1))
    for label, name, options, endings, stages in variants:
        library = "azula (patched)" if name == "patched" else "azula"
        for ending in endings:
            run = functools.partial(_run, name, ending, **options)
            # Stopping at a level is an error of that level: worth a try only at the lowest.
            grids = ("karras/0.002", "exponential/0.002", "karras rho 3/0.002") if ending == "stop" else ("",)
            yield Method(library, f"{label} {ending}", _levels(ending, stages), run, grids)


def default(problem: Problem, nfe: int) -> Tensor:
    """Its documented use: DDIM, equal steps of the schedule's clock down to its sigma_min, the state as the sample."""
    last = 2e-3 if problem.family == "edm" else 1e-3
    if problem.family == "edm":  # VESchedule is geometric
        levels = [last * (problem.start / last) ** (1 - k / nfe) for k in range(nfe + 1)]
    else:
        times = [k / nfe for k in range(1, nfe)]
        levels = [problem.start, *(math.exp(-problem.path.log_snr(t) / 2) for t in times), last]
    return _run("DDIMSampler", "stop", problem, levels)
