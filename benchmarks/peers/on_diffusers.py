"""diffusers' schedulers on exact noise levels.

They compute from their table `sigmas`, which is set here in float64; the network is asked at the level they compute
with, not at the integer timestep it was rounded to. `shipped` runs them untouched, to see what the rounding costs.
Several are one another: DDIM is DPMSolver++ of order 1 and EDMEuler; the EDM solvers are DPMSolver++ without rounding;
the Lu grid is the exponential one; `euler_at_final` changes nothing where the last sigma is 0, as it is here.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peers.method import Method, one_each, two_each
from problems import Problem

TINY = 1e-6  # ends the methods that divide by the last sigma: a noise far below every error here


def _sigmas(problem: Problem, levels: list[float], last: float, ve: bool) -> Tensor:
    sigmas = [level if ve or problem.family != "flow" else level / (1 + level) for level in levels]
    return torch.tensor([*sigmas, last], dtype=torch.float64)


def _scheduler(name: str, flow: bool, **options: Any) -> Any:
    import diffusers

    extra = {"use_flow_sigmas": True} if flow else {}
    return getattr(diffusers, name)(**options, **extra)


def _scaled(level: float, flow: bool) -> tuple[float, float]:
    """alpha and sigma of a level in a flow's scaling (alpha + sigma = 1) or VP's (alpha² + sigma² = 1)."""
    norm = 1 + level if flow else math.hypot(1, level)
    return 1 / norm, level / norm


def _multistep(
    name: str, last: float, problem: Problem, levels: list[float], land: bool = False, **options: Any
) -> Tensor:
    """Schedulers that compute alpha and sigma from `sigmas`: DPMSolver (multi- and singlestep), UniPC, DEIS.

    land: the last call's data estimate is the sample, for DEIS, which of itself stops above 0.
    """
    flow = problem.family == "flow"
    scheduler = _scheduler(name, flow, prediction_type="sample", **options)
    scheduler.set_timesteps(len(levels))
    scheduler.sigmas = _sigmas(problem, levels, last, ve=False)
    scheduler.set_begin_index(0)
    scaled = [_scaled(level, flow) for level in levels]
    x = scaled[0][1] * problem.noise
    for index, (alpha, sigma) in enumerate(scaled):
        data, _ = problem.network.pair(x, alpha, sigma)
        if land and index == len(levels) - 1:
            return data
        x = scheduler.step(data, scheduler.timesteps[index], x, return_dict=False)[0]
    return x


def _karras_space(name: str, problem: Problem, levels: list[float]) -> Tensor:
    """Schedulers that step in sigma with alpha = 1: Heun, KDPM2, LMS. They are told the noise."""
    # A short training table: nothing of it is used, and KDPM2 takes long over a long one.
    scheduler = _scheduler(name, False, num_train_timesteps=max(len(levels), 2))
    scheduler.set_timesteps(len(levels))
    sigmas = _sigmas(problem, levels, 0.0, ve=True)
    twice = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    scheduler.sigmas, scheduler.is_scale_input_called = twice, True
    asked = twice
    if name == "KDPM2DiscreteScheduler":
        middle = sigmas.log().lerp(sigmas.roll(1).log(), 0.5).exp()
        scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:].repeat_interleave(2), sigmas[-1:]])
        scheduler.sigmas_interpol = torch.cat([middle[:1], middle[1:].repeat_interleave(2), middle[-1:]])
        asked = torch.stack([sigmas[:-1], middle[1:]], 1).flatten()
    elif name == "LMSDiscreteScheduler":
        scheduler.sigmas = asked = sigmas.numpy()
    scheduler.set_begin_index(0)
    x = sigmas[0] * problem.noise
    for index in range(len(scheduler.timesteps)):
        noise = problem.network.pair(x, 1.0, float(asked[index]))[1]
        x = scheduler.step(noise, scheduler.timesteps[index], x, return_dict=False)[0]
    return x


def edm(name: str, problem: Problem, levels: list[float], **options: Any) -> Tensor:
    """The EDM schedulers, told the preconditioned F."""
    scheduler = _scheduler(name, False, **options)
    scheduler.set_timesteps(len(levels))
    scheduler.sigmas, scheduler.is_scale_input_called = _sigmas(problem, levels, 0.0, ve=True), True
    scheduler.set_begin_index(0)
    x = levels[0] * problem.noise
    for index, level in enumerate(levels):
        data, _ = problem.network.pair(x, 1.0, level)
        x = scheduler.step(_precondition(data, x, level), scheduler.timesteps[index], x, return_dict=False)[0]
    return x


def _precondition(data: Tensor, x: Tensor, level: float, std: float = 0.5) -> Tensor:
    """EDM's F from the data: (data - c_skip x) / c_out."""
    square = level**2 + std**2
    return (data - std**2 / square * x) / (level * std / math.sqrt(square))


