"""The settings of a training run: checked at once, and kept with the run, which goes on under no others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

from torch import Tensor

from fluvial.errors import OptionError, RunError, one_of
from fluvial.objectives import Objective
from fluvial.training.source import Source

SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class Settings:
    """What determines the weights a run ends with. See `train` for what each means."""

    steps: int
    batch_size: int = 128
    seed: int = 0
    drop_cond: float = 0.1
    lr: float = 1e-3
    warmup: int = 100
    schedule: str = "constant"
    weight_decay: float = 0.01
    clip: float | None = 1.0
    ema_decay: float = 0.999

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("seed", 0), ("warmup", 0)):
            whole(name, getattr(self, name), least)
        checks = {
            "drop_cond": (0.0 <= self.drop_cond <= 1.0, "a share from 0 to 1"),
            "lr": (0.0 < self.lr < math.inf, "a positive number, such as 1e-3"),
            "weight_decay": (0.0 <= self.weight_decay < math.inf, "0 or more"),
            "clip": (self.clip is None or self.clip > 0.0, "a positive norm, or None for none"),
            "ema_decay": (0.0 <= self.ema_decay < 1.0, "0 <= ema_decay < 1, such as 0.999"),
        }
        for name, (fine, expected) in checks.items():
            if not fine:
                raise OptionError(f"{name} is {getattr(self, name)}; expected {expected}")
        if self.schedule not in SCHEDULES:
            raise one_of("schedule", self.schedule, SCHEDULES)

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 1: it rises over `warmup` steps, then stays or falls as a cosine to 0."""
        rate = self.lr * min(1.0, step / max(self.warmup, 1))
        return rate if self.schedule == "constant" else rate * 0.5 * (1.0 + math.cos(math.pi * (step - 1) / self.steps))

    def allow_more(self, before: int, reached: int) -> None:
        """Refuses a number of steps that a run planned for `before`, and now at `reached`, cannot be given.

        Raises:
            RunError: for fewer than it has, or any other number under a schedule that depends on it.
        """
        if self.steps == before:
            return
        if self.schedule != "constant":
            raise RunError(
                f"steps is {self.steps}, and the run was begun for {before}: its {self.schedule} schedule of the "
                f"learning rate depends on them; expected steps={before}, or another folder"
            )
        if self.steps < reached:
            raise RunError(f"steps is {self.steps}, and the run has made {reached}; expected {reached} or more")


def whole(name: str, value: Any, least: int) -> None:
    """Refuses what is not a whole number from `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(f"{name} is {value!r}; expected a whole number, {least} or more")


def describe_training(settings: Settings, objective: Objective, source: Source) -> dict[str, Any]:
    """All of it as JSON, for `config.json`."""
    return {
        "data": {
            "name": source.name,
            "size": source.size,
            "shape": list(source.shape),
            "num_classes": source.num_classes,
            "conditions": list(source.conditions),
        },
        "objective": plain(objective.described()),
        **asdict(settings),
    }


def plain(value: Any) -> Any:
    """A value as JSON: dataclasses by name and fields, functions by name."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {"name": type(value).__name__, **{f.name: plain(getattr(value, f.name)) for f in fields(value)}}
    return getattr(value, "__qualname__", None) or type(value).__qualname__
