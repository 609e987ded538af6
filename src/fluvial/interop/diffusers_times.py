"""The times that a diffusers scheduler visits, as path times: exact, unrounded, shifted once.

Integer clocks keep the spacing that the configuration names ("leading", "trailing", "linspace"). Times between the
entries are not rounded: networks read any time. A run always ends by landing on the data, without noise; the entry 0
of a table is the noise level just before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from fluvial.errors import OptionError, one_of
from fluvial.grids.closed import beta_quantile
from fluvial.interop.diffusers_schedule import Schedule, read_schedule, shift_of, shifted

_SPACED = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}
_OTHERS = ("use_lu_lambdas",)


def sampling_times(
    scheduler: Any,
    steps: int | None = None,
    *,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    mu: float | None = None,
) -> list[float]:
    """The path times that this diffusers scheduler visits: rising, the last is 1. What `fl.sample(times=…)` takes.

    Args:
        scheduler: one, or its configuration.
        steps: how many network calls a one-call method would make.
        timesteps: in its place, the network's own times, falling; they are taken as they are.
        sigmas: in its place, noise levels, falling, with or without the last 0: noise shares on a flow scheduler,
            which are then shifted, sigma/alpha on the others.
        mu: the logarithm of a flow scheduler's shift, where it depends on the image's size.

    Raises:
        OptionError: for not exactly one of steps, timesteps and sigmas, a spacing that is not known here, times that do
            not fall.
    """
    schedule = read_schedule(scheduler)
    given = [name for name, value in (("timesteps", timesteps), ("sigmas", sigmas)) if value is not None]
    if len(given) > 1 or (not given and steps is None):
        raise OptionError(f"{' and '.join(given) or 'nothing'} was given; expected steps, timesteps or sigmas")
    for values, name in ((timesteps, "timesteps"), (sigmas, "sigmas")):
        if values is not None and steps is not None and _count(values) != steps:
            raise OptionError(f"steps is {steps} and {name} has {_count(values)} levels; expected them to agree")
    if not given and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise OptionError(f"steps is {steps!r}; expected a whole number, 1 or more")
    if timesteps is not None:
        times = _of_timesteps(schedule, timesteps)
    elif schedule.family == "flow":
        times = [schedule.time_of_level(level) for level in _flow_levels(schedule, steps, sigmas, mu)]
    elif sigmas is not None:
        times = [schedule.time_of_level(float(level)) for level in _without_end(sigmas)]
    else:
        times = _spaced_times(schedule, steps)  # type: ignore[arg-type]
    if not times or not times[0] >= 0.0 or any(b <= a for a, b in pairwise(times)):
        raise OptionError(f"the times rise from {times[:2]} …; expected noise levels that fall strictly, fewer steps")
    return [*times, 1.0]


def _without_end(sigmas: Sequence[float]) -> list[float]:
    levels = [float(level) for level in sigmas]
    levels = levels[:-1] if levels and levels[-1] == 0.0 else levels
    if not all(level > 0.0 for level in levels):
        raise OptionError("sigmas holds numbers that are not positive; expected falling noise levels, at most a last 0")
    return levels


def _count(values: Sequence[float]) -> int:
    return len(values) - (len(values) > 1 and float(values[-1]) == 0.0)


def _of_timesteps(schedule: Schedule, timesteps: Sequence[float]) -> list[float]:
    steps = torch.as_tensor([float(step) for step in timesteps], dtype=torch.float64)
    if schedule.clock and len(steps) and not 0.0 <= float(steps.min()) <= float(steps.max()) <= schedule.clock.offset:
        last = schedule.clock.offset
        raise OptionError(f"timesteps reach {steps.max():g}; expected the network's times, 0 to {last:g}")
    return schedule.time(steps).tolist()


def _flow_levels(
    schedule: Schedule, steps: int | None, sigmas: Sequence[float] | None, mu: float | None
) -> list[float]:
    """Noise shares, shifted once, then stretched or spaced anew as the configuration says."""
    settings = schedule.settings
    shift = shift_of(settings, mu)
    last = 1.0 / settings["num_train_timesteps"]
    plain = _without_end(sigmas) if sigmas is not None else _between("linear", 1.0, last, steps or 1)
    if not all(0.0 < level <= 1.0 for level in plain):
        raise OptionError(f"sigmas reach {max(plain):g}; expected shares of noise, above 0 and up to 1")
    levels = [shifted(level, shift) for level in plain]
    if terminal := settings.get("shift_terminal"):
        factor = (1.0 - terminal) / (1.0 - levels[-1])
        levels = [1.0 - (1.0 - level) * factor for level in levels]
    kind = spacing_kind(settings)
    return levels if kind is None else _between(kind, levels[0], levels[-1], len(levels))


def _spaced_times(schedule: Schedule, steps: int) -> list[float]:
    settings = schedule.settings
    if schedule.family != "table":
        kind = "karras" if settings.get("sigma_schedule", "karras") == "karras" else "exponential"
        ends = schedule.level(0.0), schedule.level(1.0)
        return [schedule.time_of_level(level) for level in _between(kind, *ends, steps, settings["rho"])]
    kind = spacing_kind(settings)
    if kind is None:
        return _of_timesteps(schedule, _integer_clock(settings, steps, len(schedule.path.alphas_cumprod)))  # type: ignore[attr-defined]
    high = settings.get("sigma_max") or schedule.level(0.0)
    low = settings.get("sigma_min") or schedule.level(1.0)
    if high == math.inf:
        raise OptionError(f"a {kind} grid has no highest level on a table that ends at SNR 0; expected sigma_max")
    return [schedule.time_of_level(level) for level in _between(kind, high, low, steps)]


def _integer_clock(settings: Mapping[str, Any], steps: int, n: int) -> list[float]:
    """The table's entries in this spacing, falling; Lin et al. (2024), table 2."""
    spacing = settings.get("timestep_spacing", "leading")
    if steps > n:
        raise OptionError(f"steps is {steps}; expected at most {n}, the length of the table")
    if spacing == "leading":
        offset = settings.get("steps_offset") or 0
        return [float(min(k * (n // steps) + offset, n - 1)) for k in reversed(range(steps))]
    if spacing == "trailing":
        return [n - k * n / steps - 1.0 for k in range(steps)]
    if spacing == "linspace":
        return [float(n - 1)] if steps == 1 else [(n - 1) * (1 - k / (steps - 1)) for k in range(steps)]
    raise one_of("timestep_spacing", spacing, ("leading", "trailing", "linspace"))


def spacing_kind(settings: Mapping[str, Any]) -> str | None:
    """The kind of spacing of noise levels that these settings ask for; None is the clock's own.

    Raises:
        OptionError: for one that is not known here, or two of them.
    """
    for name in _OTHERS:
        if settings.get(name):
            raise OptionError(f"the scheduler has {name}; expected a grid of Fluvial's own, such as 'log_snr'")
    kinds = [kind for name, kind in _SPACED.items() if settings.get(name)]
    if len(kinds) > 1:
        raise OptionError(f"the scheduler asks for {' and '.join(kinds)} spacing; expected one of them")
    return kinds[0] if kinds else None


def _between(kind: str, high: float, low: float, steps: int, rho: float = 7.0) -> list[float]:
    """N falling levels from high to low."""
    shares = [k / max(steps - 1, 1) for k in range(steps)]
    if kind == "karras":
        a, b = high ** (1 / rho), low ** (1 / rho)
        return [high if s == 0.0 else (a + s * (b - a)) ** rho for s in shares]
    if kind == "exponential":
        return [high * (low / high) ** s for s in shares]
    if kind == "beta":
        # Lee et al.: Beta sampling is all you need (2024), https://arxiv.org/abs/2407.12173
        return [low + (high - low) * (beta_quantile(1.0 - s, 0.6, 0.6) if s else 1.0) for s in shares]
    return [high + s * (low - high) for s in shares]