def _table(name: str, problem: Problem, levels: list[float], **options: Any) -> Tensor:
    """DDIM and PNDM, which index a table of alpha²: a table of exactly these levels, cleanest first."""
    n = len(levels)
    scheduler = _scheduler(name, False, num_train_timesteps=n, set_alpha_to_one=True, **options)
    square = [1 / (1 + level**2) for level in levels]
    scheduler.alphas_cumprod = torch.tensor(square[::-1], dtype=torch.float64)
    scheduler.set_timesteps(n)
    x = math.sqrt(1 - square[0]) * problem.noise
    for index in scheduler.timesteps.tolist():
        alpha2 = square[n - 1 - index]
        noise = problem.network.pair(x, math.sqrt(alpha2), math.sqrt(1 - alpha2))[1]
        x = scheduler.step(noise, index, x, return_dict=False)[0]
    return x


def _ipndm(problem: Problem, levels: list[float]) -> Tensor:
    """IPNDM, told v."""
    scheduler = _scheduler("IPNDMScheduler", False)
    scheduler.set_timesteps(len(levels))
    angle = torch.tensor([*levels, 0.0], dtype=torch.float64).atan()
    scheduler.alphas, scheduler.betas = angle.cos(), angle.sin()
    scheduler.set_begin_index(0)
    x = scheduler.betas[0] * problem.noise
    for index in range(len(levels)):
        alpha, sigma = scheduler.alphas[index].item(), scheduler.betas[index].item()
        data, noise = problem.network.pair(x, alpha, sigma)
        x = scheduler.step(alpha * noise - sigma * data, scheduler.timesteps[index], x, return_dict=False)[0]
    return x


def _flow_match(name: str, problem: Problem, levels: list[float]) -> Tensor:
    """FlowMatchEuler and FlowMatchHeun, told noise - data; they start at sigma = 1 itself."""
    scheduler = _scheduler(name, False)
    scheduler.set_timesteps(len(levels))
    sigmas = _sigmas(problem, levels, 0.0, ve=False)
    sigmas[0] = 1.0
    if "Heun" in name:
        sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    scheduler.sigmas = sigmas
    scheduler.set_begin_index(0)
    x = problem.noise
    for index in range(len(scheduler.timesteps)):
        sigma = sigmas[index].item()
        data, noise = problem.network.pair(x, 1 - sigma, sigma)
        x = scheduler.step(noise - data, scheduler.timesteps[index], x, return_dict=False)[0]
    return x


