"""What a sampling step costs beside the network: ours, a hand-written loop, diffusers and k-diffusion, in one run.

The network is nearly free (one multiplication), so that what is timed is the library. Every contender runs the same
number of steps on the same shape; runs are interleaved and the median of the repeats is reported, so that a machine
that changes speed changes it for all. `first` is our first run, which makes the plan; later ones find it.
Usage: python benchmarks/overhead.py [--repeats 40] [--threads 2] [--unet]
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
import warnings
from collections.abc import Callable

import torch

import fluvial as fl

STEPS = 20
SHAPES = ((16, 4, 64, 64), (4, 3, 32, 32))


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


def _half_log_snr(k: int) -> float:
    return math.log(_VP[k].alpha / _VP[k].sigma)


def hand_dpmpp_2m(noise: torch.Tensor) -> torch.Tensor:
    """DPM-Solver++(2M) of a data prediction by hand, its coefficients computed beforehand."""
    x, before = noise, None
    for a, b, c, t in _DPMPP:
        data = network(x, torch.full((len(x),), t))
        change = b * data if before is None else b * data + c * before
        x, before = a * x + change, data
    return x


def _dpmpp_rows() -> list[tuple[float, float, float, float]]:
    """x, the data, the data before, t."""
    rows = []
    for k in range(STEPS - 1):
        h = _half_log_snr(k + 1) - _half_log_snr(k)
        gain = -_VP[k + 1].alpha * math.expm1(-h)
        slope = h / (2 * (_half_log_snr(k) - _half_log_snr(k - 1))) if k else 0.0
        rows.append((_VP[k + 1].sigma / _VP[k].sigma, gain * (1 + slope), -gain * slope, k / STEPS))
    return [*rows, (0.0, 1.0, 0.0, (STEPS - 1) / STEPS)]


_DPMPP = _dpmpp_rows()


def hand_unipc(noise: torch.Tensor) -> torch.Tensor:
    """A predictor of two values and a corrector of three, as UniPC, its coefficients taken as given."""
    x, last, before, earlier = noise, None, None, None
    for k in range(STEPS):
        data = network(x, torch.full((len(x),), k / STEPS))
        if last is not None:
            x = 0.9 * last + 0.05 * data + 0.06 * before
            x = x if earlier is None else x - 0.01 * earlier
        last = x
        x = 0.9 * x + 0.12 * data
        x = x if before is None else x - 0.02 * before
        before, earlier = data, before
    return x


def hand_ddpm(noise: torch.Tensor) -> torch.Tensor:
    """Ancestral sampling of a VP noise prediction by hand, with torch's own generator."""
    x = noise
    for k in range(STEPS):
        alpha, sigma, *_ = _VP[k]
        out = network(x, torch.full((len(x),), k / STEPS))
        data = (x - sigma * out) / alpha
        if k + 1 == STEPS:
            return data
        to_alpha, to_sigma, *_ = _VP[k + 1]
        fresh = to_sigma * math.sqrt(1 - (alpha * to_sigma / (to_alpha * sigma)) ** 2)
        x = to_alpha * data + math.sqrt(to_sigma**2 - fresh**2) * out + fresh * torch.randn_like(x)
    return x


HAND = {
    "euler": hand_euler,
    "ddim": hand_ddim,
    "dpmpp_2m": hand_dpmpp_2m,
    "heun": hand_heun,
    "unipc": hand_unipc,
    "ddpm": hand_ddpm,
}


def our_model(solver: str) -> fl.Model:
    prediction = {"ddim": "noise", "ddpm": "noise", "dpmpp_2m": "data", "unipc": "data"}.get(solver, "velocity")
    return fl.Model(network, fl.paths.Rectified() if prediction == "velocity" else fl.paths.VP(), prediction)


def ours(solver: str) -> Callable[[torch.Tensor], torch.Tensor]:
    model = our_model(solver)
    return lambda noise: fl.sample(model, noise, solver=solver, steps=STEPS, seed=0)


