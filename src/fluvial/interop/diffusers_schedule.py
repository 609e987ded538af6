"""A diffusers scheduler's configuration as a path, a prediction and a clock, and the times that it visits.

| scheduler                       | path               | prediction                  | clock            |
|---|---|---|---|
| DDPM, DDIM, PNDM, Euler, DPM++… | its trained table  | noise, v, data              | 0 … N - 1        |
| FlowMatch…; use_flow_sigmas     | rectified          | flow                        | N sigma          |
| EDM…                            | EDM                | EDM's F (its v is -F)       | log(sigma)/4     |
| CMStochasticIterative           | EDM                | data, the boundary in the network | 250 log(sigma) |

A table is the one that training noised by, computed in float64; rescaled to zero terminal SNR it ends at alpha = 0
exactly. Which sampler the configuration was written for does not matter, and clipping (clip_sample, thresholding)
belongs to that sampler: it is not read.

Sources: von Platen et al.: Diffusers (2022), https://github.com/huggingface/diffusers; Lin, Liu, Li, Yang: Common
diffusion noise schedules and sample steps are flawed (2024), https://arxiv.org/abs/2305.08891, algorithm 1
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fluvial import paths, predictions
from fluvial.errors import OptionError, one_of
from fluvial.model import Clock, Model
from fluvial.paths import Path
from fluvial.predictions import Prediction

TABLES = (
    "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler", "PNDMScheduler",
    "SASolverScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
FAMILIES = {
    **dict.fromkeys(TABLES, "table"),
    **dict.fromkeys(("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"), "flow"),
    **dict.fromkeys(("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"), "edm"),
    "CMStochasticIterativeScheduler": "consistency",
}
OURS = "FluvialScheduler"
_MOST = 1_000_000  # entries of a table: thousands are the custom
_TABLE_PREDICTIONS = {"epsilon": "noise", "v_prediction": "v", "sample": "data"}


@dataclass(frozen=True)
class Schedule:
    """What a scheduler's configuration says about the network it goes with.

    Attributes:
        family: "table", "flow", "edm" or "consistency".
        path, prediction, clock: the network's convention; clock None is the prediction's own.
        settings: the whole configuration, with diffusers' defaults where it is silent.
        sign: what the network's output is multiplied with to be this prediction: -1 for EDM's "v_prediction".
    """

    family: str
    path: Path
    prediction: Prediction
    clock: Clock | None
    settings: Mapping[str, Any]
    sign: float = 1.0

    def model(self, network: Callable[..., Tensor] | nn.Module) -> Model:
        """A model of this convention around the network."""
        return Model(network, self.path, self.prediction, self.clock)

    def timestep(self, t: Any) -> Any:
        """The network's time at a path time, a float or a tensor."""
        return self.clock(t) if self.clock else self.prediction.clock(self.path(t))

    def time(self, timestep: Tensor) -> Tensor:
        """The path times, float64, of these times of the network; at most the last before the data."""
        step = timestep.to(torch.float64)
        t = (step - self.clock.offset) / self.clock.scale if self.clock else self.path.time(-8.0 * step)
        # t = 1 itself is the landing; a table's cleanest entry lies just before it.
        return t.clamp(0.0, math.nextafter(1.0, 0.0))

    def level(self, t: Any) -> Any:
        """diffusers' sigma: the share of noise on the rectified path, sigma/alpha on the others."""
        c = self.path(t)
        if self.family == "flow" or isinstance(t, Tensor):
            return c.sigma if self.family == "flow" else c.sigma / c.alpha
        return c.sigma / c.alpha if c.alpha else math.inf

    def time_of_level(self, level: float) -> float:
        """The inverse of `level`."""
        t = 1.0 - level if self.family == "flow" else self.path.time(-2.0 * math.log(level))
        return min(t, math.nextafter(1.0, 0.0))


