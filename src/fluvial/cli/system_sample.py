"""`fluvial sample` of a composition of models: a sheet of what every stage makes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from fluvial import __version__, model, sheets, training
from fluvial.cli.common import labels, say
from fluvial.guidance import CFG
from fluvial.show import settings
from fluvial.systems import System


def draw(
    system: System, n: int, seed: int, label: int | None, asked: dict[str, Any], run: str, out: Path
) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
    """Samples all stages, and writes their sheets: the last one's is `out`, the others' are named after their stage.

    Returns the samples, the conditions and what the other stages made, and how.

    Args:
        asked: solver, options, steps, times, guidance, path, noise, as on the command line. What is not given is each
            stage's own.
    """
    given: dict[str, Any] = {name: asked[name] for name in ("steps", "times") if asked[name] is not None}
    if asked["solver"] or asked["options"]:
        given["solver"] = settings.solver(asked["solver"] or "heun", asked["options"])
    if asked["guidance"] is not None:
        given["guidance"] = CFG(asked["guidance"])
    if asked["noise"] != "independent":
        given["noise"] = asked["noise"]
    view: Any = system if asked["path"] is None else model.convert(system, path=asked["path"])  # type: ignore[arg-type]
    calls = settings.Calls()
    cond = labels(system, n, label)  # type: ignore[arg-type]
    made = view.stages(n, seed=seed, cond=cond, callback=calls, progress=True, **given)
    made = {name: x.cpu() for name, x in made.items()}
    info = {
        "fluvial": __version__,
        "run": run,
        "system": system.kind,
        "seed": seed,
        "label": label,
        "nfe": calls.by_stage,
    }
    info |= {"models": {name: training.model_hash(part) for name, part in system.models.items()}}
    info |= {name: str(value) for name, value in asked.items() if value}
    columns = 10 if cond and label is None and n % 10 == 0 else None
    *before, last = made
    for name in before:
        path = out.with_name(f"{out.stem}-{name}{out.suffix}")
        sheets.save(sheets.sheet(_shown(made[name]), columns=columns), path, {**info, "stage": name})
        say(f"{name}: {path}")
    picture = sheets.sheet(made[last], columns=columns, normalisation=system.normalisation)
    sheets.save(picture, out, {**info, "stage": last})
    say(f"{n} samples, {' + '.join(map(str, calls.by_stage))} NFE each: {out}")
    return made[last], {**cond, **{name: made[name] for name in before}}, info


def _shown(x: Tensor) -> Tensor:
    """What is no picture as one: the channels of latents side by side, about as high as wide."""
    if x.ndim != 4 or x.shape[1] in (1, 3):
        return x
    n, channels, height, width = x.shape
    down = max(k for k in range(1, math.isqrt(channels) + 1) if channels % k == 0)
    tiles = x.reshape(n, down, channels // down, height, width).transpose(2, 3)
    return tiles.reshape(n, 1, down * height, channels // down * width)