def diffusers_loop(solver: str) -> Callable[[torch.Tensor], torch.Tensor] | None:
    try:
        import diffusers
    except ImportError:
        return None
    name = {
        "euler": "FlowMatchEulerDiscreteScheduler",
        "heun": "FlowMatchHeunDiscreteScheduler",
        "ddim": "DDIMScheduler",
        "dpmpp_2m": "DPMSolverMultistepScheduler",
        "unipc": "UniPCMultistepScheduler",
        "ddpm": "DDPMScheduler",
    }[solver]
    fresh = getattr(diffusers, name)()

    def run(noise: torch.Tensor) -> torch.Tensor:
        scheduler = copy.copy(fresh)
        scheduler.set_timesteps(STEPS)
        x = noise
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t.expand(len(x))), t, x, return_dict=False)[0]
        return x

    return run


def k_diffusion_loop(solver: str) -> Callable[[torch.Tensor], torch.Tensor] | None:
    if solver not in ("euler", "heun", "dpmpp_2m"):
        return None  # its Euler, on the variance-exploding path, is DDIM
    try:
        from peers.on_k_diffusion import samplers

        sampling = samplers()
    except ImportError:
        return None
    step = getattr(sampling, f"sample_{solver}")
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


def first_run(solver: str, noise: torch.Tensor, repeats: int) -> float:
    """Median microseconds per step of a run that finds no plan."""
    times = []
    for _ in range(repeats):
        run = ours(solver)
        began = time.perf_counter()
        run(noise)
        times.append((time.perf_counter() - began) / STEPS * 1e6)
    return statistics.median(times)


def unet_share(net: torch.nn.Module, repeats: int = 3) -> None:
    """Our time per step as a share of one forward of a U-Net of about 30 million parameters."""
    size = sum(p.numel() for p in net.parameters()) / 1e6
    x = torch.randn(16, 4, 64, 64)
    forwards = []
    for _ in range(repeats):
        began = time.perf_counter()
        net(x, torch.zeros(16))
        forwards.append(time.perf_counter() - began)
    forward = statistics.median(forwards) * 1e6
    for solver in HAND:
        step = measure({"fluvial": ours(solver)}, x, 10)["fluvial"]
        print(f"  {solver:>9}: {step:.0f} us a step, {100 * step / forward:.3f} % of a forward")
    print(f"  (a U-Net of {size:.0f} M parameters at [16, 4, 64, 64]: {forward / 1e6:.2f} s)")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--unet", action="store_true", help="also the share of a U-Net's forward")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    # Made before the peers come in: k-diffusion's stand-ins for what it imports would mislead diffusers.
    net = fl.networks.unet(4, 64, width=128, multipliers=(1, 2, 2), layers=1) if arguments.unet else None
    print(f"microseconds per step, {STEPS} steps, median of {arguments.repeats}, {arguments.threads} threads")
    columns = ("by hand", "fluvial", "first", "ratio", "more", "diffusers", "k-diffusion")
    print(f"{'shape':>16} {'solver':>9}" + "".join(f"{name:>12}" for name in columns))
    for shape in SHAPES:
        noise = torch.randn(shape)
        for solver, hand in HAND.items():
            peers = {"diffusers": diffusers_loop(solver), "k-diffusion": k_diffusion_loop(solver)}
            contenders = {"hand": hand, "fluvial": ours(solver)}
            contenders |= {name: run for name, run in peers.items() if run is not None}
            us = measure(contenders, noise, arguments.repeats)
            us["first"] = first_run(solver, noise, arguments.repeats)
            figures = [f"{us[name]:.0f}" for name in ("hand", "fluvial", "first")]
            figures += [f"{us['fluvial'] / us['hand']:.2f}", f"{us['fluvial'] - us['hand']:.1f}"]
            figures += [f"{us[name]:.0f}" if name in us else "-" for name in peers]
            print(f"{list(shape)!s:>16} {solver:>9}" + "".join(f"{figure:>12}" for figure in figures), flush=True)
    if net is not None:
        unet_share(net)


if __name__ == "__main__":
    main()
