"""What a sampling step costs beside the network: ours, a hand-written loop, diffusers and k-diffusion, in one run.

The network is nearly free (one multiplication), so that what is timed is the library. Every contender runs the same
number of steps on the same shape; runs are interleaved and the median of the repeats is reported, so that a machine
that changes speed changes it for all. Usage: python benchmarks/overhead.py [--repeats 40] [--threads 2]
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable

import torch

import fluvial as fl

STEPS = 20
SHAPES = ((16, 4, 64, 64), (1, 16, 128, 128), (4, 3, 32, 32))


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return x * 0.9


def hand_euler(noise: torch.Tensor) -> torch.Tensor:
    """The rectified flow by hand."""
    x = noise
    for k in range(STEPS):
        t = torch.full((len(x),), k / STEPS)
        x = x + (1 / STEPS) * network(x, t)
    return x


def hand_heun(noise: torch.Tensor) -> torch.Tensor:
    x, h = noise, 1 / STEPS
    for k in range(STEPS):
        slope = network(x, torch.full((len(x),), k * h))
        if k == STEPS - 1:
            return x + h * slope
        after = network(x + h * slope, torch.full((len(x),), (k + 1) * h))
        x = x + (h / 2) * (slope + after)
    return x


_VP = fl.paths.VP().table([k / STEPS for k in range(STEPS)])


def hand_ddim(noise: torch.Tensor) -> torch.Tensor:
    """A VP noise prediction by hand."""
    x = noise
    for k in range(STEPS):
        alpha, sigma, *_ = _VP[k]
        to_alpha, to_sigma = _VP[k + 1][:2] if k + 1 < STEPS else (1.0, 0.0)
        out = network(x, torch.full((len(x),), k / STEPS))
        data = (x - sigma * out) / alpha
        x = to_alpha * data + to_sigma * out
    return x


def ours(solver: str) -> Callable[[torch.Tensor], torch.Tensor]:
    if solver == "ddim":
        model = fl.Model(network, fl.paths.VP(), "noise")
    else:
        model = fl.Model(network, fl.paths.Rectified(), "velocity")
    return lambda noise: fl.sample(model, noise, solver=solver, steps=STEPS, seed=0)


def diffusers_loop(solver: str) -> Callable[[torch.Tensor], torch.Tensor] | None:
    try:
        from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
    except ImportError:
        return None
    kind = {"euler": FlowMatchEulerDiscreteScheduler, "heun": FlowMatchHeunDiscreteScheduler, "ddim": DDIMScheduler}
    scheduler = kind[solver]()

    def run(noise: torch.Tensor) -> torch.Tensor:
        scheduler.set_timesteps(STEPS)
        x = noise
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t.expand(len(x))), t, x, return_dict=False)[0]
        return x

    return run


@functools.cache
def k_diffusion_sampling() -> types.ModuleType | None:
    """Its samplers alone, if it is installed."""
    found = importlib.util.find_spec("k_diffusion")
    if found is None or not found.submodule_search_locations:
        return None
    # Its package imports training and evaluation code with many dependencies; the samplers need none of them.
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["k_diffusion"] = package
    for name in ("torchvision", "torchvision.transforms", "torchvision.datasets"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["torchvision.transforms"].functional = types.ModuleType("functional")  # type: ignore[attr-defined]
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]  # type: ignore[attr-defined]
    sys.modules["torchvision"].datasets = sys.modules["torchvision.datasets"]  # type: ignore[attr-defined]
    try:
        return importlib.import_module("k_diffusion.sampling")
    except ImportError as error:
        print(f"k-diffusion cannot be imported: {error}")
        return None


def k_diffusion_loop(solver: str) -> Callable[[torch.Tensor], torch.Tensor] | None:
    sampling = k_diffusion_sampling()
    if sampling is None or solver == "ddim":
        return None  # its Euler, on the variance-exploding path, is DDIM
    step = {"euler": sampling.sample_euler, "heun": sampling.sample_heun}[solver]
    sigmas = sampling.get_sigmas_karras(STEPS, 0.002, 80.0)
    return lambda noise: step(network, noise * 80.0, sigmas, disable=True)


def measure(contenders: dict[str, Callable], noise: torch.Tensor, repeats: int) -> dict[str, float]:
    """Median microseconds per step of each, the repeats interleaved."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 3):
        for name, run in contenders.items():
            began = time.perf_counter()
            run(noise)
            if repeat >= 3:
                times[name].append((time.perf_counter() - began) / STEPS * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    hand = {"euler": hand_euler, "heun": hand_heun, "ddim": hand_ddim}
    print(f"microseconds per step, {STEPS} steps, median of {arguments.repeats}, {arguments.threads} threads")
    print(
        f"{'shape':>18} {'solver':>7} {'by hand':>9} {'fluvial':>9} {'ratio':>6} {'diffusers':>10} {'k-diffusion':>12}"
    )
    worst = 0.0
    for shape in SHAPES:
        noise = torch.randn(shape)
        for solver in ("euler", "ddim", "heun"):
            peers = {"diffusers": diffusers_loop(solver), "k-diffusion": k_diffusion_loop(solver)}
            contenders = {"hand": hand[solver], "fluvial": ours(solver)}
            contenders |= {name: run for name, run in peers.items() if run is not None}
            us = measure(contenders, noise, arguments.repeats)
            ratio = us["fluvial"] / us["hand"]
            if noise.numel() > 100_000:
                worst = max(worst, ratio)
            theirs = [f"{us[name]:.0f}" if name in us else "-" for name in peers]
            print(
                f"{list(shape)!s:>18} {solver:>7} {us['hand']:9.0f} {us['fluvial']:9.0f} {ratio:6.2f} "
                f"{theirs[0]:>10} {theirs[1]:>12}"
            )
    print(f"largest ratio to the hand-written loop at the two large shapes: {worst:.2f} (claim: at most 1.3)")


if __name__ == "__main__":
    main()
