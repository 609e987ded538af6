"""What all compositions share: they are sampled, converted, saved and loaded as one model is.

    fl.sample(system, 16, steps=20, cond={"label": labels})       the last stage's samples
    system.stages(16, steps=20, cond={"label": labels})           those of every stage, by name
    fl.convert(system, path="vp")                                 each part in that notation
    fl.save(system, folder), fl.load(folder)                      a folder of the parts' own folders

`fl.sample` hands a system its arguments, `sample_with`, and knows nothing else of it.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fluvial import __version__
from fluvial.convention import Normalisation
from fluvial.errors import RunError
from fluvial.model import Model
from fluvial.predictions import Prediction
from fluvial.training import atomic
from fluvial.training.checkpoints import STATE

INDEX = "system.json"

Start = int | Sequence[int] | Tensor


class System(ABC):
    """A composition of models.

    Attributes:
        kind: what it is called in its folder.
        models: the parts that are sampled, by name, in the order in which they are.
        shape: of one finished sample, where it is known.
        normalisation: of the finished samples, for pictures of them.
    """

    kind: ClassVar[str]
    jumps = False
    path = prediction = None  # each part has its own
    models: Mapping[str, Model]
    shape: tuple[int, ...] | None
    normalisation: Normalisation

    @abstractmethod
    def stages(self, start: Start, **options: Any) -> dict[str, Tensor]:
        """What every stage makes (B, …), each in its own units; the finished samples come last.

        Args:
            start: how many samples, or what `fl.sample` starts the first stage from.
            options: as for `fl.sample`. One given as a mapping by the stages' names, such as steps={"base": 20}, is for
                those stages alone.
        """

    @abstractmethod
    def with_models(self, models: Mapping[str, Model]) -> Self:
        """The same system around other models of the same names: converted, straightened or distilled ones."""

    @abstractmethod
    def write_parts(self, folder: Path) -> dict[str, Any]:
        """Writes what is no model into folders below this one; returns what `read` needs to know, JSON-able."""

    @classmethod
    @abstractmethod
    def read(cls, folder: Path, models: Mapping[str, Model], settings: Mapping[str, Any]) -> Self:
        """The system whose models were read, and whose `write_parts` wrote the rest."""

    def sample_with(self, start: Start, **options: Any) -> Tensor:
        """The finished samples: what `fl.sample` returns."""
        return list(self.stages(start, **options).values())[-1]

    def seen(self, path: Any, prediction: Prediction | None) -> Self:
        """Every part in another notation; see `fl.convert`."""
        return self.with_models(
            {
                name: model.seen(path or model.path, prediction or model.prediction)
                for name, model in self.models.items()
            }
        )

    @property
    def null(self) -> dict[str, Any]:
        """The null conditions of all parts."""
        return {name: value for model in self.models.values() for name, value in (model.null or {}).items()}

    @property
    def device(self) -> torch.device:
        return next(iter(self.models.values())).device

    def to(self, device: torch.device | str) -> Self:
        """Moves all parts, in place."""
        for model in self.models.values():
            model.to(device)
        return self

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for model in self.models.values() for parameter in model.parameters()]

    def save_to(self, folder: Path) -> Path:
        """Writes the system into a folder of its own, whole or not at all: what `fl.save` does with one.

        Raises:
            OptionError, RunError: as for `fl.save`.
        """
        from fluvial.training import save

        folder = Path(folder)
        if folder.exists() and not (folder / INDEX).is_file() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunError(f"{folder} holds something else; expected a new folder, or one of a system")
        for run in sorted(folder.glob(f"*/{STATE}")):
            raise RunError(f"{folder} holds a training run, {run.parent.name}; expected a new folder")

        def write(unfinished: Path) -> None:
            for name, model in self.models.items():
                save(model, unfinished / name)
            index = {"fluvial": __version__, "system": self.kind, "models": list(self.models)}
            index["settings"] = self.write_parts(unfinished)
            (unfinished / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

        with atomic.writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            atomic.replace_folder(folder, write)
        return folder


def options_of(name: str, options: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The options of one stage: of those given as a mapping by the stages' names, its own.

    `cond` is a mapping itself, of conditions: it goes to every stage whole.
    """
    found = {}
    for key, value in options.items():
        by_stage = key != "cond" and isinstance(value, Mapping) and set(value) <= set(names)
        if not by_stage:
            found[key] = value
        elif name in value:
            found[key] = value[name]
    return found
