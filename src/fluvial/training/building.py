"""Networks as descriptions: what a config file says of an architecture, and how it is built from that.

    {"class": "fluvial.networks.UNet", "config": {…}}

A network is described by its own `config()`, and built by the `from_config` of its class, or of the module that this
lives in. Only the modules in `HOMES` build anything: a name in a file never decides what is imported or run. What is
described is first built without memory, and has to have just the tensors that lie in the file of weights: a damaged or
hostile description is an error before anything of its size is allocated.
"""

from __future__ import annotations

import importlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from fluvial.errors import OptionError, RunError

# Modules of networks that have a `config()`. Those of rooms above are known by name alone.
HOMES = (
    "fluvial.networks",
    "fluvial.systems.autoencoder_networks",
    "fluvial.systems.autoregressive",
    "fluvial.systems.cascade_network",
    "fluvial.systems.unclip_networks",
    "fluvial.interop.diffusers_networks",
    "fluvial.interop.edm",
)

_SPARE = 2**26  # numbers that a network may keep beside those that are saved: positions, masks

Shapes = Mapping[str, tuple[int, ...]]


def describe(network: nn.Module) -> dict[str, Any]:
    """What `config.json` says of a network; of a class of the user's own its name alone."""
    kind: Any = type(network)
    # Others' `config` may mean anything.
    config = kind.config(network) if kind.__module__ in HOMES and hasattr(kind, "config") else None
    # Through JSON, so that what is compared with a file has its types.
    return {"class": f"{kind.__module__}.{kind.__qualname__}", "config": json.loads(json.dumps(config))}


def build(described: Mapping[str, Any], tensors: Mapping[str, Tensor], file: Path) -> nn.Module:
    """The network that `describe` described, for the weights that were read from `file`; they are not filled in yet.

    Raises:
        RunError: for a description of something else, or of more than the weights are for.
    """
    builder, config = _builder(described["class"]), described["config"]
    if not isinstance(config, Mapping):
        raise OptionError(f"its config is {config!r}; expected an object")
    make: Callable[[], nn.Module] = lambda: builder(dict(config))  # noqa: E731
    require_fit(empty(make, tensors, file), {key: tuple(value.shape) for key, value in tensors.items()}, file)
    network = make()
    kinds = {value.dtype for value in tensors.values() if value.is_floating_point()}
    # As it was saved; weights of several types are brought to those that the network has.
    return network.to(kinds.pop()) if len(kinds) == 1 else network


def _builder(dotted: str) -> Callable[[dict[str, Any]], nn.Module]:
    """The `from_config` for a class by its dotted name."""
    home, _, name = dotted.rpartition(".")
    module = importlib.import_module(home) if home in HOMES else None
    kind = vars(module).get(name) if module else None
    # Of a class that lives there: what the module imports is not meant.
    if not (isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__ == home):
        raise OptionError(f"its class is {dotted}, which is not known here; expected a network of {', '.join(HOMES)}")
    return getattr(kind, "from_config", None) or module.from_config  # type: ignore[union-attr]


def empty(make: Callable[[], nn.Module], weights: Mapping[str, Any], file: Path) -> nn.Module:
    """The network that `make` makes, without memory (on torch's meta device).

    Args:
        make: builds it.
        weights: those it is for, by name; tensors or shapes.
        file: where these lie, for the error.

    Raises:
        RunError: for one that cannot be built, or that outgrows them.
    """
    numbers = sum(prod(getattr(value, "shape", value)) for value in weights.values())
    try:
        with torch.device("meta"), _at_most(2 * len(weights) + 100):
            network = make()
        held = sum(tensor.numel() for tensor in (*network.parameters(), *network.buffers()))
    except Exception as error:  # whatever a class answers to a description that is none of its own
        raise RunError(f"the network cannot be built for {file}: {_line(error)}") from error
    if held > numbers + _SPARE:
        raise RunError(
            f"the config describes a {type(network).__name__} of {held:,} numbers, and {file} has {numbers:,}; "
            "expected the config of these weights"
        )
    return network


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{error} is missing" if isinstance(error, KeyError) else text or type(error).__name__


@contextmanager
def _at_most(most: int) -> Iterator[None]:
    """Ends, in this thread, the making of a network as soon as it has more parameters than this."""
    count, here = 0, threading.get_ident()

    def counted(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal count
        count += threading.get_ident() == here
        if count > most:
            raise OptionError(f"it has more than {most} tensors; expected the config of these weights")

    hook = register_module_parameter_registration_hook(counted)
    try:
        yield
    finally:
        hook.remove()


def weights_of(network: Any) -> dict[str, Tensor]:
    """An nn.Module's parameters and lasting buffers, each once by its first name: tied weights have several."""
    names = {name for name, _ in network.named_parameters()} | {name for name, _ in network.named_buffers()}
    return {name: value for name, value in network.state_dict().items() if name in names}


def require_fit(network: nn.Module, shapes: Shapes, file: Path) -> None:
    """Makes sure that weights of these shapes are the network's.

    Raises:
        RunError: says which are missing, unknown, or of another shape.
    """
    own = weights_of(network)
    problems = [f"{name} is missing" for name in own if name not in shapes]
    problems += [f"{name} is unknown" for name in shapes if name not in own]
    problems += [
        f"{name} is {shapes[name]} and should be {tuple(value.shape)}"
        for name, value in own.items()
        if name in shapes and shapes[name] != tuple(value.shape)
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        kind = type(network).__name__
        raise RunError(
            f"{file} does not fit the {kind}: {', '.join(problems[:3])}{more}; expected weights of this architecture"
        )


@torch.no_grad()
def fill(network: Any, tensors: Mapping[str, Tensor], file: Path) -> None:
    """Copies weights read from `file` into the network, where all of them must fit; see `require_fit`."""
    require_fit(network, {name: tuple(value.shape) for name, value in tensors.items()}, file)
    for name, value in weights_of(network).items():
        value.copy_(tensors[name])
