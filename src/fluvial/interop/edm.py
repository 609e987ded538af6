"""The network pickles of NVlabs' EDM and EDM2 as models; nothing in the file is run (see `edm_pickle`).

Their networks are wrapped: D(x, sigma) = c_skip x + c_out F(c_in x, c_noise) for x = data + sigma noise. The model
calls what is inside, F, under the convention that the wrapping amounts to, sd being the data's standard deviation:

| wrapping     | c_skip, c_out                                | path                    | F is        | clock        |
|---|---|---|---|---|
| EDMPrecond   | sd²/(sigma² + sd²), sigma sd/√(sigma² + sd²) | EDM                     | EDM's F     | log(sigma)/4 |
| Precond      | the same (EDM2)                              | EDM                     | EDM's F     | log(sigma)/4 |
| VPPrecond    | 1, -sigma                                    | VP, to beta_min + beta_d | the noise   | (M - 1) u    |
| VEPrecond    | 1, sigma                                     | VE                      | minus noise | log(sigma/2) |
| iDDPMPrecond | 1, -sigma                                    | a table, sigma = u_j    | the noise   | M - 1 - j    |

c_in is 1/√(sigma² + sd²) in the first two, which that prediction carries with it, and 1/√(sigma² + 1) for VP and the
table, on whose paths the state already is that much smaller.

Source: Karras, Aittala, Aila, Laine: Elucidating the design space (2022), https://arxiv.org/abs/2206.00364, table 1
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fluvial import paths, predictions
from fluvial.convention import Clock, Convention, Normalisation, SigmaClock
from fluvial.errors import OptionError, RunError, one_of
from fluvial.interop.edm2_network import EDM2UNet
from fluvial.interop.edm_adm import DhariwalUNet
from fluvial.interop.edm_networks import SongUNet
from fluvial.interop.edm_pickle import Record, read
from fluvial.model import Model
from fluvial.training.checkpoints import fill, weights_of

_KINDS: dict[str, type[nn.Module]] = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet, "EDM2UNet": EDM2UNet}
_SIZES = {
    "img_resolution", "img_channels", "in_channels", "out_channels", "model_channels", "channel_mult_emb",
    "channel_mult_noise", "num_blocks", "channels_per_head",
}  # fmt: skip
_COUNTS = {"label_dim", "augment_dim"}
_NUMBERS = {"dropout", "label_balance", "concat_balance", "res_balance", "attn_balance", "clip_act"}
_WORDS = {
    "embedding_type": ("positional", "fourier"),
    "encoder_type": ("standard", "skip", "residual"),
    "decoder_type": ("standard", "skip"),
}
_OPEN = {"channel_mult_noise", "channel_mult_emb", "clip_act"}  # EDM2's may be None
_EDM = {
    "img_resolution", "in_channels", "out_channels", "label_dim", "augment_dim", "model_channels", "channel_mult",
    "channel_mult_emb", "num_blocks", "attn_resolutions", "dropout",
}  # fmt: skip
_MOST = 1 << 16  # of any size: thousands of channels are the most there are
_LONGEST = 32  # list


class EDMNetwork(nn.Module):
    """A network of EDM or EDM2 behind one call: network(x, t, label=None, augment_labels=None) -> a tensor like x.

    The class is a whole number; `num_classes` stands for none, as does leaving it out: the network is given zeros
    then. Augmentation labels left out are zeros too. Of an output with more channels than x the first are kept: the
    others are a variance.

    Args:
        kind: "SongUNet", "DhariwalUNet" or "EDM2UNet".
        sign: what the output is multiplied with.
        options: the network's own.

    Raises:
        OptionError: for a kind or option that is not known, or a value that cannot be.
    """

    def __init__(self, kind: str, sign: float = 1.0, **options: Any) -> None:
        super().__init__()
        if kind not in _KINDS:
            raise one_of("kind of EDM network", kind, _KINDS)
        if sign not in (1, -1):
            raise OptionError(f"sign is {sign!r}; expected 1 or -1")
        self.kind, self.sign = kind, float(sign)
        self.options = {name: _checked(kind, name, value) for name, value in options.items()}
        if missing := {"img_resolution", *_channels(kind)} - self.options.keys():
            raise OptionError(f"a {kind} lacks {', '.join(sorted(missing))}; expected them among its options")
        self.num_classes: int = self.options.get("label_dim", 0)
        self.model = _KINDS[kind](**self.options)

    def forward(
        self, x: Tensor, t: Tensor, label: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """x (B, C, H, W), t (B,) on the network's own clock, label (B,) whole, augment_labels (B, A) -> like x."""
        given: dict[str, Tensor] = {}
        if self.num_classes:
            label = torch.full((len(x),), self.num_classes, device=x.device) if label is None else label
            given["label"] = F.one_hot(label.long(), self.num_classes + 1)[:, :-1].to(x.dtype)
        elif label is not None:
            raise OptionError("the network was given a label; expected none, as it knows no classes")
        if augment_labels is not None:
            if not self.options.get("augment_dim"):
                raise OptionError("the network was given augment_labels; expected none, as it knows no augmentation")
            given["augment"] = augment_labels.to(x.dtype)
        out = self.model(x, t, **given)[:, : x.shape[1]]
        return out if self.sign == 1.0 else out * self.sign

    def sample_shape(self) -> tuple[int, int, int]:
        """One sample's shape."""
        size = self.options["img_resolution"]
        return (self.options[_channels(self.kind)[0]], size, size)

    def config(self) -> dict[str, Any]:
        """What `from_config` needs to build the same architecture: JSON-able."""
        return {"kind": self.kind, "sign": self.sign, **self.options}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> EDMNetwork:
        """The architecture that `config()` described, with fresh weights.

        Raises:
            OptionError: for a kind, an option or a value that is not known here.
        """
        if "kind" not in config:
            raise OptionError(f"the config has {', '.join(config) or 'nothing'}; expected one of an EDMNetwork")
        return cls(**config)


