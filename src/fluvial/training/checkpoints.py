"""Model folders: a model saved so that it explains itself, and read back by name.

    config.json          the network's and the convention's description, in words too; no code
    model.safetensors    the weights
    ema.safetensors      their moving average, where there is one

A converted model is saved as its source and the notation it was seen in. Training adds to the same folder: see `runs`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fluvial import __version__, paths, predictions
from fluvial.convention import Convention
from fluvial.errors import OptionError, RunError, one_of
from fluvial.flow_maps import FlowMap
from fluvial.model import Converted, Model, convert
from fluvial.training import atomic, building
from fluvial.training.building import fill, weights_of

CONFIG, RAW, AVERAGED, STATE, CARD = "config.json", "model.safetensors", "ema.safetensors", "state", "README.md"
WEIGHTS = {"ema": AVERAGED, "raw": RAW}

Folder = str | os.PathLike[str]


def save(model: Model, folder: Folder, ema: Model | None = None) -> Path:
    """Writes a model into a folder of its own, whole or not at all; an earlier model saved there is replaced.

    Args:
        model: any model around an nn.Module, converted or not.
        folder: a new or empty one, or one that `save` wrote.
        ema: the same model with averaged weights, kept beside the others.

    Raises:
        OptionError: for what cannot be saved: a path or clock that is code, a network that is no nn.Module.
        RunError: for a folder that holds something else, or a disk that is full.
    """
    folder = Path(folder)
    if hasattr(model, "save_to"):  # a composition of models
        return model.save_to(folder)  # type: ignore[attr-defined]
    config = config_of(model)
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; expected a folder to save the model in")
    others = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    # The card of a saved model goes with it; other people's READMEs are their own.
    others -= {CONFIG, RAW, AVERAGED, *((CARD,) if CONFIG in others else ())}
    if others:
        what = "a training run" if STATE in others else min(others)
        raise RunError(
            f"{folder} holds {what}; expected a new folder, or one that holds a saved model and nothing else"
        )

    def write(unfinished: Path) -> None:
        (unfinished / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        atomic.write_tensors(unfinished / RAW, weights_of(model.network))
        if ema is not None:
            atomic.write_tensors(unfinished / AVERAGED, weights_of(ema.network))

    with atomic.writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        atomic.replace_folder(folder, write)
    return folder


def load(folder: Folder, network: nn.Module | None = None, weights: str = "ema") -> Model:
    """The model of a run, or of a folder that `save` wrote, on the CPU and ready to sample.

    Args:
        folder: the folder.
        network: a network of the class that was saved, for classes that Fluvial does not build itself. It is filled
            in place.
        weights: "ema", the averaged weights where the folder has them; or "raw".

    Raises:
        OptionError: for other `weights`.
        RunError: for a folder that is not one of these, damaged files, weights that do not fit the network.
    """
    folder = Path(folder)
    if weights not in WEIGHTS:
        raise one_of("kind of weights", weights, WEIGHTS)
    config = read_config(folder)
    tensors, file = _weights(folder, weights)
    model = _model(config, (network or _network(config, folder, tensors, file)).eval(), folder)
    fill(model.network, tensors, file)
    return model


def convert_run(
    run: Folder, out: Folder, path: Any = None, prediction: Any = None, network: nn.Module | None = None
) -> Model:
    """Writes the model of a run in another notation, around the same weights; raw and averaged ones are both kept."""
    averaged = convert(load(run, copy.deepcopy(network)), path, prediction)
    if (Path(run) / AVERAGED).exists():
        save(convert(load(run, network, "raw"), path, prediction), out, ema=averaged)
    else:
        save(averaged, out)
    return averaged


def model_hash(model: Model | Folder, weights: str = "ema") -> str:
    """Twelve hexadecimal digits that name these weights under this convention, in a folder or in memory."""
    if isinstance(model, Model):
        network = model.network
        tensors = weights_of(network) if isinstance(network, nn.Module) else {}
        try:
            convention: Any = {**_convention(model), **_kind(model)}
        except OptionError:
            convention = repr(model.convention)
    else:
        config = read_config(Path(model))
        convention = {key: config[key] for key in ("convention", "view", "flow_map") if key in config}
        tensors = _weights(Path(model), weights)[0]
    digest = hashlib.sha256(json.dumps(convention, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]


def config_of(model: Model) -> dict[str, Any]:
    """What `config.json` says of a model.

    Raises:
        OptionError: for what cannot be said in JSON.
    """
    if type(model.inner if isinstance(model, FlowMap) else model) not in (Model, Converted):
        raise OptionError(f"a {type(model).__name__} model cannot be saved; expected the model that it was made from")
    if not isinstance(model.network, nn.Module):
        raise OptionError(
            f"the network is a {type(model.network).__name__} and has no weights to save; expected an nn.Module"
        )
    shape = "" if model.shape is None else f", of samples {model.shape}"
    what = f"a flow map ({model.kind}), predicts" if isinstance(model, FlowMap) else "predicts"
    return {
        "fluvial": __version__,
        "summary": f"{what} {model.prediction.name} on the path {model.path.config()['name']}{shape}",
        "network": building.describe(model.network),
        **_convention(model),
        **_kind(model),
    }


def _kind(model: Model) -> dict[str, str]:
    """Of a flow map; nothing of another, so that it keeps the description, and the hash, that it had."""
    return {"flow_map": model.kind} if isinstance(model, FlowMap) else {}


def _convention(model: Model) -> dict[str, Any]:
    """The source's convention, and the notation it is seen in where it was converted."""
    model = model.inner if isinstance(model, FlowMap) else model
    source, view = model.convention, None
    if isinstance(model, Converted):
        view = {"path": model.path.config(), "prediction": model.prediction.config()}
        own = model.source.convention
        source = replace(source, path=own.path, prediction=own.prediction, clock=own.clock, scale_input=own.scale_input)
    # Through JSON, so that what is compared with a file has its types.
    return json.loads(json.dumps({"convention": source.config(), "view": view}))


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a run folder.

    Raises:
        RunError: where there is none.
    """
    if not (folder / CONFIG).is_file():
        problem = "has no config.json" if folder.is_dir() else "does not exist" if not folder.exists() else "is a file"
        raise RunError(f"{folder} {problem}; expected a run folder, as fl.train or fl.save writes it")
    config = atomic.read_json(folder / CONFIG)
    missing = [key for key in ("network", "convention", "view") if key not in config]
    if missing:
        raise RunError(f"{folder / CONFIG} lacks {', '.join(missing)}; expected the config that Fluvial wrote there")
    return config


def _network(config: Mapping[str, Any], folder: Path, tensors: Mapping[str, Tensor], file: Path) -> nn.Module:
    described = config["network"]
    try:
        if described["config"] is not None:
            return building.build(described, tensors, file)
        name = described["class"]
    except (OptionError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{folder / CONFIG}: the network cannot be built: {error}") from error
    kind = "changed since it was built" if name.rpartition(".")[0] in building.HOMES else "a class of your own"
    raise RunError(f"{folder} holds a {name}, {kind}; expected one to fill: fl.load(folder, network=…)")


def _model(config: Mapping[str, Any], network: nn.Module, folder: Path) -> Model:
    try:
        convention, view = Convention.from_config(config["convention"]), config["view"]
        model = Model(network, convention.path)
        model.convention = convention
        if view is not None:
            model = convert(model, paths.from_config(view["path"]), predictions.from_config(view["prediction"]))
        return FlowMap(model, config["flow_map"]) if "flow_map" in config else model
    except (OptionError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise RunError(f"{folder / CONFIG}: the convention cannot be read: {reason}") from error


def _weights(folder: Path, weights: str) -> tuple[dict[str, Tensor], Path]:
    """The tensors asked for and where they lie. Those of a run are of the step that its state names."""
    file = folder / WEIGHTS[weights]
    if weights == "ema" and not file.exists() and (folder / RAW).exists():
        file = folder / RAW
    pointer = folder / STATE / "latest.json"
    if not pointer.is_file():
        return atomic.read_tensors(file)[0], file
    # A run killed just after it saved may have the weights of two steps beside each other: the pointer decides.
    step = atomic.read_json(pointer).get("step")
    if file.exists():
        tensors, metadata = atomic.read_tensors(file)
        if metadata.get("step") == str(step):
            return tensors, file
    file = folder / STATE / state_name(step) / WEIGHTS[weights]
    return atomic.read_tensors(file)[0], file


def state_name(step: Any) -> str:
    """The folder, below `state`, of a run's complete state at a step."""
    return f"step-{step:06d}" if isinstance(step, int) else f"step-{step}"