def settings_of(scheduler: Any) -> dict[str, Any]:
    """The whole configuration of a scheduler, or of one's configuration: its defaults are filled in.

    Raises:
        OptionError: for something else, or a configuration that does not name its class.
    """
    config = scheduler if isinstance(scheduler, Mapping) else getattr(scheduler, "config", None)
    if not isinstance(config, Mapping):
        raise OptionError(f"scheduler is a {type(scheduler).__name__}; expected a diffusers scheduler or its config")
    name = (config.get("_class_name") or _recognised(config)) if scheduler is config else type(scheduler).__name__
    return {**_defaults(name), **config, "_class_name": name}


# The config of a scheduler that was made, not loaded, does not say whose it is: what it has, and has not, does.
_MARKS: tuple[tuple[str, set[str], set[str]], ...] = (
    (OURS, {"solver", "family"}, set()),
    ("LCMScheduler", {"original_inference_steps"}, set()),
    ("DDIMScheduler", {"beta_schedule"}, set()),
    ("EDMEulerScheduler", {"sigma_data", "sigma_schedule"}, set()),
    ("CMStochasticIterativeScheduler", {"sigma_data", "clip_denoised"}, set()),
    ("FlowMatchEulerDiscreteScheduler", {"shift", "num_train_timesteps"}, {"prediction_type"}),
)


def _recognised(config: Mapping[str, Any]) -> str:
    for name, has, lacks in _MARKS:
        if has <= config.keys() and not lacks & config.keys():
            return name
    raise OptionError(
        f"the config of {', '.join(sorted(config))} names no _class_name, and is not known; expected the scheduler"
    )


def _defaults(name: str) -> dict[str, Any]:
    import diffusers

    cls = getattr(diffusers, name, None)
    parameters = inspect.signature(cls.__init__).parameters if cls is not None else {}
    return {key: p.default for key, p in parameters.items() if p.default is not inspect.Parameter.empty}


def family_of(settings: Mapping[str, Any]) -> str:
    """Which kind of schedule these settings describe.

    Raises:
        OptionError: for a scheduler that is not known here.
    """
    name = settings["_class_name"]
    if name == OURS:
        return settings["family"]
    if name not in FAMILIES:
        raise one_of("diffusers scheduler", name, FAMILIES)
    flow = settings.get("use_flow_sigmas") or settings.get("prediction_type") == "flow_prediction"
    return "flow" if flow else FAMILIES[name]


