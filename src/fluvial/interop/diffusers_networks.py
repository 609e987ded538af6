"""diffusers' networks as Fluvial calls them: network(x, t, **cond) -> a tensor like x.

Conditions keep diffusers' own names, batch first, but for a class, which is `label` here:

| network                | conditions                                                                         |
|---|---|
| UNet2DModel            | label                                                                              |
| UNet2DConditionModel   | encoder_hidden_states; SDXL: text_embeds, time_ids; others as the network has them |
| DiTTransformer2DModel  | label                                                                              |
| SD3Transformer2DModel  | encoder_hidden_states, pooled_projections                                          |
| FluxTransformer2DModel | encoder_hidden_states, pooled_projections; guidance where it was distilled         |
| SanaTransformer2DModel | encoder_hidden_states, encoder_attention_mask; guidance where it was distilled     |

Of a network that also puts out a variance only the first half of the channels is kept.

Saved, a network is described by the name of its class, one of these, and by the configuration that diffusers builds it
from: `config` and `from_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fluvial.errors import OptionError, one_of


class DiffusersNetwork(nn.Module):
    """A diffusers network behind one call.

    Args:
        inner: the network.
        sign: what its output is multiplied with.
    """

    def __init__(self, inner: nn.Module, sign: float = 1.0) -> None:
        super().__init__()
        self.inner, self.sign = inner, sign

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        """x (B, …), t (B,) on the network's own clock, conditions as in the table -> a tensor like x."""
        out = self._call(x, t, cond)[:, : x.shape[1]]
        return out if self.sign == 1.0 else out * self.sign

    def _call(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError

    @property
    def conditions(self) -> tuple[str, ...]:
        """The names of the conditions that it was built for."""
        raise NotImplementedError

    def config(self) -> dict[str, Any] | None:
        """What `from_config` builds the same architecture from: JSON-able. None for one that was changed since."""
        kind, config = type(self.inner).__name__, self.inner.config
        description = {"kind": kind, "sign": self.sign, "config": _without_names(config)}  # type: ignore[arg-type]
        if type(self.inner) is not _library_class(kind):
            return None
        with torch.device("meta"):
            fresh = from_config(description).state_dict()
        shapes = [{name: value.shape for name, value in each.items()} for each in (fresh, self.state_dict())]
        return description if shapes[0] == shapes[1] else None

    def sample_shape(self) -> tuple[int, ...] | None:
        """One sample's shape, where the network's configuration says it."""
        config: Any = self.inner.config
        size = config.get("sample_size")
        if size is None:
            return None
        return (config["in_channels"], *((size, size) if isinstance(size, int) else tuple(size)))


# The names of these classes are in the files of those that were saved.


class UNet(DiffusersNetwork):
    @property
    def conditions(self) -> tuple[str, ...]:
        return _classes(self.inner)

    def _call(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        _only(cond, ("label",), self.inner)
        return self.inner(x, t, class_labels=cond.get("label"), return_dict=False)[0]


class TextUNet(DiffusersNetwork):
    # What the network reads from `added_cond_kwargs`; all else are arguments of its own.
    _ADDED = ("text_embeds", "time_ids", "image_embeds", "hint")
    _OWN = ("encoder_hidden_states", "encoder_attention_mask", "timestep_cond", "label")
    _BY_EMBEDDING = {
        "text_time": ("text_embeds", "time_ids"),
        "text_image": ("text_embeds", "image_embeds"),
        "image": ("image_embeds",),
        "image_hint": ("image_embeds", "hint"),
    }

    @property
    def conditions(self) -> tuple[str, ...]:
        config: Any = self.inner.config
        added = self._BY_EMBEDDING.get(config.get("addition_embed_type"), ())
        return ("encoder_hidden_states", *_classes(self.inner), *added)

    def _call(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        _only(cond, (*self._OWN, *self._ADDED), self.inner)
        _all(cond, ("encoder_hidden_states",), self.inner)
        added = {name: _as(cond[name], x) for name in self._ADDED if name in cond}
        given = {name: _as(cond[name], x) for name in self._OWN[:-1] if name in cond}
        return self.inner(
            x, t, class_labels=cond.get("label"), added_cond_kwargs=added or None, **given, return_dict=False
        )[0]


class DiT(DiffusersNetwork):
    conditions = ("label",)  # pyright: ignore[reportAssignmentType]

    def _call(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        _only(cond, self.conditions, self.inner)
        _all(cond, self.conditions, self.inner)
        return self.inner(x, timestep=t, class_labels=cond["label"], return_dict=False)[0]


class SD3(DiffusersNetwork):
    conditions = ("encoder_hidden_states", "pooled_projections")  # pyright: ignore[reportAssignmentType]

    def _call(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        _only(cond, self.conditions, self.inner)
        _all(cond, self.conditions, self.inner)
        given = {name: _as(cond[name], x) for name in self.conditions}
        return self.inner(hidden_states=x, timestep=t, **given, return_dict=False)[0]


class Flux(DiffusersNetwork):
    """Latents (B, C, H, W), even H and W, reach the network as tokens of 2x2 positions; its clock counts to 1."""

    @property
    def conditions(self) -> tuple[str, ...]:
        return ("encoder_hidden_states", "pooled_projections", *_guided(self.inner))

    def _call(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        _only(cond, self.conditions, self.inner)
        _all(cond, self.conditions, self.inner)
        batch, channels, height, width = x.shape
        if height % 2 or width % 2:
            raise OptionError(f"the latents are {height} x {width}; expected even sides, of 2x2 tokens")
        rows, columns = height // 2, width // 2
        tokens = x.reshape(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
        out = self.inner(
            hidden_states=tokens.reshape(batch, rows * columns, 4 * channels),
            timestep=t / 1000.0,
            **{name: _as(cond[name], x) for name in self.conditions},
            img_ids=_positions(rows, columns, x),
            txt_ids=torch.zeros(cond["encoder_hidden_states"].shape[1], 3, device=x.device, dtype=x.dtype),
            return_dict=False,
        )[0]
        grid = out.reshape(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return grid.reshape(batch, channels, height, width)

    def sample_shape(self) -> None:
        return None


class Sana(DiffusersNetwork):
    @property
    def conditions(self) -> tuple[str, ...]:
        return ("encoder_hidden_states", "encoder_attention_mask", *_guided(self.inner))

    def _call(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        config: Any = self.inner.config
        _only(cond, self.conditions, self.inner)
        _all(cond, ("encoder_hidden_states", *_guided(self.inner)), self.inner)
        given = {name: _as(value, x) for name, value in cond.items()}
        return self.inner(x, timestep=t * config["timestep_scale"], **given, return_dict=False)[0]


class BoundaryNetwork(nn.Module):
    """A consistency model's data estimate at path time t of `EDM(sigma_min, sigma_max, rho)`.

        c_skip x + c_out F(c_in x, 250 log sigma),   c_skip = sd² / ((sigma - sigma_min)² + sd²),
        c_out = (sigma - sigma_min) sd / √(sigma² + sd²),   c_in = 1/√(sigma² + sd²)

    so that at sigma_min it is x itself.

    Source: Song, Dhariwal, Chen, Sutskever: Consistency models (2023), https://arxiv.org/abs/2303.01469, appendix C

    Args:
        inner: the network F, of `adapted`.
        settings: the scheduler's: sigma_min, sigma_max, sigma_data and rho.
    """

    def __init__(self, inner: DiffusersNetwork, settings: dict[str, Any]) -> None:
        super().__init__()
        self.inner = inner
        self.sigma_min, self.sigma_max, self.sigma_data, self.rho = (
            float(settings[key]) for key in ("sigma_min", "sigma_max", "sigma_data", "rho")
        )

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        """x (B, …), t (B,) -> the data (B, …)."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        sigma = (low + (1.0 - t.double()) * (high - low)) ** self.rho
        above, norm = sigma - self.sigma_min, (sigma.square() + self.sigma_data**2).sqrt()
        skip = self.sigma_data**2 / (above.square() + self.sigma_data**2)
        column = (-1, *[1] * (x.ndim - 1))
        on_x, on_out, into = (c.to(x.dtype).reshape(column) for c in (skip, above * self.sigma_data / norm, 1.0 / norm))
        out = self.inner(into * x, (250.0 * sigma.log()).to(t.dtype), **cond)
        return on_x * x + on_out * out

    @property
    def settings(self) -> dict[str, float]:
        """Those of its scheduler."""
        return {name: getattr(self, name) for name in ("sigma_min", "sigma_max", "sigma_data", "rho")}

    @property
    def conditions(self) -> tuple[str, ...]:
        """The names of the conditions that it was built for."""
        return self.inner.conditions

    def config(self) -> dict[str, Any] | None:
        """What `from_config` builds the same architecture from; see `DiffusersNetwork`."""
        inner = self.inner.config()
        return None if inner is None else {"kind": _BOUNDARY, "network": inner, "settings": self.settings}

    def sample_shape(self) -> tuple[int, ...] | None:
        return self.inner.sample_shape()


_BOUNDARY = "consistency"
_ADAPTERS: dict[str, type[DiffusersNetwork]] = {
    "UNet2DModel": UNet,
    "UNet2DConditionModel": TextUNet,
    "DiTTransformer2DModel": DiT,
    "Transformer2DModel": DiT,
    "SD3Transformer2DModel": SD3,
    "FluxTransformer2DModel": Flux,
    "SanaTransformer2DModel": Sana,
}


def adapted(network: nn.Module, sign: float = 1.0) -> DiffusersNetwork:
    """The network behind Fluvial's call.

    Raises:
        OptionError: for a class that is not in the table.
    """
    return known_network(type(network).__name__)(network, sign)


def known_network(name: str) -> type[DiffusersNetwork]:
    """What adapts a diffusers class of this name.

    Raises:
        OptionError: for one that is not in the table.
    """
    if name not in _ADAPTERS:
        raise one_of("diffusers network", name, _ADAPTERS)
    return _ADAPTERS[name]


def from_config(config: Mapping[str, Any]) -> DiffusersNetwork | BoundaryNetwork:
    """The architecture that `config()` described, with fresh weights. Only the classes in the table are looked up.

    Raises:
        OptionError: for a class that is not in the table.
    """
    if config["kind"] == _BOUNDARY:
        return BoundaryNetwork(_described(config["network"]), config["settings"])
    return _described(config)


def _described(config: Mapping[str, Any]) -> DiffusersNetwork:
    adapter, sign = known_network(config["kind"]), float(config["sign"])
    return adapter(_library_class(config["kind"]).from_config(_without_names(config["config"])), sign)


def _library_class(name: str) -> Any:
    """The class of diffusers' of a name in the table."""
    import diffusers

    return getattr(diffusers, name)


def _without_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without what diffusers keeps beside the arguments: of which version, and from where, it was read."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _classes(network: nn.Module) -> tuple[str, ...]:
    """The condition of a network of classes."""
    config: Any = network.config
    return () if config.get("num_class_embeds") is None and config.get("class_embed_type") is None else ("label",)


def _guided(network: nn.Module) -> tuple[str, ...]:
    """The condition of a network that was distilled under guidance."""
    return ("guidance",) if network.config["guidance_embeds"] else ()  # type: ignore[index]


def _positions(rows: int, columns: int, like: Tensor) -> Tensor:
    """(rows * columns, 3): zero, row, column of each token."""
    place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).reshape(-1, 2)
    return torch.cat([torch.zeros(len(place), 1), place.float()], dim=1).to(like)


def _as(value: Tensor, x: Tensor) -> Tensor:
    """Numbers in the state's dtype; labels and masks as they are."""
    return value.to(x.dtype) if value.is_floating_point() else value


def _only(cond: dict[str, Tensor], known: tuple[str, ...], network: nn.Module) -> None:
    for name in cond:
        if name not in known:
            raise one_of(f"condition of a {type(network).__name__}", name, known)


def _all(cond: dict[str, Tensor], needed: tuple[str, ...], network: nn.Module) -> None:
    if missing := [name for name in needed if name not in cond]:
        kind = type(network).__name__
        raise OptionError(f"{', '.join(missing)} is missing; a {kind} expects cond={{{needed[0]!r}: …}}")
