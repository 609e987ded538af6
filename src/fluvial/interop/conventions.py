"""The named conventions of the field: what a network of that name is given, and what it puts out.

| name | the state's path | time given to the network | it puts out |
|---|---|---|---|
| ddpm | a table of linear betas | step 0 … N - 1 from the data | noise |
| ddpm_cosine | a table, cos² with an offset | step 0 … N - 1 from the data | noise |
| score_sde_vp | VP | 999 u, u = 1 - t | noise |
| score_sde_ve | VE | sigma | score |
| edm | EDM: data + sigma noise | sigma | data, the denoiser D(x, sigma) |
| k_diffusion | EDM: data + sigma noise | sigma | data, the denoised |
| flow_matching | rectified | t | velocity, data - noise |
| torchcfm | rectified | t, and before the state | velocity |
| sit | rectified, cosine (GVP) or VP | t | velocity |
| rectified_flow | rectified | t | velocity |
| sd3_flux | rectified | 1000 (1 - t) | flow, noise - data |

What varies within a name (steps, betas, sigmas, another prediction) is an option of it. A convention says nothing of
the units of the data, but in words: that is the caller's `Normalisation`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fluvial import paths, predictions
from fluvial.convention import Clock, Convention, SigmaClock
from fluvial.errors import OptionError, one_of
from fluvial.paths import Path


@dataclass(frozen=True)
class Foreign:
    """A convention of the field, and how a network of it is called.

    Attributes:
        name: its name here.
        convention: path, prediction, clock and input scaling, as the library means them.
        data: the units the data usually are in, in words.
        source: title, authors, year, link.
        time_first: whether it is called net(t, x) and not net(x, t).
        whole: whether it knows whole steps only (a table of embeddings) and is given them as int64.
        learned_variance: whether it puts out twice the channels, of which the second half is a variance.
    """

    name: str
    convention: Convention
    data: str
    source: str
    time_first: bool = False
    whole: bool = False
    learned_variance: bool = False

    def __str__(self) -> str:
        return f"{self.name}: {in_words(self.convention)}; data in {self.data}"


_MINUS_ONE_TO_ONE = "[-1, 1]"
_LATENTS = "[-1, 1], or latents of its autoencoder brought to a standard deviation near 1"
_HO = "Ho, Jain, Abbeel: Denoising diffusion probabilistic models (2020), https://arxiv.org/abs/2006.11239"
_NICHOL = "Nichol, Dhariwal: Improved DDPM (2021), https://arxiv.org/abs/2102.09672"
_SONG = "Song et al.: Score-based generative modeling through SDEs (2021), https://arxiv.org/abs/2011.13456"
_KARRAS = "Karras, Aittala, Aila, Laine: Elucidating the design space (2022), https://arxiv.org/abs/2206.00364"
_LIPMAN = "Lipman, Chen, Ben-Hamu, Nickel, Le: Flow matching (2022), https://arxiv.org/abs/2210.02747"
_TONG = "Tong et al.: Improving and generalizing flow-based models (2023), https://arxiv.org/abs/2302.00482"
_MA = "Ma et al.: SiT: exploring flow and diffusion (2024), https://arxiv.org/abs/2401.08740"
_LIU = "Liu, Gong, Liu: Flow straight and fast (2022), https://arxiv.org/abs/2209.03003"
_ESSER = "Esser et al.: Scaling rectified flow transformers (2024), https://arxiv.org/abs/2403.03206"


def linear_table(steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> list[float]:
    """alphas_cumprod of betas spaced evenly from beta_start to beta_end: prod(1 - beta_i)."""
    _checked(steps, beta_start, beta_end)
    return (1.0 - torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)).cumprod(0).tolist()


def scaled_linear_table(steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> list[float]:
    """alphas_cumprod of betas whose square roots are spaced evenly: the table of Stable Diffusion."""
    _checked(steps, beta_start, beta_end)
    roots = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64)
    return (1.0 - roots.square()).cumprod(0).tolist()


def cosine_table(steps: int = 1000, offset: float = 0.008, beta_max: float = 0.999) -> list[float]:
    """alphas_cumprod of beta_i = min(beta_max, 1 - f((i + 1)/N)/f(i/N)), f(u) = cos²(pi/2 (u + s)/(1 + s)).

    Source: Nichol, Dhariwal: Improved DDPM (2021), https://arxiv.org/abs/2102.09672, equation 17
    """
    _checked_steps(steps)
    u = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)
    f = ((u + offset) / (1.0 + offset) * math.pi / 2).cos().square()
    return (1.0 - (1.0 - f[1:] / f[:-1]).clamp(max=beta_max)).cumprod(0).tolist()


def _checked(steps: int, beta_start: float, beta_end: float) -> None:
    _checked_steps(steps)
    if not 0.0 < beta_start <= beta_end < 1.0:
        raise OptionError(
            f"beta_start is {beta_start} and beta_end {beta_end}; expected 0 < beta_start <= beta_end < 1"
        )


def _checked_steps(steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise OptionError(f"steps is {steps!r}; expected a whole number, 2 or more, such as 1000")


def _convention(path: Path, prediction: str, clock: Callable[[Any], Any] | None = None) -> Convention:
    return Convention(path, predictions.named(prediction), clock)


def _ddpm(
    steps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    betas: str = "linear",
    prediction: str = "noise",
    whole: bool = False,
    learned_variance: bool = False,
) -> Foreign:
    tables = {"linear": linear_table, "scaled_linear": scaled_linear_table}
    if betas not in tables:
        raise one_of("kind of betas", betas, tables)
    path = paths.Discrete(tables[betas](steps, beta_start, beta_end))
    found = _convention(path, prediction, Clock.steps(steps))
    return Foreign("ddpm", found, _MINUS_ONE_TO_ONE, _HO, whole=whole, learned_variance=learned_variance)


def _ddpm_cosine(
    steps: int = 1000,
    offset: float = 0.008,
    beta_max: float = 0.999,
    prediction: str = "noise",
    whole: bool = False,
    learned_variance: bool = False,
) -> Foreign:
    path = paths.Discrete(cosine_table(steps, offset, beta_max))
    found = _convention(path, prediction, Clock.steps(steps))
    return Foreign("ddpm_cosine", found, _MINUS_ONE_TO_ONE, _NICHOL, whole=whole, learned_variance=learned_variance)


def _score_sde_vp(beta_min: float = 0.1, beta_max: float = 20.0, prediction: str = "noise") -> Foreign:
    # Their network puts out the noise and counts 999 u; their score function divides by -sigma and counts u.
    clock = Clock.noise_level(1.0 if prediction == "score" else 999.0)
    found = _convention(paths.VP(beta_min, beta_max), prediction, clock)
    return Foreign("score_sde_vp", found, _MINUS_ONE_TO_ONE, _SONG)


def _score_sde_ve(sigma_min: float = 0.01, sigma_max: float = 50.0, prediction: str = "score") -> Foreign:
    path = paths.VE(sigma_min, sigma_max)
    return Foreign("score_sde_ve", _convention(path, prediction, SigmaClock(path)), "[0, 1]", _SONG)


def _edm(sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Foreign:
    path = paths.EDM(sigma_min, sigma_max, rho)
    return Foreign("edm", _convention(path, "data", SigmaClock(path)), _MINUS_ONE_TO_ONE, _KARRAS)


def _k_diffusion(sigma_min: float = 0.01, sigma_max: float = 80.0, rho: float = 7.0) -> Foreign:
    path = paths.EDM(sigma_min, sigma_max, rho)
    return Foreign("k_diffusion", _convention(path, "data", SigmaClock(path)), _LATENTS, _KARRAS)


def _flow_matching() -> Foreign:
    return Foreign("flow_matching", _convention(paths.Rectified(), "velocity"), "any units", _LIPMAN)


def _torchcfm() -> Foreign:
    return Foreign("torchcfm", _convention(paths.Rectified(), "velocity"), "any units", _TONG, time_first=True)


def _sit(path: str = "linear", prediction: str = "velocity") -> Foreign:
    known = {"linear": paths.Rectified(), "gvp": paths.Cosine(), "vp": paths.VP()}
    if path not in known:
        raise one_of("path of SiT", path, known)
    return Foreign("sit", _convention(known[path], prediction), _LATENTS, _MA)


def _rectified_flow(clock_scale: float = 1.0) -> Foreign:
    # The first released networks kept the embedding of score_sde, and count 999 t.
    clock = None if clock_scale == 1.0 else Clock(clock_scale)
    return Foreign("rectified_flow", _convention(paths.Rectified(), "velocity", clock), _MINUS_ONE_TO_ONE, _LIU)


def _sd3_flux(clock_scale: float = 1000.0) -> Foreign:
    found = _convention(paths.Rectified(), "flow", Clock.noise_level(clock_scale))
    return Foreign("sd3_flux", found, _LATENTS, _ESSER)


_NAMED: dict[str, Callable[..., Foreign]] = {
    "ddpm": _ddpm,
    "ddpm_cosine": _ddpm_cosine,
    "score_sde_vp": _score_sde_vp,
    "score_sde_ve": _score_sde_ve,
    "edm": _edm,
    "k_diffusion": _k_diffusion,
    "flow_matching": _flow_matching,
    "torchcfm": _torchcfm,
    "sit": _sit,
    "rectified_flow": _rectified_flow,
    "sd3_flux": _sd3_flux,
}

NAMES = tuple(_NAMED)


def foreign(name: str | Foreign | Convention, **options: Any) -> Foreign:
    """A convention of the field by name, with its options; an object as it is.

    Args:
        name: one of `NAMES`, or a `Foreign`, or a `fl.model.Convention` of your own.
        options: what varies within the name:
            ddpm: steps, beta_start, beta_end, betas ("linear", "scaled_linear"), prediction, whole, learned_variance;
            ddpm_cosine: steps, offset, beta_max, prediction, whole, learned_variance;
            score_sde_vp: beta_min, beta_max, prediction ("score": their score function, whose time is u);
            score_sde_ve: sigma_min, sigma_max, prediction;
            edm, k_diffusion: sigma_min, sigma_max, rho, the range of noise that was trained;
            sit: path ("linear", "gvp", "vp"), prediction;
            rectified_flow, sd3_flux: clock_scale.

    Raises:
        OptionError: for an unknown name or option, which lists the known ones.
    """
    if isinstance(name, (Foreign, Convention)):
        if options:
            raise OptionError(f"the convention is an object and was given {', '.join(options)}; expected no options")
        return name if isinstance(name, Foreign) else Foreign("your own", name, "any units", "yours")
    if name not in _NAMED:
        raise one_of("convention", name, _NAMED)
    allowed = inspect.signature(_NAMED[name]).parameters
    for option in options:
        if option not in allowed:
            given = f"option of convention {name!r}"
            if not allowed:
                raise OptionError(f"unknown {given} {option!r}; expected none")
            raise one_of(given, option, allowed)
    return _NAMED[name](**options)


_PREDICTIONS = {
    "data": "predicts the data",
    "noise": "predicts the noise",
    "velocity": "predicts the velocity towards the data",
    "flow": "predicts the velocity towards the noise",
    "v": "predicts v = alpha noise - sigma data",
    "score": "predicts the score",
    "edm": "predicts EDM's F",
}


def in_words(convention: Convention) -> str:
    """A convention in one line of plain words, for messages and for `info`."""
    what = _PREDICTIONS.get(convention.prediction.name, f"predicts {convention.prediction.name}")
    path = convention.path
    if isinstance(path, paths.Discrete):
        where = f"a table of {len(path.alphas_cumprod)} steps"
    else:
        where = f"the path {path!r}"
    scaled = ", its input scaled by a function" if convention.scale_input else ""
    return f"{what} on {where}, time: {_clock_in_words(convention)}{scaled}"


def _clock_in_words(convention: Convention) -> str:
    clock = convention.clock
    if clock is None:
        fixed = convention.prediction.clock(convention.path(0.5)) is not None
        return "log(sigma)/4" if fixed else "t from noise 0 to data 1"
    if isinstance(clock, SigmaClock):
        level = "sigma" if clock.unit == 1.0 else f"sigma/{clock.unit:g}"
        return f"{clock.log:g} log({level})" if clock.log else level
    if isinstance(clock, Clock):
        return f"{clock(0.0):g} at the noise, {clock(1.0):g} at the data"
    return "a function"
