"""Langevin dynamics: samples of a distribution whose score is known.

    dX = score(X) dt + √2 dW,        x ← x + step_size score(x) + √(2 step_size) xi

runs to the distribution from anywhere, if for long enough. The steps are not corrected by a Metropolis test: in a
direction where the distribution's variance is V, that of the samples is V/(1 - step_size/2V), so the steps must be
small against the smallest V.

Source: Roberts, Tweedie: Exponential convergence of Langevin distributions and their discrete approximations (1996),
https://doi.org/10.2307/3318418
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fluvial import inputs, random
from fluvial.errors import OptionError


def langevin(
    score: Callable[[Tensor], Tensor],
    x: Tensor,
    step_size: float,
    steps: int,
    seed: int | None = None,
    first: int = 0,
) -> Tensor:
    """The state (B, …) after `steps` Langevin steps from x, without gradients.

    Args:
        score: the gradient of the log density, (B, …) -> (B, …).
        x: (B, …) where to start.
        step_size: the time of one step, in units of the variance of x.
        steps: how many.
        seed: of the noise, which depends on (seed, sample, step) alone; None draws one from torch's generator.
        first: makes these the samples first, first + 1, … of the seed.

    Raises:
        OptionError: for a step_size or a number of steps that cannot be.
    """
    if not 0.0 < step_size < math.inf:
        raise OptionError(f"step_size is {step_size}; expected a finite number above 0")
    if not (isinstance(steps, int) and steps >= 0):
        raise OptionError(f"steps is {steps}; expected how many, a whole number")
    seed, first = inputs.checked_seed(seed), inputs.checked_first(first)
    samples = range(first, first + len(x))
    with torch.no_grad():
        for step in range(steps):
            noise = random.normal(samples, x.shape[1:], seed, step, random.STEP, x.dtype, x.device)
            x = (x + step_size * score(x)).add_(noise, alpha=math.sqrt(2.0 * step_size))
    return x
