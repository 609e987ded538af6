"""Plain functions in and out: a network of any convention becomes a model, and a model a function of any convention.

In: `from_callable(net, "ddpm")`. Out: `as_denoiser(model)`, D(x, sigma) of EDM and k-diffusion, and
`as_velocity(model)`, v(x, t) or v(t, x) of flow matching. With alpha = 1 the state of a denoiser is the rectified one
divided by its alpha, so that with t = 1/(1 + sigma)

    data + sigma noise = (t data + (1 - t) noise) / t,

and both are the model seen on the rectified path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fluvial.convention import Convention, Normalisation
from fluvial.errors import OptionError, PathTimeError, ShapeError, one_of
from fluvial.inputs import as_state
from fluvial.interop.conventions import Foreign, foreign
from fluvial.model import Converted, Model, convert
from fluvial.paths import Path
from fluvial.predictions import Velocity, solve, spread


class Called(nn.Module):
    """A foreign network behind the call that a model makes, net(x, t, **cond): order, whole steps, extra channels."""

    def __init__(
        self, net: Callable[..., Any], time_first: bool = False, whole: bool = False, learned_variance: bool = False
    ) -> None:
        super().__init__()
        self.net, self.time_first, self.whole, self.learned_variance = net, time_first, whole, learned_variance

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Any:
        time = t.round().long() if self.whole else t
        out = self.net(time, x, **cond) if self.time_first else self.net(x, time, **cond)
        return out.chunk(2, dim=1)[0] if self.learned_variance and isinstance(out, Tensor) else out


def from_callable(
    net: Callable[..., Tensor],
    convention: str | Foreign | Convention,
    *,
    null: Mapping[str, Any] | None = None,
    shape: tuple[int, ...] | None = None,
    normalisation: Normalisation | None = None,
    **options: Any,
) -> Model:
    """The model of a network that was trained elsewhere, under a convention of the field. Nothing is copied.

    Args:
        net: net(x, t, **cond) -> tensor like x, t being (B,) on the network's own clock. Conditions are passed on by
            name. It is called as net(t, x, **cond) where the convention has it so ("torchcfm").
        convention: a name (`fluvial.interop.NAMES`), or a `fl.model.Convention` of your own.
        null: the condition that stands for none, by name: {"label": 10}.
        shape: one sample's shape, so that `fl.sample(model, 64)` knows it.
        normalisation: how your data become the network's: Normalisation(shift=(0.5,), scale=(0.5,)) for data in [0, 1]
            and a network on [-1, 1].
        options: what varies within the name, such as steps=400 or prediction="v": see `fluvial.interop.foreign`.

    Returns:
        a `fl.Model`. With whole=True (a network with a table of embeddings, "ddpm" only) times between two steps are
        rounded, so sample at the steps themselves.

    Raises:
        OptionError: for an unknown name or option, which lists the known ones; for a net that is no function.
    """
    if not callable(net):
        raise OptionError(f"net is {type(net).__name__}; expected a callable net(x, t, **cond)")
    found = foreign(convention, **options)
    if found.time_first or found.whole or found.learned_variance:
        network: Callable[..., Tensor] = Called(net, found.time_first, found.whole, found.learned_variance)
        if isinstance(net, nn.Module):
            network.train(net.training)
    else:
        network = net
    given: dict[str, Any] = {"null": null, "shape": shape, "normalisation": normalisation}
    model = Model(network, found.convention.path)
    model.convention = found.convention
    return model.under(**{name: value for name, value in given.items() if value is not None})


class Denoiser:
    """denoiser(x, sigma, **cond) -> E[data | x] for x = data + sigma noise; made by `as_denoiser`."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._seen = convert(model, "rectified", "data")

    def __call__(self, x: Tensor, sigma: float | Tensor, **cond: Any) -> Tensor:
        """The denoised (B, …), in x's dtype, from x (B, …) and sigma: a float, or a tensor () or (B,), 0 or more."""
        state = as_state(x)
        if isinstance(sigma, Tensor):
            if sigma.numel() not in (1, len(x)):
                raise ShapeError(
                    f"sigma has shape {tuple(sigma.shape)} for a batch of {len(x)}; expected a float or ({len(x)},)"
                )
            exact = torch.float32 if sigma.device.type == "mps" else torch.float64
            t: float | Tensor = 1.0 / (1.0 + sigma.to(x.device, exact).reshape(-1))
        elif sigma >= 0 and math.isfinite(sigma):
            t = 1.0 / (1.0 + sigma)
        else:
            raise PathTimeError(f"sigma is {sigma}; expected a finite noise level, 0 or more")
        out = self._seen(spread(t, state) * state, t, **cond).data
        return out if out.dtype == x.dtype else out.to(x.dtype)


