"""What a run starts from: its state, conditions and seed, checked before the first network call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fluvial import random
from fluvial.errors import OptionError, ShapeError, one_of
from fluvial.model import Model

Start = int | Sequence[int] | Tensor | None


def noise_and_start(noise: str | Sequence[int] | Tensor | None, start: Start) -> tuple[Start, bool]:
    """What the run starts from, and whether its steps' noise is Brownian."""
    if noise is None or isinstance(noise, str):
        if noise not in (None, "independent", "brownian"):
            raise one_of("noise", noise, ("independent", "brownian"))
        return start, noise == "brownian"
    if start is not None:
        raise OptionError("the noise to start from was given twice; expected one tensor, shape or count")
    return noise, False


def start(
    model: Model,
    noise: Start,
    t: float,
    seed: int,
    first: int,
    init: Tensor | None,
    state: Tensor | None,
) -> Tensor:
    """The state the run starts from, in path units."""
    if state is not None:
        if noise is not None or init is not None:
            raise OptionError("state was given together with noise or init; expected state alone to resume from")
        return fitting(model, as_state(state), "state")
    if init is not None and noise is None:
        noise = tuple(init.shape)
    if isinstance(noise, bool) or noise is None:
        raise OptionError("noise is missing; expected a shape (B, …), a count, or a noise tensor")
    if isinstance(noise, int):
        if model.shape is None:
            raise OptionError(
                f"noise is the count {noise}, but the model does not know its shape; expected ({noise}, …)"
            )
        noise = (noise, *model.shape)
    if not isinstance(noise, Tensor):
        shape = tuple(noise)
        if not shape or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in shape):
            raise OptionError(f"noise is {noise!r}; expected a shape of whole numbers, 1 or more, or a noise tensor")
        samples = range(first, first + shape[0])
        dtype = torch.float64 if init is not None and init.dtype == torch.float64 else torch.float32
        noise = random.normal(samples, shape[1:], seed, stream=random.START, dtype=dtype, device=model.device)
    noise = fitting(model, as_state(noise), "noise")
    c = model.path(t)
    if init is None:
        return noise if c.sigma == 1.0 else noise * c.sigma
    if init.shape != noise.shape:
        raise ShapeError(f"init has shape {tuple(init.shape)} and noise {tuple(noise.shape)}; expected the same")
    data = model.normalisation.apply(as_state(init).to(noise))
    return torch.add(data * c.alpha, noise, alpha=c.sigma)


def checked_first(first: int) -> int:
    """The number of the first sample."""
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise OptionError(f"first is {first!r}; expected a whole number, 0 or more")
    return first


def checked_seed(seed: int | None) -> int:
    """The seed, drawn from torch's generator when there is none."""
    if seed is None:
        return random.fresh_seed()
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        raise OptionError(f"seed is {seed!r}; expected a whole number from 0 to 2**64 - 1")
    return seed


def guided(model: Model, guidance: Callable[[Model], Model] | None) -> Model:
    """The model under this guidance."""
    if guidance is None:
        return model
    if not callable(guidance):
        raise OptionError(f"guidance is {guidance!r}; expected an object such as fl.guidance.CFG(scale=3.0)")
    return guidance(model)


def as_state(x: Tensor) -> Tensor:
    """Solver states are float32, or float64 where the user's tensor is."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def fitting(model: Model, x: Tensor, what: str) -> Tensor:
    """x, after checking its channels against what the model was trained on."""
    shape = model.shape
    if shape is not None and (x.ndim != len(shape) + 1 or x.shape[1] != shape[0]):
        raise ShapeError(f"{what} has shape {tuple(x.shape)}; expected (B, {', '.join(map(str, shape))})")
    return x


def conditions(model: Model, cond: Mapping[str, Tensor] | None, x: Tensor) -> dict[str, Tensor]:
    """The conditions on x's device, checked: batch first, labels within the model's classes."""
    checked: dict[str, Tensor] = {}
    for name, value in (cond or {}).items():
        if not isinstance(value, Tensor) or value.ndim < 1 or len(value) != len(x):
            given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(f"condition {name!r} has {given}; expected a tensor with {len(x)} entries, batch first")
        null = (model.null or {}).get(name)
        if isinstance(null, int) and not value.is_floating_point():
            low, high = int(value.min()), int(value.max())
            if low < 0 or high > null:
                raise OptionError(
                    f"condition {name!r} has values from {low} to {high}; expected 0 to {null - 1}, or {null} for none"
                )
        checked[name] = value.to(x.device)
    return checked
