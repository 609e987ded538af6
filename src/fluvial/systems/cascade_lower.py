"""What a cascade's stage hands to the one above: an image, or the state at which it was stopped early."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fluvial import sampling, solvers
from fluvial.errors import OptionError
from fluvial.model import Model
from fluvial.systems.upsampling import CLEAN, corrupt, enlarge, log_snr, noise_of
from fluvial.training.source import as_float


@dataclass(frozen=True)
class Image:
    """A finished image (B, C, h, w), in the data's own units: non-truncated conditioning re-noises it."""

    image: Tensor

    def conditions(self, upper: Model, level: float | None, seed: int, first: int) -> dict[str, Tensor]:
        """What the upper stage is told of it."""
        assert upper.shape is not None
        assert level is not None
        image = self.image if self.image.is_floating_point() else as_float(self.image)
        low = upper.normalisation.apply(image.to(upper.device))
        levels = torch.full((len(low),), level, dtype=torch.float64, device=low.device)
        if level < CLEAN:
            index = torch.arange(first, first + len(low), device=low.device)
            low = corrupt(low, levels, noise_of(index, low.shape[1:], seed, low))
        return {"low": enlarge(low, upper.shape[1:]), "level": levels.float()}


@dataclass(frozen=True)
class Stopped:
    """A state (B, C, h, w) of the lower stage at time t of its path, in path units: truncated conditioning."""

    x: Tensor
    t: float
    lower: Model

    def conditions(self, upper: Model, level: float | None, seed: int, first: int) -> dict[str, Tensor]:
        """What the upper stage is told of it: the state itself, rescaled to alpha² + sigma² = 1 in its own units."""
        assert upper.shape is not None
        c, ratio = self.lower.path(self.t), _ratio(self.lower, upper)
        # In the lower stage's units the upper one's data are ratio * data + offset.
        offset = self.lower.normalisation.apply(upper.normalisation.invert(torch.zeros_like(self.x[:1])))
        x = (self.x - c.alpha * offset) / math.hypot(ratio * c.alpha, c.sigma)
        levels = torch.full((len(x),), self.level_of(self.lower, upper, self.t), device=x.device)
        return {"low": enlarge(x, upper.shape[1:]), "level": levels}

    @staticmethod
    def level_of(lower: Model, upper: Model, t: float) -> float:
        """The log-SNR of the lower stage at time t, in the units of the upper one."""
        c = lower.path(t)
        return log_snr(_ratio(lower, upper) * c.alpha, c.sigma)


def _ratio(lower: Model, upper: Model) -> float:
    """The upper stage's unit, in units of the lower one."""
    (a, b) = (model.normalisation.scale for model in (upper, lower))
    ratios = {x / y for x, y in zip(a * (len(b) if len(a) == 1 else 1), b * (len(a) if len(b) == 1 else 1))}
    if max(ratios) > (1.0 + 1e-9) * min(ratios):
        raise OptionError(
            f"the stages have scales {b} and {a}, and noise of one would not be white in the other; expected the same "
            "units to stop the lower one early"
        )
    return max(ratios)


def stopped_early(model: Model, start: Any, own: dict[str, Any], stop: float) -> tuple[Any, Stopped]:
    """Samples a stage until `stop`: what it expects the data to be there (or its trajectory), and its state."""
    own, told, last = dict(own), own.get("callback"), []

    def keep(report: Any) -> None:
        last[:] = [report]
        if told is not None:
            told(report)

    solver, steps, times = own.get("solver"), own.pop("steps", None), own.pop("times", None)
    budget = own.pop("nfe", None)
    if budget is not None:
        if solver is not None or steps is not None:
            raise OptionError(f"nfe is {budget} together with solver or steps; expected the budget alone, or those")
        own["solver"], grid = solvers.recommended(budget)
        steps, times = budget, grid if times is None else times
    few = model.jumps or (solver is not None and isinstance(solvers.named(solver), solvers.Dopri5))
    nodes = model.times(times, steps, 1 if few else sampling.DEFAULT_STEPS)
    own |= {"times": [*(t for t in nodes if t < stop), stop], "callback": keep}
    made = sampling.sample(model, start, **own)
    if isinstance(made, sampling.Trajectory):
        return made, Stopped(made.x[-1], stop, model)
    return last[0].data, Stopped(made, stop, model)