def as_denoiser(model: Model) -> Denoiser:
    """The model as EDM's and k-diffusion's denoiser: f(x, sigma, **cond) -> denoised, x = data + sigma noise.

    Exact for a model on any path, and differentiable; in path units. At a noise level outside the model's own range its
    data estimate at the nearer end is given.

    >>> k_diffusion.sampling.sample_euler(as_denoiser(model), sigma_max * noise, sigmas)

    Source: Karras, Aittala, Aila, Laine: Elucidating the design space (2022), https://arxiv.org/abs/2206.00364
    """
    return Denoiser(model)


def own_path(model: Model) -> Path:
    """The path that the network was trained on, whichever it is seen on."""
    return model.source.path if isinstance(model, Converted) else model.path


# Where the velocity does not exist at an end of time itself, it is asked for this far inside.
_INSIDE = 1e-3


class VelocityField:
    """field(t, x, **cond) or field(x, t, **cond) -> velocity on the rectified path; made by `as_velocity`."""

    def __init__(self, model: Model, order: str | None = None) -> None:
        if order not in (None, "t, x", "x, t"):
            raise one_of("order", order, ("t, x", "x, t"))
        self.model, self.order = model, order
        self._seen = convert(model, "rectified", "velocity")
        self.low = 0.0 if self._exists(0.0) else _INSIDE
        cleanest = self._seen.path.time(own_path(model).log_snr(1.0))
        self.high = min(cleanest, 1.0 if self._exists(1.0) else 1.0 - _INSIDE)

    def __call__(self, *args: Any, **cond: Any) -> Tensor:
        """dx/dt (B, …) at the state x (B, …) and the time t: a float, or a tensor () or (B,). Both also by name."""
        given = dict(zip(("x", "t"), self._ordered(args))) if args else {}
        for name in ("x", "t"):
            if name in cond and name not in given:
                given[name] = cond.pop(name)
        if len(given) != 2:
            raise OptionError("the velocity field was given no state or no time; expected field(t, x) or field(x, t)")
        x, t = given["x"], given["t"]
        state = as_state(x)
        # An adaptive solver may look beyond the end, and interpolates back.
        inside = t.clamp(self.low, self.high) if isinstance(t, Tensor) else min(max(float(t), self.low), self.high)
        out = self._seen(state, inside.to(x.device) if isinstance(inside, Tensor) else inside, **cond).velocity
        return out if out.dtype == x.dtype else out.to(x.dtype)

    def _ordered(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """(x, t) of what was given in either order: the time is the one with no dimension but the batch."""
        if len(args) != 2 or self.order == "x, t":
            return args
        if self.order == "t, x":
            return args[::-1]
        times = [not isinstance(a, Tensor) or a.ndim < 2 for a in args]
        if times[0] == times[1]:
            shapes = " and ".join(str(tuple(a.shape)) if isinstance(a, Tensor) else type(a).__name__ for a in args)
            raise ShapeError(
                f"the velocity field was given {shapes}; expected a state (B, …) of 2 dimensions or more, and a time"
            )
        return args[::-1] if times[0] else args

    def _exists(self, t: float) -> bool:
        query = self._seen.query(t)
        try:
            solve(query.state, query.weights, Velocity().weights(query.c), "velocity")
        except PathTimeError:
            return False
        return True


def as_velocity(model: Model, order: str | None = None) -> VelocityField:
    """The model as a velocity field on the rectified path, t from noise 0 to data 1, for the ODE solvers of others.

    Args:
        model: any model, on any path; x is in path units.
        order: "t, x" (torchdiffeq, torchcfm) or "x, t" (flow_matching). None takes either: a state has two dimensions
            or more, a time has none or the batch's. By name, x=…, t=…, both are always right.

    Times beyond the ends are taken at the ends. Where the velocity does not exist at an end (for a network that
    predicts the noise on a path that has no data there, say), it is that of 1e-3 inside; and past the cleanest state
    that the network knows (of a table of steps, which stops short of the data) it is that of this state.

    >>> torchdiffeq.odeint(as_velocity(model), noise, torch.tensor([0.0, 1.0]))

    Source: Lipman, Chen, Ben-Hamu, Nickel, Le: Flow matching (2022), https://arxiv.org/abs/2210.02747
    """
    return VelocityField(model, order)