def _channels(kind: str) -> tuple[str, ...]:
    return ("img_channels",) if kind == "EDM2UNet" else ("in_channels", "out_channels")


def _checked(kind: str, name: str, value: Any) -> Any:
    """An option's value, which JSON can say and a network can have."""
    if name not in _OPTIONS[kind]:
        raise one_of(f"option of a {kind}", name, _OPTIONS[kind])
    if value is None and kind == "EDM2UNet" and name in _OPEN:
        return None
    if name in _SIZES or name in _COUNTS:
        low = int(name in _SIZES)
        if not _is_whole(value, low):
            raise OptionError(f"{name} is {value!r:.40}; expected a whole number, {low} to {_MOST}")
        return value
    if name in _WORDS:
        if value not in _WORDS[name]:
            raise one_of(name, value, _WORDS[name])
        return value
    if name not in _LISTS:
        if not _is_number(value):
            raise OptionError(f"{name} is {value!r:.40}; expected a number")
        return value
    fewest, fits = _LISTS[name]
    if not isinstance(value, list | tuple) or not fewest <= len(value) <= _LONGEST or not all(map(fits, value)):
        what = "numbers" if fits is _is_number else f"whole numbers, 1 to {_MOST}"
        raise OptionError(f"{name} is {value!r:.40}; expected {fewest} to {_LONGEST} {what}")
    return list(value)


def _is_whole(value: Any, low: int = 1) -> bool:
    return type(value) is int and low <= value <= _MOST


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


# How many there are at least, and what each must be.
_LISTS = {"channel_mult": (1, _is_whole), "attn_resolutions": (0, _is_whole), "resample_filter": (2, _is_number)}
_OPTIONS = {
    "SongUNet": _EDM | {*_WORDS, "channel_mult_noise", "resample_filter"},
    "DhariwalUNet": _EDM,
    "EDM2UNet": (_SIZES | _LISTS.keys() | _NUMBERS | {"label_dim"}) - {"in_channels", "out_channels"},
}


