"""Objectives: what training minimises, as orthogonal choices.

    E w(t) distance(out, p data + q noise),    t ~ times,  (noise, data) ~ coupling,  x = alpha data + sigma noise

All targets have the same minimiser; they differ by a weight. An error in the data estimate is an error -alpha/sigma
times as large in the noise, and in any target with D = alpha q - sigma p

    |noise error|² = (alpha / D)² |target error|²,

so a weighting is stated once, as a function of log_snr on the squared noise error, and derived for every target.
"uniform" is the exception: 1 on the target's own squared error.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from fluvial import couplings, grids, predictions, random
from fluvial.couplings import Pairs
from fluvial.errors import OptionError, ShapeError, one_of
from fluvial.model import Model
from fluvial.predictions import Prediction, spread

# On the squared noise error, as functions of log_snr.
_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    # Ho et al. 2020, "simple": 1.
    "noise": torch.ones_like,
    # Salimans, Ho 2022: 1 on the data error, at least 1 on the noise error.
    "truncated_snr": lambda l: (-l).exp().clamp(min=1.0),
    # Hang et al. 2023, https://arxiv.org/abs/2303.09556: min(snr, 5) on the data error.
    "min_snr": lambda l: (math.log(5.0) - l).exp().clamp(max=1.0),
    # Karras et al. 2022, sigma_data = 1/2: 1 on the preconditioned network's own error.
    "edm": lambda l: 1.0 + 4.0 * (-l).exp(),
    # Kingma, Gao 2023, https://arxiv.org/abs/2303.00848: sigmoid(2 - log_snr).
    "sigmoid": lambda l: torch.sigmoid(2.0 - l),
}


@dataclass(frozen=True)
class PseudoHuber:
    """√(mean squared error + c²) - c: quadratic for small errors, linear for large ones.

    Source: Song, Dhariwal: Improved techniques for training consistency models (2023), https://arxiv.org/abs/2310.14189
    """

    c: float = 0.03

    def __post_init__(self) -> None:
        if not self.c > 0:
            raise OptionError(f"c is {self.c}; expected a positive number")

    def __call__(self, error: Tensor) -> Tensor:
        return (mean_square(error) + self.c**2).sqrt() - self.c


def mean_square(error: Tensor) -> Tensor:
    """The mean squared error (B,) over the dimensions of a sample."""
    return error.square().flatten(1).mean(1)


@dataclass(frozen=True)
class LPIPS:
    """Mean squared error + weight x LPIPS between the data estimate and the data: a distance for images in [-1, 1].

    Needs the package `lpips`. Images smaller than `size` are enlarged to it, as its networks shrink what they see.

    Source: Zhang, Isola, Efros, Shechtman, Wang: The unreasonable effectiveness of deep features (2018),
    https://arxiv.org/abs/1801.03924; for reflow, Lee, Lin, Fanti (2024), https://arxiv.org/abs/2405.20320
    """

    weight: float = 1.0
    net: str = "vgg"
    size: int = 64

    def __call__(self, error: Tensor) -> Tensor:
        return mean_square(error)

    def between(self, error: Tensor, estimate: Tensor, data: Tensor) -> Tensor:
        """The distance (B,), given the target's error and what the estimate and the data (B, C, H, W) are."""
        if data.ndim != 4:
            raise ShapeError(f"LPIPS compares images, and the data are {tuple(data.shape)}; expected (B, C, H, W)")
        scale = max(1.0, self.size / min(data.shape[-2:]))
        pair = []
        for x in (estimate, data):
            x = x.float().expand(-1, 3, -1, -1) if x.shape[1] == 1 else x.float()
            pair.append(torch.nn.functional.interpolate(x, scale_factor=scale, mode="bilinear") if scale > 1.0 else x)
        return mean_square(error) + self.weight * _lpips(self.net, data.device)(*pair).flatten()


