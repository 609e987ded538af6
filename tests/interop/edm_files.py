"""Network pickles as EDM and EDM2 write them, without their code: the same structure, around a source that is a trap.

Weights are filled by a formula, so that what NVlabs' own networks make of them could be written down: see
`test_edm_networks`.
"""

from __future__ import annotations

import collections
import contextlib
import io
import math
import pickle
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fluvial.interop.edm import EDMNetwork

# The networks that were measured: 8 x 8 pixels, two levels of one block each.
SMALL = {"img_resolution": 8, "channel_mult": [1, 2], "num_blocks": 1}
SONG = {**SMALL, "in_channels": 3, "out_channels": 3, "model_channels": 16, "attn_resolutions": [4]}
NCSN = {**SONG, "embedding_type": "fourier", "channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1]}
NETWORKS: dict[str, dict[str, Any]] = {
    "ddpmpp": {"kind": "SongUNet", **SONG, "label_dim": 2, "augment_dim": 9},
    "ncsnpp": {"kind": "SongUNet", **NCSN, "encoder_type": "residual"},
    "skips": {"kind": "SongUNet", **NCSN, "encoder_type": "skip", "decoder_type": "skip", "num_blocks": 2},
    "adm": {"kind": "DhariwalUNet", **SONG, "model_channels": 64, "attn_resolutions": [8], "label_dim": 2},
    "adm_variance": {"kind": "DhariwalUNet", **SONG, "model_channels": 32, "out_channels": 6, "augment_dim": 9},
    "edm2": {"kind": "EDM2UNet", **SMALL, "img_channels": 4, "model_channels": 32, "attn_resolutions": [8],
             "label_dim": 2, "channels_per_head": 16, "resample_filter": [1, 3, 3, 1], "res_balance": 0.4,
             "channel_mult_noise": 3, "channel_mult_emb": 1},
    "edm2_plain": {"kind": "EDM2UNet", **SMALL, "img_channels": 3, "model_channels": 32, "attn_resolutions": [4],
                   "channels_per_head": 32, "concat_balance": 0.3, "attn_balance": 0.6, "clip_act": 2.0},
}  # fmt: skip


def formula(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers in (-1, 1), float64, that look random and are the same everywhere."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    seed = sum((k + 1) * ord(letter) for k, letter in enumerate(name)) % 1000
    return (((i + 1.0) * 12.9898 + seed * 7.233).sin() * 4375.8545).frac().reshape(shape)


@torch.no_grad()
def filled(network: nn.Module) -> nn.Module:
    """The network with each weight from the formula, in float32."""
    for name, value in network.state_dict().items():
        if name.endswith("resample_filter") or name == "u":
            continue
        numbers = formula(name, tuple(value.shape))
        if value.ndim > 1:
            numbers = numbers / math.sqrt(value.numel() / len(value))
        elif name.endswith(("freqs", "phases")):
            numbers = 3.0 * numbers
        elif value.ndim == 0 or ("norm" in name and name.endswith("weight")):
            numbers = 1.0 + 0.5 * numbers
        else:
            numbers = 0.5 * numbers
        value.copy_(numbers)
    return network


def inputs(options: dict[str, Any]) -> dict[str, Tensor]:
    """x, t and, where the network has them, one-hot labels (the second none) and augmentation labels; float64."""
    channels = options.get("in_channels") or options["img_channels"]
    found = {"x": 2.0 * formula("x", (2, channels, 8, 8)), "t": torch.tensor([0.3, -0.8], dtype=torch.float64)}
    if options.get("label_dim"):
        found["label"] = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    if options.get("augment_dim"):
        found["augment"] = formula("augment", (2, 9))
    return found


# Pickles

SOURCE = "raise SystemExit('the source of a pickle was run')\n"
# Ours -> theirs.
NAMES = {
    "SongUNet": "SongUNet", "DhariwalUNet": "DhariwalUNet", "EDM2UNet": "UNet", "Conv": "Conv2d", "Linear": "Linear",
    "GroupNorm": "GroupNorm", "Sines": "PositionalEmbedding", "Weight": "MPConv",
}  # fmt: skip


class Persistent:
    """An object that pickles itself with its source, as theirs do."""

    def __init__(self, kind: str, **state: Any) -> None:
        self.kind, self.state = kind, state

    def __reduce__(self) -> tuple[Any, ...]:
        meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": self.kind, "state": self.state}
        return (sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,), None, None, None)


@contextlib.contextmanager
def their_names() -> Iterator[types.ModuleType]:
    """While it lasts, the names that their pickles refer to exist; to call one is an error."""

    def _reconstruct_persistent_obj(meta: Any) -> None:
        raise AssertionError("a name of the file was called")

    class EasyDict(dict):
        pass

    made = {"torch_utils": {}, "torch_utils.persistence": {"_reconstruct_persistent_obj": _reconstruct_persistent_obj}}
    made |= {"dnnlib": {}, "dnnlib.util": {"EasyDict": EasyDict}}
    before = {name: sys.modules.get(name) for name in made}
    for name, content in made.items():
        module = types.ModuleType(name)
        for each, value in content.items():
            value.__module__, value.__qualname__ = name, each
            setattr(module, each, value)
        sys.modules[name] = module
    try:
        yield sys.modules["dnnlib.util"]
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def record(module: nn.Module, **state: Any) -> Any:
    """A module of ours as one of theirs: its state as `nn.Module` pickles it, and the arguments it was made with."""
    inner = {name: None if each is None else record(each) for name, each in module._modules.items()}
    if isinstance(module, nn.ModuleDict):
        container = nn.ModuleDict()
        container._modules = inner  # type: ignore[assignment]
        return container
    kind = type(module).__name__
    if kind in ("Block", "Features"):
        theirs = {"Block": ("UNetBlock", "Block"), "Features": ("FourierEmbedding", "MPFourier")}[kind]
        kind = theirs["edm2" in type(module).__module__]
    else:
        kind = NAMES[kind]
    return Persistent(
        kind,
        training=False,
        _parameters=dict(module._parameters),
        _buffers=collections.OrderedDict(module._buffers),
        _non_persistent_buffers_set=set(),
        _backward_hooks=collections.OrderedDict(),
        _modules=inner,
        **state,
    )


def content(network: EDMNetwork, wrapping: str, **more: Any) -> dict[str, Any]:
    """What such a file holds, around a network of ours: ema, encoder, dataset_kwargs, …; call it in `their_names`."""
    import numpy as np

    options = {"label_dim": 0, **network.options, "label_dropout": 0.1}
    if network.kind == "EDM2UNet":
        del options["label_dropout"]
    inner = record(network.model, _init_args=(), _init_kwargs=sys.modules["dnnlib.util"].EasyDict(options))
    inner.state["skip_scale"] = np.sqrt(0.5)
    buffers = {"u": more.pop("u")} if "u" in more else {}
    name = "unet" if wrapping == "Precond" else "model"
    parts: dict[str, Any] = {name: inner}
    if wrapping == "Precond":
        from fluvial.interop.edm2_network import Features, Weight

        parts |= {"logvar_fourier": record(Features(8)), "logvar_linear": record(Weight(8, 1))}
    encoder = more.pop("encoder", None)
    ema = Persistent(wrapping, training=False, _parameters={}, _buffers=buffers, _modules=parts, **more)
    found: dict[str, Any] = {
        "ema": ema,
        "loss_fn": Persistent("EDMLoss", P_mean=-1.2, P_std=1.2, sigma_data=0.5),
        "augment_pipe": None,
        "dataset_kwargs": sys.modules["dnnlib.util"].EasyDict(class_name="training.dataset.ImageFolderDataset"),
    }
    if encoder is not None:
        found["encoder"] = Persistent(encoder, scale=np.ones(2, np.float32), bias=np.zeros(2, np.float32))
    return found


def pickled(network: EDMNetwork, wrapping: str, **more: Any) -> bytes:
    """The file of a network under a wrapping; `more` are the wrapping's own attributes."""
    with their_names():
        return dumps(content(network, wrapping, **more))


def dumps(value: Any) -> bytes:
    stream = io.BytesIO()
    pickle.dump(value, stream)
    return stream.getvalue()
