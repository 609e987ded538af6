"""Run folders: a training run that survives being killed at any moment.

    config.json                     what is trained, and how; written first, never changed but for more steps
    state/step-000500/              everything a resumed run needs, complete: weights, average, optimiser, counters
    state/latest.json               which of these counts
    model.safetensors, ema.…        the weights of that step, for all who only want the model
    metrics.jsonl, sheets/          how it went

A state is written into a folder with another name, flushed to the disk, renamed, and only then named in latest.json;
older ones are removed after that. So there is always one complete state, and at most two on the disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fluvial.errors import RunError, one_of
from fluvial.grids import Segments
from fluvial.model import Model
from fluvial.training import atomic
from fluvial.training.checkpoints import AVERAGED, CONFIG, RAW, STATE, model_hash, read_config, state_name
from fluvial.training.pairs import MANIFEST, describe_pairs

_OPTIMISER, _COUNTERS, _POINTER, _METRICS = "optimizer.safetensors", "counters.json", "latest.json", "metrics.jsonl"


_FLOW_MAPS = {
    "consistency": "consistency: to the data, from any time",
    "average": "average: from any time to any other",
    "euler": "euler: the steps of the grid it was trained on",
}


@dataclass
class Run:
    """What training leaves.

    Attributes:
        model: the model that was given, trained, in eval mode.
        ema: the same with averaged weights.
        folder: the run folder, if there is one.
        metrics: a dict for each line of metrics.jsonl.
        step: how many steps were made.
    """

    model: Model
    ema: Model
    folder: Path | None
    metrics: list[dict[str, Any]]
    step: int


class State(NamedTuple):
    """A run at a step: tensors by name, and counters that JSON can hold."""

    step: int
    raw: Mapping[str, Tensor]
    averaged: Mapping[str, Tensor]
    optimiser: Mapping[str, Tensor]
    counters: Mapping[str, Any]


class RunFolder:
    """A run's folder on the disk. What writes is for one process alone."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    # Beginning

    def config(self) -> dict[str, Any] | None:
        """The config of the run that is here; None where there is nothing yet.

        Raises:
            RunError: for a folder that holds something else.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file; expected a folder for the run")
        if not self.path.is_dir() or all(name.name.startswith(".") for name in self.path.iterdir()):
            return None
        if not (self.path / CONFIG).is_file():
            found = min(name.name for name in self.path.iterdir())
            raise RunError(f"{self.path} is not empty and not a run (it holds {found}); expected another folder")
        config = read_config(self.path)
        if "training" not in config:
            raise RunError(f"{self.path} holds a saved model, not a training run; expected another folder")
        return config

    def write_config(self, config: Mapping[str, Any]) -> None:
        with atomic.writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            atomic.write_json(self.path / CONFIG, config)

    # States

    def step(self) -> int | None:
        """The step of the last complete state."""
        pointer = self.path / STATE / _POINTER
        if not pointer.is_file():
            return None
        step = atomic.read_json(pointer).get("step")
        if not isinstance(step, int):
            raise RunError(f"{pointer} names no step; expected what Fluvial wrote there")
        return step

    def read_state(self) -> State | None:
        """The last complete state, if there is one."""
        step = self.step()
        if step is None:
            return None
        folder = self.path / STATE / state_name(step)
        raw, averaged, optimiser = (atomic.read_tensors(folder / name)[0] for name in (RAW, AVERAGED, _OPTIMISER))
        return State(step, raw, averaged, optimiser, atomic.read_json(folder / _COUNTERS))

    def write_state(self, state: State) -> None:
        """Makes `state` the last complete one. The one before stays until then, also if the disk is full."""
        states, before = self.path / STATE, self.step()
        kept = "" if before is None else f"; the state of step {before} is kept, and the same command goes on from it"

        def write(folder: Path) -> None:
            atomic.write_tensors(folder / RAW, state.raw, step=state.step)
            atomic.write_tensors(folder / AVERAGED, state.averaged, step=state.step)
            atomic.write_tensors(folder / _OPTIMISER, state.optimiser, step=state.step)
            (folder / _COUNTERS).write_text(json.dumps(dict(state.counters), indent=2), encoding="utf-8")

        with atomic.writing(self.path, kept):
            if state.step != before:
                atomic.replace_folder(states / state_name(state.step), write)
                atomic.write_json(states / _POINTER, {"step": state.step})
            self.publish()

    def publish(self) -> None:
        """Puts the weights of the last complete state at the top, and removes what is older or unfinished."""
        step = self.step()
        if step is None:
            return
        current = self.path / STATE / state_name(step)
        for name in (RAW, AVERAGED):
            atomic.replace(self.path / name, lambda file, name=name: _link(current / name, file))
        for folder in (self.path / STATE).glob("step-*"):
            if folder != current:
                shutil.rmtree(folder, ignore_errors=True)

    def recover(self) -> None:
        """Tidies up after a run that was killed: unfinished files, lines of metrics after the last state."""
        for folder in (self.path, self.path / STATE, self.path / "sheets"):
            atomic.sweep(folder)
        step = self.step()
        lines = self.metrics(step or 0)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        with atomic.writing(self.path):
            self.publish()
            atomic.replace(self.path / _METRICS, lambda file: file.write_text(text, encoding="utf-8"))
        for sheet in (self.path / "sheets").glob("step-*.png"):
            if int(sheet.stem.removeprefix("step-")) > (step or 0):
                sheet.unlink()

    # What is written along the way

    def metrics(self, until: int) -> list[dict[str, Any]]:
        """The lines of metrics up to a step; a last one that was cut short is no line."""
        lines, path = [], self.path / _METRICS
        for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(text))
        return [line for line in lines if line["step"] <= until]

    def add_metrics(self, line: Mapping[str, Any]) -> None:
        with atomic.writing(self.path / _METRICS), open(self.path / _METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(dict(line)) + "\n")
            file.flush()
            # A state must not be on the disk before the metrics of its step.
            os.fsync(file.fileno())

    def sheet(self, step: int) -> Path:
        return self.path / "sheets" / f"step-{step:06d}.png"

    def write_bad_batch(self, step: int, tensors: Mapping[str, Tensor]) -> Path:
        """Keeps the batch that was not finite, for a look at it."""
        path = self.path / "nonfinite" / f"step-{step:06d}.safetensors"
        with atomic.writing(path):
            path.parent.mkdir(exist_ok=True)
            atomic.replace(path, lambda file: atomic.write_tensors(file, tensors, step=step))
        return path


def _link(source: Path, target: Path) -> None:
    """A second name for the same file where the disk can, which costs nothing; files here are replaced, not changed."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def require_same(folder: Path, before: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuses to go on with a run under other settings.

    Raises:
        RunError: names the first setting that differs, with both values.
    """
    for part in ("network", "convention", "view", "training"):
        old, new = _flat(before[part], part), _flat(asked[part], part)
        for name in {**old, **new}:
            if name != "training.steps" and old.get(name) != new.get(name):
                shown = name.removeprefix("training.")
                raise RunError(
                    f"{folder} was trained with {shown} = {old.get(name)!r}, and {shown} = {new.get(name)!r} is asked "
                    "for; expected the same settings to go on with it, or another folder"
                )


def _flat(value: Any, name: str) -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"name.a.b": 1}."""
    if not isinstance(value, Mapping):
        return {name: value}
    return {key: leaf for k, v in value.items() for key, leaf in _flat(v, f"{name}.{k}").items()}