def methods(family: str) -> Iterator[Method]:
    importlib.import_module("diffusers")

    def method(label: str, run: Callable, levels: Callable[[int], int] = one_each, grids: tuple = ("",)) -> Method:
        return Method("diffusers", label, levels, run, grids)

    dpm, single, unipc = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"
    noise = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "euler_at_final": True}
    for order in (2, 3):
        yield method(f"dpmsolver++ {order}", partial(_multistep, dpm, 0.0, solver_order=order))
        yield method(f"dpmsolver {order}", partial(_multistep, dpm, TINY, solver_order=order, **noise))
        options = {"solver_order": order, "lower_order_final": True}
        yield method(f"singlestep ++ {order}", partial(_multistep, single, 0.0, **options))
        yield method(
            f"deis {order}", partial(_multistep, "DEISMultistepScheduler", TINY, solver_order=order, land=True)
        )
        yield method(f"unipc {order} bh2", partial(_multistep, unipc, 0.0, solver_order=order))
        # bh1 gives NaN where the last sigma is 0 (its B(h) is infinite there, times an empty sum).
        yield method(f"unipc {order} bh1", partial(_multistep, unipc, TINY, solver_order=order, solver_type="bh1"))
        options = {"solver_order": order, "predict_x0": False}
        yield method(f"unipc {order} noise", partial(_multistep, unipc, TINY, **options))
    yield method("dpmsolver++ 2 heun", partial(_multistep, dpm, 0.0, solver_order=2, solver_type="heun"))
    yield method("dpmsolver++ 3 high final", partial(_multistep, dpm, 0.0, solver_order=3, lower_order_final=False))
    if family == "flow":
        yield method("flow euler", partial(_flow_match, "FlowMatchEulerDiscreteScheduler"))
        yield method("flow heun", partial(_flow_match, "FlowMatchHeunDiscreteScheduler"), two_each)
        return
    yield method("ddim", partial(_table, "DDIMScheduler", clip_sample=False))
    pndm = partial(_table, "PNDMScheduler", skip_prk_steps=True, timestep_spacing="trailing")
    yield method("pndm", pndm, lambda nfe: nfe - 1)
    yield method("ipndm", _ipndm)
    yield method("heun", partial(_karras_space, "HeunDiscreteScheduler"), two_each)
    yield method("kdpm2", partial(_karras_space, "KDPM2DiscreteScheduler"), two_each)
    yield method("lms", partial(_karras_space, "LMSDiscreteScheduler"), grids=("karras", "exponential/0.02"))
    if family == "edm":
        own = ("karras/", "exponential/0.002")
        yield method("edm euler", partial(edm, "EDMEulerScheduler"), grids=own)
        for order in (2, 3):
            run = partial(edm, "EDMDPMSolverMultistepScheduler", solver_order=order)
            yield method(f"edm dpm {order}", run, grids=own)


def shipped(problem: Problem, name: str, n: int, exact: bool = False, **options: Any) -> Tensor:
    """A VP or flow scheduler as it ships: its own 1000 integer timesteps, float32 sigmas and start.

    exact: the network is asked at the level the scheduler computes with, not at its rounded timestep.
    """
    flow = problem.family == "flow"
    if flow:
        match = name.startswith("FlowMatch")
        scheduler = _scheduler(name, not match, **options, **({} if match else {"prediction_type": "flow_prediction"}))
    else:
        # The path's own alpha² at the 1000 times u = i / 1000, as betas: the DDPM table is this to first order.
        alpha2 = problem.path(torch.linspace(1, 0, 1001, dtype=torch.float64)).alpha.square()
        betas = (1 - alpha2[1:] / alpha2[:-1]).tolist()
        scheduler = _scheduler(name, False, trained_betas=betas, **options)
    scheduler.set_timesteps(n)
    scheduler.set_begin_index(0)
    x = problem.noise if flow else problem.coefficients(problem.start)[1] * problem.noise
    for index, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[index].item() if exact else t.item() / 1000
        if flow:
            alpha = 1 - sigma
        else:
            level = sigma if exact else math.sqrt(1 / scheduler.alphas_cumprod[int(t)].item() - 1)
            alpha, sigma = _scaled(level, flow)
        data, noise = problem.network.pair(x, alpha, sigma)
        x = scheduler.step(noise - data if flow else noise, t, x, return_dict=False)[0]
    return x
