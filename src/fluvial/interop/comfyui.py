"""ComfyUI: every solver as a sampler for its workflows, and every grid as sigmas.

`sampler_function` has the shape of ComfyUI's k-diffusion samplers, and `FluvialSampler` and `FluvialSigmas` are nodes
for its custom sampling: copy `recipes/comfyui` into `custom_nodes`. ComfyUI itself is imported inside the nodes only.

What it calls a model is a function denoised(x, sigma). Which path x lies on is read from the model's `model_sampling`:

| its kind           | x                                     | path                                       |
|---|---|---|
| CONST (SD3, Flux)  | (1 - sigma) data + sigma noise        | rectified, t = 1 - sigma                   |
| all others         | data + sigma noise                    | EDM, from the model's sigma_max to sigma_min |

On the second Euler, Heun and other Runge-Kutta methods step in sigma, as k-diffusion's do. What a solver counts by the
path's own time (the c of `overshoot`, say) is counted by EDM's, whatever part of the levels a run visits.

Source: comfyanonymous: ComfyUI (2023), https://github.com/comfyanonymous/ComfyUI; Crowson: k-diffusion (2022),
https://github.com/crowsonkb/k-diffusion
"""

from __future__ import annotations

import importlib
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from fluvial import grids, solvers
from fluvial.convention import Clock
from fluvial.errors import OptionError
from fluvial.grids import Fitted
from fluvial.interop.conventions import SigmaClock
from fluvial.model import Model
from fluvial.paths import EDM, Discrete, Path, Rectified
from fluvial.running import StepReport
from fluvial.sampling import sample
from fluvial.solvers import Churn, Dopri5, Jump, Restart, RungeKutta, Solver, read_option

# One of these has times of its own, the other is for flow maps.
NAMES = tuple(name for name in solvers.names() if name not in ("dopri5", "jump"))
# What ComfyUI shifts is the model's own clock, which these grids are laid on.
GRIDS = tuple(name for name in grids.names() if name != "shifted")

_BELOW_ONE = math.nextafter(1.0, 0.0)


def sampler_function(
    model_k: Callable[..., Tensor],
    noise_or_x: Tensor,
    sigmas: Tensor | Sequence[float],
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], Any] | None = None,
    disable: bool | None = None,
    *,
    solver: str | Solver = "dpmpp_2m",
    flow: bool | None = None,
    **options: Any,
) -> Tensor:
    """The state at the last of these noise levels from that at the first, as ComfyUI's `KSAMPLER` calls a sampler.

    Every level is visited exactly. The last 0 lands on the data estimate; a run that ends above 0 returns its state
    there, noise and all, for another sampler to go on from. Masks are kept, because ComfyUI applies them in the model.

    Args:
        model_k: denoised(x, sigma, **extra_args), x (B, …) and sigma (B,).
        noise_or_x: (B, …) the state at sigmas[0]: noised data, or noise alone.
        sigmas: falling noise levels, two or more.
        extra_args: what the model is called with; the `seed` among them gives the steps' noise, which for each sample
            of the batch is its own.
        callback: called once a step with x, denoised and sigma_hat of the step's first call, its number i, and sigma,
            that is sigmas[i]. Where a solver goes back (restart) i stands still.
        disable: False shows a progress bar.
        solver: a name out of `NAMES`, or an object.
        flow: whether x is (1 - sigma) data + sigma noise; None reads it from the model.
        options: the solver's, by name.

    Raises:
        OptionError: for sigmas that do not fall, or hold a negative number or NaN; for a solver or an option that is
            not known.
        NonFiniteError: when a number that is not finite comes out.
    """
    sampling = _sampling_of(model_k)
    flow = _is_flow(sampling) if flow is None else flow
    levels = _checked(sigmas, flow)
    path = _path(levels, sampling, flow)
    times = _times(levels, path, flow)
    clock = Clock.noise_level(1.0) if flow else SigmaClock(path)
    scale = float(getattr(sampling, "noise_scale", 1.0)) if flow else 1.0
    network = _Network(model_k, extra_args or {}, scale)
    out = sample(
        Model(network, path, "data", clock),
        solver=_suited(solvers.named(solver, **options), path, flow),
        times=times,
        state=noise_or_x if scale == 1.0 else noise_or_x / scale,
        seed=(extra_args or {}).get("seed"),
        callback=None if callback is None else _reporter(callback, network, times, sigmas),
        progress=disable is False,
    )
    return (out if scale == 1.0 else out * scale).to(noise_or_x.dtype)


