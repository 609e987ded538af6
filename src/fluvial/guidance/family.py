"""The guidances: each says what it does with the outputs without and with the condition, or of two networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fluvial.errors import OptionError
from fluvial.guidance.guided import (
    Reading,
    along,
    around,
    check,
    check_null,
    check_scale,
    choose,
    contrast,
    is_interval,
    is_number,
    noise_to_data,
    norm,
    reading,
    rescaled,
    times,
)
from fluvial.model import Model, convert
from fluvial.predictions import Query, spread


@dataclass(frozen=True)
class CFG:
    """Classifier-free guidance: CFG(3.0)(model) is the guided model.

        out = null + scale * (cond - null)

    Args:
        scale: 0 null, 1 conditional, above 1 guided.
        batched: one network call on a doubled batch; False makes two calls and needs half the memory.
        interval: (low, high): guide only where low < sigma/alpha <= high, elsewhere the model is the plain conditional
            one, at the cost of one call. The noise-to-data ratio sigma/alpha means the same on every path; it is what
            EDM and the source call sigma. Published values go with data of standard deviation 0.5; for other data
            they scale with theirs.
        rescale: from 0 to 1, how much of the contrast that guidance adds is taken back: the guided data estimate is
            multiplied by 1 + rescale * (std(cond) / std(out) - 1), with the standard deviation of each sample's data
            estimate over all its dimensions. The source rescales whatever its network outputs; the data estimate is
            what all notations share, and its contrast is what is over-exposed.

    Each estimate counts as one evaluation (NFE) of twice the cost. With a time for each sample, two calls are made.

    Raises:
        OptionError: options out of range; a model without a null condition; a call without a condition.

    Sources: Ho, Salimans: Classifier-free diffusion guidance (2022), https://arxiv.org/abs/2207.12598 (their w is
        scale - 1); Kynkäänniemi et al.: Applying guidance in a limited interval improves sample and distribution
        quality in diffusion models (2024), https://arxiv.org/abs/2404.07724; Lin, Liu, Li, Yang: Common diffusion
        noise schedules and sample steps are flawed (2023), https://arxiv.org/abs/2305.08891, section 3.4
    """

    scale: float
    batched: bool = True
    interval: tuple[float, float] | None = None
    rescale: float = 0.0

    def __post_init__(self) -> None:
        check_scale(self.scale, self.batched)
        if self.interval is not None:
            check("interval", self.interval, is_interval(self.interval), "(low, high), 0 <= low < high, in sigma/alpha")
        check("rescale", self.rescale, is_number(self.rescale) and 0 <= self.rescale <= 1, "a number from 0 to 1")

    def __call__(self, model: Model) -> Model:
        check_null(model)
        return model if self.scale == 1.0 else around(model, self)

    def guide(self, query: Query, t: float | Tensor, null: Mapping[str, Any] | None) -> Query:
        acts: bool | Tensor = True
        if self.interval is not None:
            low, high = self.interval
            level = noise_to_data(query)
            acts = (low < level) & (level <= high)
        data = reading(query, (1.0, 0.0)) if self.rescale else None
        return contrast(query, null, self.batched, None if acts is False else partial(self._mix, acts, data))

    def _mix(self, acts: bool | Tensor, data: Reading | None, x: Tensor, null: Tensor, cond: Tensor) -> Tensor:
        out = torch.lerp(null, cond, self.scale)
        if data is not None:
            out = rescaled(out, cond, data(x, out), data(x, cond), self.rescale)
        return choose(acts, out, cond)


@dataclass(frozen=True)
class APG:
    """Adaptive projected guidance: the part of the difference along the data estimate, which only saturates, goes.

        d = data_cond - data_null,    d <- d * min(1, norm_threshold / |d|),
        data = data_cond + (scale - 1) * (d_orthogonal + eta * d_parallel),    parallel and orthogonal to data_cond.

    Args:
        scale: 1 conditional, above 1 guided; 0 is the null model only for eta = 1.
        eta: how much of the parallel part stays: 0 none, 1 all of it (then it is CFG).
        norm_threshold: the largest |d|, a Euclidean norm over a sample's dimensions in path units: it grows with the
            square root of their number, so there is no value for all. None: no limit.
        batched: one network call on a doubled batch; False makes two calls.

    The source also carries the differences of earlier steps along (momentum). A model is a function of state and time
    and has no earlier steps: this is the variant without.

    Raises:
        OptionError: options out of range; a model without a null condition; a call without a condition.

    Source: Sadat, Hilliges, Weber: Eliminating oversaturation and artifacts of high guidance scales in diffusion
        models (2024), https://arxiv.org/abs/2410.02416
    """

    scale: float
    eta: float = 0.0
    norm_threshold: float | None = None
    batched: bool = True

    def __post_init__(self) -> None:
        check_scale(self.scale, self.batched)
        check("eta", self.eta, is_number(self.eta), "a number, 0 for none of the parallel part, 1 for all of it")
        if self.norm_threshold is not None:
            positive = is_number(self.norm_threshold) and self.norm_threshold > 0
            check("norm_threshold", self.norm_threshold, positive, "a number above 0, or None for no limit")

    def __call__(self, model: Model) -> Model:
        check_null(model)
        return model if self.scale == 1.0 else around(model, self)

    def guide(self, query: Query, t: float | Tensor, null: Mapping[str, Any] | None) -> Query:
        return contrast(query, null, self.batched, partial(self._mix, reading(query, (1.0, 0.0))))

    def _mix(self, data: Reading, x: Tensor, null: Tensor, cond: Tensor) -> Tensor:
        difference = cond - null
        update = difference - (1.0 - self.eta) * along(difference, data(x, cond))
        if self.norm_threshold is not None:
            size = norm(difference) * abs(data.on_out)
            update = update * spread(self.norm_threshold / size.clamp(min=self.norm_threshold), x)
        return cond + (self.scale - 1.0) * update


@dataclass(frozen=True)
class CFGZero:
    """CFG-Zero*: the null velocity is first scaled to fit the conditional one, and the first stretch stands still.

        s = <v_cond, v_null> / |v_null|²,    v = s v_null + scale * (v_cond - s v_null),
        v = 0    where    alpha / (alpha + sigma) < zero_until,

    per sample, v being the rectified velocity, data - noise, so that it means the same in every notation.

    Args:
        scale: 1 conditional, above 1 guided; 0 is the null model's velocity times s.
        zero_until: where to start moving, as the rectified path's time alpha / (alpha + sigma): the share of the way
            from noise to data. The source's first 4% of the steps, on a uniform grid, are 0.04; 0 never stands still.
        batched: one network call on a doubled batch; False makes two calls.

    Zero velocity says that data = noise = x / (alpha + sigma): the state of a rectified flow stays as it is, that of
    another path stays what it is when converted to one. No network call is made there (though it counts as one): a
    sampler whose only step starts there returns its noise.

    Raises:
        OptionError: options out of range; a model without a null condition; a call without a condition.

    Source: Fan, Zheng, Yeh, Liu: CFG-Zero*: Improved classifier-free guidance for flow matching models (2025),
        https://arxiv.org/abs/2503.18886
    """

    scale: float
    zero_until: float = 0.04
    batched: bool = True

    def __post_init__(self) -> None:
        check_scale(self.scale, self.batched)
        share = is_number(self.zero_until) and 0 <= self.zero_until < 1
        check("zero_until", self.zero_until, share, "a share of the way, 0 or more and below 1")

    def __call__(self, model: Model) -> Model:
        check_null(model)
        return model if self.scale == 1.0 and self.zero_until == 0.0 else around(model, self)

    def guide(self, query: Query, t: float | Tensor, null: Mapping[str, Any] | None) -> Query:
        state, (p, q) = query.state, query.weights
        still = state.alpha / (state.alpha + state.sigma) < self.zero_until
        # The output for data = noise = x / (alpha + sigma).
        resting = partial(times, (p + q) / (state.alpha + state.sigma)) if still is not False else None
        if still is True:
            return contrast(query._replace(call=resting), null, self.batched, None)
        return contrast(query, null, self.batched, partial(self._mix, still, resting, reading(query, (1.0, -1.0))))

    def _mix(self, still: Any, resting: Any, velocity: Reading, x: Tensor, null: Tensor, cond: Tensor) -> Tensor:
        # v_cond - s v_null is v_cond - v_null without its part along v_null.
        difference = cond - null
        out = cond + (self.scale - 1.0) * (difference - along(difference, velocity(x, null)))
        return out if still is False else choose(still, resting(x, {}), out)


@dataclass(frozen=True)
class Autoguidance:
    """Autoguidance: away from a weaker network. Needs no null condition, and no condition at all.

        out = weak + scale * (strong - weak)

    Args:
        scale: 0 weak, 1 strong, above 1 guided.
        weak: a worse version of the model (smaller, less trained), in any notation: it is seen on the model's path.
            It gets the same conditions; its data must be normalised in the same way. It stays its owner's: `to`,
            `parameters` and `with_network` of the guided model reach the strong network only.

    Where an end of its own path leaves the weak estimate undetermined, the strong one stands alone.

    Raises:
        OptionError: a scale that is no number, a weak that is no model, or one of other samples than the strong one's.

    Source: Karras et al.: Guiding a diffusion model with a bad version of itself (2024),
        https://arxiv.org/abs/2406.02507
    """

    scale: float
    weak: Model

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check("weak", self.weak, isinstance(self.weak, Model), "a fl.Model, such as an earlier save of the same run")

    def __call__(self, model: Model) -> Model:
        ours, theirs = (m.normalisation for m in (model, self.weak))
        if (ours.shift, ours.scale) != (theirs.shift, theirs.scale):
            raise OptionError(
                f"the weak model's data were normalised by shift {theirs.shift}, scale {theirs.scale}, the strong "
                f"one's by shift {ours.shift}, scale {ours.scale}; expected two models of the same units"
            )
        if model.shape and self.weak.shape and model.shape != self.weak.shape:
            raise OptionError(
                f"the weak model's samples are {self.weak.shape}; expected the strong one's {model.shape}"
            )
        if self.scale == 1.0:
            return model
        # The guided score needs both.
        return around(model if self.weak.independent else model.under(independent=False), self)

    def guide(self, query: Query, t: float | Tensor, null: Mapping[str, Any] | None) -> Query:
        weak = convert(self.weak, query.path).query(t)
        same = weak.prediction is not None and weak.prediction == query.prediction
        output = Reading(0.0, 1.0, True) if same else reading(weak, query.weights)
        return query._replace(call=partial(self._call, query.call, weak.call, output))

    def _call(self, strong: Any, weak: Any, output: Reading, x: Tensor, cond: Mapping[str, Any]) -> Tensor:
        out = strong(x, cond)
        return choose(output.known, torch.lerp(output(x, weak(x, cond)), out, self.scale), out)