@functools.cache
def _lpips(net: str, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    try:
        import lpips  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise OptionError(
            'distance LPIPS needs the package "lpips"; expected it installed: pip install lpips'
        ) from error
    return lpips.LPIPS(net=net, verbose=False).to(device).eval().requires_grad_(False)


_DISTANCES: dict[str, Callable[[Tensor], Tensor]] = {
    "mse": mean_square,
    "pseudo_huber": PseudoHuber(),
    "lpips": LPIPS(),
}


class Given(NamedTuple):
    """What a loss is a function of, coupled and checked: data, noise (B, …), t (B,), conditions, seed, numbers (B,).

    `states` (B, J, …) are those on the way of pairs, where they have some.
    """

    data: Tensor
    noise: Tensor
    t: Tensor
    cond: dict[str, Tensor]
    seed: int
    index: Tensor
    states: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """A training loss: target x coupling x times x weight x distance.

    Args:
        target: the prediction whose error is measured; the network's own prediction need not be the same.
        times: the density of training times: an object from `fl.grids`, or "uniform", "logit_normal", "u_shaped".
        weight: "uniform", or on the noise error "noise", "min_snr", "truncated_snr", "edm", "sigmoid", or a function
            of log_snr (B,) -> (B,).
        coupling: "independent", "ot", "pairs", or an object from `fl.couplings`.
        distance: "mse", "pseudo_huber", "lpips", or a function of the error (B, …) -> (B,).
    """

    target: str | Prediction = "velocity"
    times: Any = "uniform"
    weight: str | Callable[[Tensor], Tensor] = "uniform"
    coupling: Any = "independent"
    distance: str | Callable[[Tensor], Tensor] = "mse"

    def __post_init__(self) -> None:
        # Every name is looked up now, so that a wrong one is known before any work is done.
        predictions.named(self.target)
        grids.density(self.times)
        couplings.named(self.coupling)
        if not callable(self.weight) and self.weight != "uniform" and self.weight not in _WEIGHTS:
            raise one_of("weight", self.weight, ["uniform", *_WEIGHTS])
        if not callable(self.distance) and self.distance not in _DISTANCES:
            raise one_of("distance", self.distance, _DISTANCES)

    @property
    def independent(self) -> bool:
        """Whether a model trained so has a score."""
        return couplings.named(self.coupling).independent

    def at(self, step: int, own: Model, average: Model) -> Self:
        """The objective of a training step, from 0, for those that change or look at what is trained.

        Args:
            step: of the run.
            own, average: the model that learns, and the same with averaged weights, both as they are at that step.
        """
        return self

    def watched(self, model: Model, data: Tensor, *batch: Any) -> dict[str, float]:
        """What else to record of the model when a line of metrics is due; arguments as for the loss."""
        return {}

    def draw_times(self, model: Model, index: Tensor, seed: int) -> Tensor:
        """The training times (B,), float64, of the samples numbered `index`."""
        u = random.uniform(index, (1,), seed, stream=random.TIME, dtype=torch.float64, device=index.device)
        return grids.density(self.times).quantile(u[:, 0], model.path)

    def __call__(
        self,
        model: Model,
        data: Tensor,
        cond: Mapping[str, Tensor] | None = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        seed: int | None = None,
        index: Tensor | None = None,
        states: Tensor | None = None,
    ) -> Tensor:
        """The loss of each sample (B,), a mean over its dimensions.

        Args:
            model: the model that learns; its network is called once.
            data: (B, …) in path units.
            cond: conditions by name, batch first; they follow the data through the coupling.
            t: (B,) times; drawn from `times` when not given.
            noise: (B, …); drawn when not given. Stored pairs must give it.
            seed: of what is drawn; None takes one from torch's generator.
            index: (B,) int64, the samples' numbers, of which times and noise are functions; default 0 … B-1.
            states: (B, J, …) states on the way of stored pairs, for objectives that look at them.
        """
        coupling = couplings.named(self.coupling)
        if isinstance(coupling, Pairs) and noise is None:
            raise OptionError('coupling "pairs" needs the noise stored with the data; expected noise=')
        if noise is not None and noise.shape != data.shape:
            raise ShapeError(f"noise has shape {tuple(noise.shape)} and data {tuple(data.shape)}; expected the same")
        seed = random.fresh_seed() if seed is None else seed
        index = torch.arange(len(data), device=data.device) if index is None else index
        if t is None:
            t = self.draw_times(model, index, seed)
        if noise is None:
            noise = random.normal(index, data.shape[1:], seed, 0, random.TRAIN, data.dtype, data.device)
        if t.shape != data.shape[:1]:
            raise ShapeError(f"t has shape {tuple(t.shape)} for a batch of {len(data)}; expected ({len(data)},)")
        noise_index, data_index = coupling(noise, data)
        cond = {name: value[data_index] for name, value in (cond or {}).items()}
        t = t.to(data.device, torch.float64 if data.device.type != "mps" else torch.float32)
        return self._loss(model, Given(data[data_index], noise[noise_index], t, cond, seed, index, states))

    def _loss(self, model: Model, given: Given) -> Tensor:
        data, noise, t, cond = given[:4]
        target = predictions.named(self.target)
        c = model.path(t)
        x = spread(c.alpha, data) * data + spread(c.sigma, data) * noise
        p, q = target.weights(c)
        estimate = model(x, t, **cond)
        error = estimate.predict(target) - (spread(p, data) * data + spread(q, data) * noise)
        loss = self.measured(error, lambda: estimate.data, data)
        if self.weight == "uniform":
            return loss
        weight = self.weight if callable(self.weight) else _WEIGHTS[self.weight]
        on_target = weight(model.path.log_snr(t)) * (c.alpha / (c.alpha * q - c.sigma * p)).square()
        return on_target.to(error.dtype) * loss

    def measured(self, error: Tensor, estimate: Callable[[], Tensor], data: Tensor) -> Tensor:
        """The distance (B,) of an error; those that look at samples are given the estimate and the data too."""
        distance: Any = self.distance if callable(self.distance) else _DISTANCES[self.distance]
        return distance.between(error, estimate(), data) if hasattr(distance, "between") else distance(error)

    def described(self) -> dict[str, Any]:
        """What makes the objective, each choice as its object: by name or as an object is the same."""
        return {
            "target": predictions.named(self.target),
            "times": grids.density(self.times),
            "weight": self.weight,
            "coupling": couplings.named(self.coupling),
            "distance": self.distance,
        }