class _Network:
    """ComfyUI's model as a network of time sigma, for noise of variance 1; it remembers the first call of a step.

    Some flow models count noise of another scale: x/scale is then a state of the path, and denoised/scale its data.
    """

    def __init__(self, model_k: Callable[..., Tensor], extra_args: Mapping[str, Any], scale: float) -> None:
        self.model_k, self.extra_args, self.scale = model_k, extra_args, scale
        self.first: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        x = x if self.scale == 1.0 else x * self.scale
        out = self.model_k(x, sigma, **self.extra_args)
        if self.first is None:
            self.first = x, sigma[0], out
        return out if self.scale == 1.0 else out / self.scale


def _reporter(
    callback: Callable[[dict[str, Any]], Any], network: _Network, times: list[float], sigmas: Tensor | Sequence[float]
) -> Callable[[StepReport], None]:
    furthest = 0

    def report(step: StepReport) -> None:
        nonlocal furthest
        furthest = max(furthest, bisect_right(times, step.t) - 1)
        if network.first is not None:
            x, sigma_hat, denoised = network.first
            i = furthest - 1
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigma_hat, "denoised": denoised})
        network.first = None

    return report


def _sampling_of(model_k: Any) -> Any:
    """The model's `model_sampling`, through ComfyUI's wrappers (inpainting, then guidance); None if there is none."""
    found = model_k
    while found is not None:
        if (sampling := getattr(found, "model_sampling", None)) is not None:
            return sampling
        found = getattr(found, "inner_model", None)
    return None


def _is_flow(sampling: Any) -> bool:
    """Whether a `model_sampling` is of ComfyUI's kind CONST, told by name so that nothing need be imported."""
    return any(kind.__name__ == "CONST" for kind in type(sampling).__mro__)


def _checked(sigmas: Tensor | Sequence[float], flow: bool) -> list[float]:
    levels = [float(level) for level in (sigmas.tolist() if isinstance(sigmas, Tensor) else sigmas)]
    falls = all(above > below for above, below in pairwise(levels))
    if len(levels) < 2 or not falls or not 0.0 <= levels[-1] <= levels[0] < math.inf:
        shown = ", ".join(f"{level:g}" for level in levels[:6]) + (", …" if len(levels) > 6 else "")
        raise OptionError(f"sigmas is [{shown}]; expected two or more noise levels that fall strictly, none below 0")
    if flow and levels[0] > 1.0:
        raise OptionError(
            f"sigmas begins at {levels[0]:g} and the model is a flow; expected shares of noise, at most 1"
        )
    return levels


def _path(levels: list[float], sampling: Any, flow: bool) -> Path:
    if flow:
        return Rectified()
    # The model's own range, so that a part of a run counts time as the whole of it does.
    own = EDM() if getattr(sampling, "sigma_max", None) is None else sampling
    lowest = levels[-1] or levels[-2]
    return EDM(min(float(own.sigma_min), lowest), max(float(own.sigma_max), levels[0]))


def _times(levels: list[float], path: Path, flow: bool) -> list[float]:
    """The path times of falling noise levels; t = 1 is the landing alone."""
    return [
        1.0 if level == 0.0 else min(1.0 - level if flow else path.time(-2.0 * math.log(level)), _BELOW_ONE)
        for level in levels
    ]


def _suited(solver: Solver, path: Path, flow: bool) -> Solver:
    """The solver, with Runge-Kutta steps in sigma where the path is EDM's."""
    if isinstance(solver, Dopri5 | Jump):
        raise OptionError(f"solver is {solver.name}, which a given list of sigmas does not suit; expected another")
    if flow or not isinstance(path, EDM):
        return solver
    in_sigma = EDM(path.sigma_min / 2, 2 * path.sigma_max, rho=1.0)
    if isinstance(solver, RungeKutta) and solver.along is None:
        return replace(solver, along=in_sigma)
    if isinstance(solver, Churn | Restart) and isinstance(solver.base, RungeKutta) and solver.base.along is None:
        return replace(solver, base=replace(solver.base, along=in_sigma))
    return solver


# The nodes.