# From a file


def from_edm(path: str | os.PathLike[str]) -> Model:
    """A network pickle of NVlabs' EDM or EDM2 as a model. No code is run: not what the file holds, nor what it names.

        model = fl.from_edm("edm-cifar10-32x32-cond-vp.pkl")
        solver = fl.solvers.Heun(along=fl.paths.EDM(rho=1))
        x = fl.sample(model, 16, solver=solver, times="karras", steps=18, cond={"label": labels})

    The averaged weights ("ema") are read, in float32. The wrapping becomes a convention, as in this module's table.
    The noise levels are the checkpoint's own; where it has no bounds they are those that EDM samples by, 0.002 to 80.
    Between the entries of its table iDDPM's network is told the time between; theirs is told the nearest entry's.

    A class is the condition `label`, a whole number; label_dim stands for none (theirs: one-hot, and zeros). To guide
    by it makes sense where labels were dropped in training; else guide by a second model. Pixels are in [-1, 1],
    uint8 = 127.5 x + 128. The data of EDM2's networks of 512 x 512 images are latents of Stable Diffusion's
    autoencoder, brought per channel to mean 0 and standard deviation 0.5: they are left as they are, not decoded.
    EDM2's estimate of its own uncertainty is left out.

    Args:
        path: the file.

    Raises:
        RunError: for a file that is missing, damaged or another kind of pickle, that names anything beyond tensors and
            descriptions, or holds a network that is not known here.

    Sources: Karras, Aittala, Aila, Laine: Elucidating the design space (2022), https://arxiv.org/abs/2206.00364;
        Karras, Aittala, Lehtinen, Hellsten, Aila, Laine: Analyzing and improving the training dynamics of diffusion
        models (2024), https://arxiv.org/abs/2312.02696
    """
    content = read(path)
    wrapped = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(wrapped, Record) or wrapped.kind not in _WRAPPINGS:
        held = wrapped.kind if isinstance(wrapped, Record) else "no network"
        raise RunError(f"{path} holds {held!r:.60} as its ema; expected one of {', '.join(_WRAPPINGS)}")
    convention, inside, sign = _WRAPPINGS[wrapped.kind]
    try:
        tensors = _tensors(wrapped)
        with torch.device("meta"):
            network = _described(wrapped.state["_modules"][inside], sign)
        found = convention(wrapped.state, tensors)
    except (ArithmeticError, AttributeError, LookupError, OptionError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).split("\n")[0][:200]
        raise RunError(f"{path}: its {wrapped.kind} cannot be built: {reason}; expected one of NVlabs' own") from error
    start = f"{inside}."
    weights = {f"model.{k.removeprefix(start)}": value for k, value in tensors.items() if k.startswith(start)}
    # Before any memory is set aside: that all fit, and that the numbers can be there.
    fill(network, weights, Path(path))
    needed = sum(value.numel() for value in weights_of(network).values())
    if needed > os.path.getsize(path):
        raise RunError(f"{path} has fewer bytes than its network numbers, {needed}; expected a file with all of them")
    network.to_empty(device="cpu")
    fill(network, weights, Path(path))
    model = Model(network.eval(), found.path)
    model.convention = found
    return model.under(
        shape=network.sample_shape(),
        null={"label": network.num_classes} if network.num_classes else None,
        normalisation=Normalisation(low=-1.0, high=1.0) if _pixels(content) else Normalisation(),
    )


def _described(record: Record, sign: float) -> EDMNetwork:
    """The network of a record, by the arguments that it was made with."""
    kind = "EDM2UNet" if record.kind == "UNet" else record.kind
    # The labels that training drops are drawn by the objective here.
    options = {name: value for name, value in record.state["_init_kwargs"].items() if name != "label_dropout"}
    return EDMNetwork(kind, sign, **options)


def _pixels(content: Mapping[str, Any]) -> bool:
    encoder = content.get("encoder")
    return not isinstance(encoder, Record) or encoder.kind == "StandardRGBEncoder"