def read_schedule(scheduler: Any) -> Schedule:
    """The convention in a diffusers scheduler or its configuration.

    Raises:
        OptionError: for a scheduler, a table or a prediction that is not known here.
    """
    settings = settings_of(scheduler)
    try:
        return _read(settings)
    except (KeyError, TypeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise OptionError(f"the config of the {settings['_class_name']} cannot be read: {reason}") from error


def _read(settings: dict[str, Any]) -> Schedule:
    family = family_of(settings)
    count = settings["num_train_timesteps"]
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _MOST:
        raise OptionError(f"num_train_timesteps is {count!r}; expected a whole number, 1 to {_MOST}")
    if family == "flow":
        return _flow(settings)
    if family == "table":
        return _table(settings)
    sigmas = {key: settings[key] for key in ("sigma_min", "sigma_max", "rho")}
    path = paths.EDM(**{key: float(value) for key, value in sigmas.items()})
    if family == "consistency":
        return Schedule(family, path, predictions.Data(), None, settings)
    prediction_type = settings["prediction_type"]
    if prediction_type not in ("epsilon", "v_prediction"):
        raise one_of("prediction_type of an EDM scheduler", prediction_type, ("epsilon", "v_prediction"))
    sign = -1.0 if prediction_type == "v_prediction" else 1.0
    return Schedule(family, path, predictions.EDM(settings["sigma_data"]), None, settings, sign)


def _flow(settings: dict[str, Any]) -> Schedule:
    if settings.get("invert_sigmas"):
        raise OptionError("the scheduler has invert_sigmas; expected a clock that counts the noise")
    given = settings.get("prediction_type", "flow_prediction")
    if given != "flow_prediction":
        raise OptionError(f"prediction_type is {given!r} on flow sigmas; expected 'flow_prediction'")
    clock = Clock.noise_level(float(settings["num_train_timesteps"]))
    return Schedule("flow", paths.Rectified(), predictions.Flow(), clock, settings)


def _table(settings: dict[str, Any]) -> Schedule:
    given = settings.get("prediction_type", "epsilon")
    if given not in _TABLE_PREDICTIONS:
        raise one_of("prediction_type of a table", given, _TABLE_PREDICTIONS)
    if settings.get("timestep_type") == "continuous":
        raise OptionError("timestep_type is 'continuous', a clock of its own; expected 'discrete'")
    table = alphas_cumprod(settings)
    prediction = predictions.named(_TABLE_PREDICTIONS[given])
    return Schedule("table", paths.Discrete(table.tolist()), prediction, Clock.steps(len(table)), settings)


def alphas_cumprod(settings: Mapping[str, Any]) -> Tensor:
    """The table (N,), float64: the cumulative product of 1 - beta.

    Raises:
        OptionError: for a beta_schedule that is not known here.
    """
    n, first, last = (settings[key] for key in ("num_train_timesteps", "beta_start", "beta_end"))
    name, trained = settings["beta_schedule"], settings.get("trained_betas")
    makers: dict[str, Callable[[], Tensor]] = {
        "linear": lambda: torch.linspace(first, last, n, dtype=torch.float64),
        "scaled_linear": lambda: torch.linspace(first**0.5, last**0.5, n, dtype=torch.float64).square(),
        "sigmoid": lambda: torch.linspace(-6, 6, n, dtype=torch.float64).sigmoid() * (last - first) + first,
        **{key: lambda f=f: _betas(f, n) for key, f in _ALPHAS_CUMPROD.items()},
    }
    if trained is not None:
        betas = torch.as_tensor(trained, dtype=torch.float64)
    elif name in makers:
        betas = makers[name]()
    else:
        raise one_of("beta_schedule", name, makers)
    table = (1.0 - betas).cumprod(0)
    return zero_terminal_snr(table) if settings.get("rescale_betas_zero_snr") else table


def zero_terminal_snr(table: Tensor) -> Tensor:
    """A table with its alphas shifted and scaled so that the last is 0 and the first stays."""
    alpha = table.sqrt()
    return ((alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))).square()


def _laplace(u: float) -> float:
    log_snr = -0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6)
    return math.sqrt(1.0 / (1.0 + math.exp(-log_snr)))


_ALPHAS_CUMPROD: dict[str, Callable[[float], float]] = {
    "squaredcos_cap_v2": lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2,
    "exp": lambda u: math.exp(-12.0 * u),
    "laplace": _laplace,
}


def _betas(table: Callable[[float], float], n: int) -> Tensor:
    """The betas, at most 0.999, of a table given as a function of u = i/N."""
    values = [table(i / n) for i in range(n + 1)]
    return torch.tensor([min(1 - b / a, 0.999) for a, b in pairwise(values)], dtype=torch.float64)


def shift_of(settings: Mapping[str, Any], mu: float | None = None) -> float:
    """The shift k of a flow scheduler's sampling clock: static, or by `mu` (exp(mu), or mu itself where "linear").

    Raises:
        OptionError: for a dynamic shift without its mu.
    """
    if mu is not None:
        return mu if settings.get("time_shift_type") == "linear" else math.exp(mu)
    if settings.get("use_dynamic_shifting"):
        raise OptionError("the scheduler shifts its clock by the image's size; expected mu=, the shift's logarithm")
    return float(settings.get("shift") or settings.get("flow_shift") or 1.0)


def shifted(level: float, shift: float) -> float:
    """The noise level k u / (1 + (k - 1) u)."""
    return shift * level / (1.0 + (shift - 1.0) * level)