class FluvialSampler:
    """Node: any solver as a SAMPLER for custom sampling.

    `options` are the solver's own, such as "gamma=0.5" for langevin, "eta=0.3" for ddim or "c=2" for overshoot, with
    commas between; a solver refuses what it does not have, and says what it has.
    """

    CATEGORY: ClassVar[str] = "sampling/custom_sampling/samplers"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("SAMPLER",)
    FUNCTION: ClassVar[str] = "get_sampler"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = "the solver's own, by name: gamma=0.5 (langevin), eta=0.3 (ddim), c=2 (overshoot), s_churn=20 (churn)"
        return {
            "required": {"solver": (list(NAMES), {"default": "dpmpp_2m"})},
            "optional": {"options": ("STRING", {"default": "", "tooltip": tooltip})},
        }

    def get_sampler(self, solver: str, options: str = "") -> tuple[Any]:
        """A `KSAMPLER` around `sampler_function`.

        Raises:
            OptionError: for a solver or an option that is not known, or a value that is none of it.
        """
        made = solvers.named(solver)
        given: dict[str, Any] = {}
        for part in filter(None, (part.strip() for part in options.split(","))):
            name, equals, text = (piece.strip() for piece in part.partition("="))
            if not equals:
                raise OptionError(f"options holds {part!r}; expected name=value, with commas between")
            given[name] = read_option(made, name, text)
        _suited(solvers.named(solver, **given), Rectified(), flow=True)
        samplers = importlib.import_module("comfy.samplers")
        return (samplers.KSAMPLER(sampler_function, extra_options={"solver": solver, **given}),)


class FluvialSigmas:
    """Node: any grid as SIGMAS, between the model's own highest and lowest noise level, and 0 after them.

    "uniform", "cosine" and "beta" count on the model's own clock (its training steps; of a flow, its noise shares with
    the shift that the model is set to); the others mean the same on every model. "fitted" is made of `levels`, those of
    a `fl.grids.Fitted`: rising numbers alpha/(alpha + sigma) from 0 to 1, with commas between. With denoise below 1 the
    sigmas are the last `steps` of a grid of steps/denoise, as ComfyUI's own schedulers make them.
    """

    CATEGORY: ClassVar[str] = "sampling/custom_sampling/schedulers"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("SIGMAS",)
    FUNCTION: ClassVar[str] = "get_sigmas"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "grid": (list(GRIDS), {"default": "log_snr"}),
                "steps": ("INT", {"default": 20, "min": 1, "max": 10000}),
                "denoise": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}),
            },
            "optional": {"levels": ("STRING", {"default": "", "tooltip": "of a fitted grid: 0, 0.02, …, 1"})},
        }

    def get_sigmas(self, model: Any, grid: str, steps: int, denoise: float = 1.0, levels: str = "") -> tuple[Tensor]:
        """Falling noise levels (steps + 1,), float32, the last 0; none where denoise is 0.

        Raises:
            OptionError: for a grid that is not known, or levels that make none.
        """
        if denoise <= 0.0:
            return (torch.empty(0),)
        sampling = model.get_model_object("model_sampling")
        flow = _is_flow(sampling)
        path = _own_clock(sampling, flow)
        laid = grids.named(grid, _fitted(levels) if levels.strip() else None)
        total = steps if denoise >= 1.0 else int(steps / denoise)
        nodes = grids.resolve(laid, path, total, total)[-(steps + 1) : -1]
        found = [c.sigma if flow else c.sigma / c.alpha for c in path.table(nodes)]
        return (torch.tensor([*found, 0.0], dtype=torch.float32),)


def _own_clock(sampling: Any, flow: bool) -> Path:
    """The path on the clock that the model's table of sigmas counts: rectified with its shift, or a table."""
    table = sampling.sigmas.to("cpu", torch.float64)
    if not flow:
        # Some tables are clamped, and repeat their ends.
        return Discrete((1.0 / (1.0 + table.unique().square())).tolist())
    # Half of the clock is k/(1 + k) of the noise.
    middle = float(table[len(table) // 2 - 1])
    return Rectified().shifted(middle / (1.0 - middle))


def _fitted(levels: str) -> Fitted:
    try:
        return Fitted([float(level) for level in levels.split(",")])
    except ValueError as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"levels is {levels[:40]!r}; expected numbers with commas between, from 0 to 1") from None


NODE_CLASS_MAPPINGS = {"FluvialSampler": FluvialSampler, "FluvialSigmas": FluvialSigmas}
NODE_DISPLAY_NAME_MAPPINGS = {"FluvialSampler": "Fluvial sampler", "FluvialSigmas": "Fluvial sigmas"}