_DEEPEST, _MODULES = 8, 20_000
_PARTS = {
    "Block", "Conv2d", "DhariwalUNet", "FourierEmbedding", "GroupNorm", "Linear", "ModuleDict", "MPConv", "MPFourier",
    "PositionalEmbedding", "SongUNet", "UNet", "UNetBlock",
}  # fmt: skip


def _tensors(wrapped: Record) -> dict[str, Tensor]:
    """The parameters and buffers of a network's record, by their names in its state dict."""
    found: dict[str, Tensor] = {}
    waiting: list[tuple[str, Record, int]] = [("", wrapped, 0)]
    seen = 0
    while waiting:
        prefix, record, depth = waiting.pop()
        seen += 1
        if seen > _MODULES or depth > _DEEPEST:
            raise ValueError(f"it has more than {_MODULES} modules, or they lie deeper than {_DEEPEST}")
        for group in ("_parameters", "_buffers"):
            for name, value in record.state[group].items():
                if value is not None:
                    if not isinstance(value, Tensor):
                        raise TypeError(f"{prefix}{name} is a {type(value).__name__}, not a tensor")
                    found[f"{prefix}{name}"] = value
        for name, part in record.state["_modules"].items():
            if part is None:
                continue
            if not isinstance(part, Record) or part.kind not in _PARTS:
                raise TypeError(f"{prefix}{name} is a {getattr(part, 'kind', type(part).__name__)!r:.60}")
            waiting.append((f"{prefix}{name}.", part, depth + 1))
    return found


# What a wrapping amounts to

_LOW, _HIGH = 0.002, 80.0  # EDM's own range, where a checkpoint does not narrow it


def _number(state: Mapping[str, Any], name: str) -> float:
    value = state[name]
    if type(value) not in (int, float) or math.isnan(value):
        raise TypeError(f"its {name} is {value!r:.40}, not a number")
    return float(value)


def _edm(state: Mapping[str, Any], _: Mapping[str, Tensor]) -> Convention:
    path = paths.EDM(max(_LOW, _number(state, "sigma_min")), min(_HIGH, _number(state, "sigma_max")))
    return Convention(path, predictions.EDM(_number(state, "sigma_data")))


def _edm2(state: Mapping[str, Any], _: Mapping[str, Tensor]) -> Convention:
    return Convention(paths.EDM(_LOW, _HIGH), predictions.EDM(_number(state, "sigma_data")))


def _vp(state: Mapping[str, Any], _: Mapping[str, Tensor]) -> Convention:
    low = _number(state, "beta_min")
    path = paths.VP(low, low + _number(state, "beta_d"))
    return Convention(path, predictions.Noise(), Clock.noise_level(_number(state, "M") - 1.0))


def _ve(state: Mapping[str, Any], _: Mapping[str, Tensor]) -> Convention:
    path = paths.VE(_number(state, "sigma_min"), _number(state, "sigma_max"))
    return Convention(path, predictions.Noise(), SigmaClock(path, log=1.0, unit=2.0))


def _iddpm(_: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Convention:
    # u_j falls from the noisiest, j = 0, to the data, j = M. It was made in float32: the file's own numbers count.
    levels = tensors["u"].double()[:-1].flip(0)
    path = paths.Discrete((1.0 / (1.0 + levels.square())).tolist())
    return Convention(path, predictions.Noise(), Clock.steps(len(levels)))


_Wrapping = Callable[[Mapping[str, Any], Mapping[str, Tensor]], Convention]
# The convention, where the network is, and the sign of its output.
_WRAPPINGS: dict[str, tuple[_Wrapping, str, float]] = {
    "EDMPrecond": (_edm, "model", 1.0),
    "Precond": (_edm2, "unet", 1.0),
    "VPPrecond": (_vp, "model", 1.0),
    "VEPrecond": (_ve, "model", -1.0),
    "iDDPMPrecond": (_iddpm, "model", 1.0),
}