def describe(folder: str | os.PathLike[str]) -> dict[str, str]:
    """A run, a saved model or a set of pairs, in words: what each thing is called, and what it is.

    Raises:
        RunError: for a folder that is none of these.
    """
    if (Path(folder) / MANIFEST).is_file():
        return describe_pairs(folder)
    run, config = RunFolder(folder), read_config(Path(folder))
    network, training = config["network"], config.get("training")
    weights = atomic.read_tensors(run.path / RAW)[0]
    convention = config["convention"]
    notation = f"{convention['prediction']['name']} on {_options(convention['path'])}"
    words = {"model": f"{model_hash(folder)}, predicts {notation}"}
    view = config["view"] and f"{config['view']['prediction']['name']} on {_options(config['view']['path'])}"
    if view and view != notation:
        words["seen as"] = view
    words["network"] = f"{network['class']}, {sum(value.numel() for value in weights.values()):,} numbers"
    if network["config"]:
        words["architecture"] = _options({k: v for k, v in network["config"].items() if k != "kind"}, "kind")
    words["samples"] = "of any shape" if convention["shape"] is None else " x ".join(map(str, convention["shape"]))
    n = convention["normalisation"]
    if n["low"] is not None:
        words["data units"] = ", ".join(
            f"{key} {n[key]:.4g}" for key in ("low", "high", "mean", "std") if n[key] is not None
        )
    words["score"] = "yes" if convention["independent"] else "no: its noise is not independent of its data"
    if "flow_map" in config:
        words["score"] = "no: it says where a way ends, not what may be there"
    if convention.get("segments"):
        words["segments"] = str(Segments.from_config(convention["segments"]))
    if convention["null"]:
        words["conditions"] = ", ".join(f"{name} ({value} is none)" for name, value in convention["null"].items())
    if "flow_map" in config:
        kind = config["flow_map"]
        if kind not in list(_FLOW_MAPS):
            raise RunError(f"{run.path / CONFIG}: {one_of('kind of flow map', kind, _FLOW_MAPS)}")
        words["flow map"] = _FLOW_MAPS[kind]
    if training:
        words |= _describe_training(run, training)
    return words | {"written by": f"Fluvial {config.get('fluvial', 'of an unknown version')}"}


def _describe_training(run: RunFolder, training: Mapping[str, Any]) -> dict[str, str]:
    data, step = training["data"], run.step() or 0
    size = "a stream" if data["size"] is None else f"{data['size']:,} samples"
    objective = {
        key: value["name"] if isinstance(value, Mapping) else _rounded(value)
        for key, value in training["objective"].items()
        if key != "segments" and value is not None  # segments are the convention's too
    }
    words = {
        "data": f"{data['name']}, {size}",
        "objective": ", ".join(f"{key} {value}" for key, value in objective.items()),
        "training": f"{step} of {training['steps']} steps of {training['batch_size']} samples, seed {training['seed']}",
        "optimiser": f"AdamW, lr {training['lr']:g} ({training['schedule']}), ema {training['ema_decay']:g}",
        "precision": f"{training['precision']} ({training['precision_why']})",
    }
    lines = run.metrics(step)
    if lines:
        words["last loss"] = f"{lines[-1]['loss']:.4f}, {lines[-1]['samples_per_second']:,.0f} samples/s"
    return words


def _rounded(value: Any) -> Any:
    """A list of numbers without the last digits of floating point."""
    return [float(f"{v:.6g}") if isinstance(v, float) else v for v in value] if isinstance(value, list) else value


def _options(config: Mapping[str, Any], name: str = "name") -> str:
    """{"name": "VP", "beta_min": 0.1} -> VP(beta_min=0.1); of a table only the length, and nothing of what is None."""
    said = {k: _options(v) if isinstance(v, Mapping) else v for k, v in config.items() if k != name and v is not None}
    options = [
        f"{len(value)} {key}" if isinstance(value, list) and len(value) > 8 else f"{key}={value}"
        for key, value in said.items()
    ]
    return f"{config[name]}({', '.join(options)})" if name in config else ", ".join(options)
