"""What lies in a folder: a model of Fluvial's own, a composition of these, a diffusers pipeline or one network of its.

| it holds | and is |
|---|---|
| config.json with a convention | a run, or a model that `fl.save` wrote |
| system.json | a composition of models that `fl.save` wrote |
| model_index.json | a diffusers pipeline, its parts in folders of their own or beside it |
| config.json with a class of diffusers' | one network, with its scheduler's config beside it |

Only JSON and safetensors are opened. Pickles (.bin, .ckpt, .pt) can run code as they are read, and are not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from fluvial.errors import OptionError, RunError
from fluvial.interop.diffusers_networks import known_network
from fluvial.systems.base import INDEX

NETWORKS = ("unet", "transformer")
MODEL, SYSTEM, PIPELINE, NETWORK = "model", "system", "pipeline", "network"

_CONFIG, _INDEX, _SCHEDULER = "config.json", "model_index.json", "scheduler_config.json"
_WEIGHTS = "diffusion_pytorch_model"
_PICKLES = (".bin", ".ckpt", ".pkl", ".pickle", ".pt", ".pth")
_SHARD = re.compile(r"[\w.-]+\.safetensors")


class Layout(NamedTuple):
    """Where the parts of a model lie.

    Attributes:
        kind: MODEL, SYSTEM, PIPELINE or NETWORK; of the first two nothing else is said.
        name: the class of the pipeline, or of the network.
        network: the folder of the network's config and weights.
        network_class: its class in diffusers.
        part: what its pipeline calls it.
        scheduler, vae: the folders of their configs, where there are any.
    """

    kind: str
    name: str = ""
    network: Path = Path()
    network_class: str = ""
    part: str = NETWORKS[0]
    scheduler: Path | None = None
    vae: Path | None = None


def layout(folder: Path) -> Layout:
    """What a folder holds.

    Raises:
        OptionError: for a network of diffusers' that is not known here.
        RunError: for a folder that holds none of these, or JSON that cannot be read.
    """
    config = read_json(folder / _CONFIG) if (folder / _CONFIG).is_file() else {}
    if "convention" in config:
        return Layout(MODEL)
    if (folder / INDEX).is_file():
        return Layout(SYSTEM)
    if (folder / _INDEX).is_file():
        return _pipeline(folder)
    if isinstance(config.get("_class_name"), str):
        return _one_network(folder, config["_class_name"])
    if config:
        raise RunError(
            f"{folder / _CONFIG} has no convention and names no class of diffusers'; expected the config of a run, as "
            "fl.train or fl.save writes it, or of a diffusers network"
        )
    if not folder.is_dir():
        raise RunError(f"{folder} {'is a file' if folder.exists() else 'does not exist'}; expected a folder of a model")
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    raise RunError(
        f"{folder} has no {_INDEX} or {_CONFIG}"
        + (f", and {_of_pickles(pickles)}" if pickles else "")
        + "; expected a "
        "run folder, as fl.train or fl.save writes it, or one that diffusers saved a pipeline or a network in"
    )


def _pipeline(folder: Path) -> Layout:
    index = read_json(folder / _INDEX)
    name = next((name for name in NETWORKS if _class_in(index, name) is not None), None)
    if name is None:
        raise RunError(f"{folder} has no unet or transformer of diffusers'; expected a pipeline with one")
    kind = str(_class_in(index, name))
    known_network(kind)

    def part(name: str) -> Path | None:
        if _class_in(index, name) is None:
            return None
        # Pipelines of one network may have their parts beside the index.
        return folder / name if (folder / name).is_dir() else folder

    where = part(name) or folder
    return Layout(PIPELINE, str(index.get("_class_name")), where, kind, name, part("scheduler"), part("vae"))


def _one_network(folder: Path, kind: str) -> Layout:
    known_network(kind)
    beside = (folder, folder / "scheduler", folder.parent / "scheduler")
    scheduler = next((each for each in beside if (each / _SCHEDULER).is_file()), None)
    vae = folder.parent / "vae"
    return Layout(NETWORK, kind, folder, kind, NETWORKS[0], scheduler, vae if (vae / _CONFIG).is_file() else None)


def _class_in(index: dict[str, Any], part: str) -> str | None:
    """The class that a pipeline's index names for a part, if it is diffusers' own."""
    entry: Any = index.get(part)
    ours = isinstance(entry, list) and len(entry) == 2 and entry[0] == "diffusers" and isinstance(entry[1], str)
    return entry[1] if ours else None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        RunError: for a file that is missing, or holds anything else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be opened: {' '.join(str(error).split())}; expected JSON") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} cannot be opened: it holds a {type(content).__name__}; expected a JSON object")
    return content


def scheduler_config(found: Layout) -> dict[str, Any] | None:
    """The configuration of the scheduler, where the folder has one."""
    return None if found.scheduler is None else read_json(found.scheduler / _SCHEDULER)


def vae_config(found: Layout) -> dict[str, Any] | None:
    """The configuration of the autoencoder, where the folder has one."""
    return None if found.vae is None else read_json(found.vae / _CONFIG)


def network_config(found: Layout) -> dict[str, Any]:
    """The configuration of the network."""
    return read_json(found.network / _CONFIG)


def weight_patterns(folder: Path, found: Layout) -> list[str]:
    """The files of weights that a model in this folder needs, as patterns below it."""
    if found.kind == MODEL:
        return ["model.safetensors", "ema.safetensors"]
    if found.kind == SYSTEM:
        return ["*.safetensors"]
    below = found.network.relative_to(folder).as_posix()
    start = _WEIGHTS if below == "." else f"{below}/{_WEIGHTS}"
    return [f"{start}.safetensors", f"{start}-*-of-*.safetensors"]


def weight_shapes(found: Layout) -> dict[str, tuple[int, ...]]:
    """The shapes of the network's weights by name, of which only the files' heads are read.

    Raises:
        RunError: for weights that are missing, damaged, pickles, or elsewhere than in the network's folder.
    """
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for file in _weight_files(found.network):
        try:
            with safe_open(file, framework="pt") as opened:
                shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise RunError(f"{file} cannot be opened: {reason}; expected a whole safetensors file") from error
    return shapes


def _weight_files(folder: Path) -> list[Path]:
    whole, index = folder / f"{_WEIGHTS}.safetensors", folder / f"{_WEIGHTS}.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        named = read_json(index).get("weight_map")
        names = set(named.values()) if isinstance(named, dict) and all(map(_is_shard, named.values())) else set()
        missing = [name for name in sorted(names) if not (folder / name).is_file()]
        if not names or missing:
            given = (
                f"names {missing[0]}, which is missing" if missing else "names other files than safetensors beside it"
            )
            raise RunError(f"{index} cannot be opened: it {given}; expected the index that diffusers wrote")
        return [folder / name for name in sorted(names)]
    others = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    pickles = [name for name in others if Path(name).suffix in _PICKLES]
    other = [name for name in others if name.endswith(".safetensors")]
    has = _of_pickles(pickles) if pickles else f"has {other[0]} alone" if other else "has no weights"
    raise RunError(f"{folder} cannot be opened: it {has}; expected {whole.name}, and no pickles")


def _is_shard(name: Any) -> bool:
    return isinstance(name, str) and _SHARD.fullmatch(name) is not None


def _of_pickles(names: list[str]) -> str:
    return f"has {names[0]}, a pickle, which can run code as it is opened and is not"


def count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many numbers the weights are."""
    return sum(map(prod, shapes.values()))


def require_known(found: Layout) -> None:
    """Refuses what is no model of diffusers'."""
    if found.kind == MODEL:
        raise OptionError("the folder holds a model of Fluvial's own; expected fl.load(folder)")
