"""Model cards: the README of a model's folder, which says everything that its weights do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from fluvial.errors import RunError
from fluvial.flow_maps import FlowMap
from fluvial.interop.conventions import in_words
from fluvial.model import Converted, Model, Normalisation
from fluvial.training import model_hash
from fluvial.training.atomic import replace, writing
from fluvial.training.checkpoints import CARD


def write_card(model: Model, folder: str | Path, *, name: str | None = None, license: str | None = None) -> Path:
    """Writes the model card, README.md, into the folder that `fl.save` wrote the model in.

    It has the front matter that the hub reads, and states the convention in words: path, prediction, clock, units of
    the data, shape, conditions; how the model is loaded and sampled; and the hash of its weights.

    Args:
        model: the model that was saved.
        folder: where; an earlier card there is replaced.
        name: the model's name on the hub, for the lines that load it; default: the folder's.
        license: as the hub spells it, such as "apache-2.0".

    Raises:
        RunError: for a folder that does not exist, or cannot be written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"{folder} is no folder; expected the one that fl.save wrote the model in")
    text = card(model, name or folder.resolve().name, license)
    with writing(folder / CARD):
        replace(folder / CARD, lambda file: file.write_text(text, encoding="utf-8"))
    return folder / CARD


def card(model: Model, name: str, license: str | None = None) -> str:
    """The text of the model card."""
    rows = {**facts(model), "Weights": f"`{model_hash(model)}` (`fluvial info`, `fl.training.model_hash(model)`)"}
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    title = "flow map" if isinstance(model, FlowMap) else "model"
    return f"""{_front_matter(model, license)}
# {name.rstrip("/").rpartition("/")[2]}

A {title} of Fluvial: time runs from noise (t = 0) to data (t = 1).

| | |
|---|---|
{table}

```python
{_lines(model, name)}
```
"""


def facts(model: Model) -> dict[str, str]:
    """What the weights of a model do not say, in words."""
    network: Any = model.network
    inner = model.inner if isinstance(model, FlowMap) else model
    source = inner.source if isinstance(inner, Converted) else inner
    rows = {"Convention": in_words(source.convention)}
    if isinstance(inner, Converted):
        rows["Seen as"] = f"{inner.prediction.name} on {inner.path!r}"
    if isinstance(model, FlowMap):
        rows["Flow map"] = f"{model.kind}: one call leads from the state at one time to that at another"
    rows["Samples"] = "any shape" if model.shape is None else " x ".join(map(str, model.shape))
    rows["Data units"] = units(model.normalisation)
    rows["Conditions"] = _conditions(model)
    if model.grid is not None:
        rows["Sampling grid"] = f'`times="fitted"`: {model.grid.made or "fitted to the model"}'
    rows["Score"] = "yes" if model.independent and not isinstance(model, FlowMap) else "no"
    size = sum(parameter.numel() for parameter in network.parameters())
    while isinstance(inside := getattr(network, "inner", None), nn.Module):
        network = inside
    rows["Network"] = f"{type(network).__name__}, {size:,} parameters"
    return rows


def units(n: Normalisation) -> str:
    """The units of the data, and how they become those of the path, in words."""
    if n == Normalisation():
        return "those of the path itself; images in [-1, 1] where nothing else is said"
    measured = [
        f"{name} {value:.4g}" for name in ("low", "high", "mean", "std") if (value := getattr(n, name)) is not None
    ]
    plain = not any(n.shift) and all(scale == 1.0 for scale in n.scale)
    shift, scale = (", ".join(f"{value:.4g}" for value in values) for values in (n.shift, n.scale))
    rule = "path units as they are" if plain else f"path units = (data - ({shift})) / ({scale})"
    return "; ".join([rule, ", ".join(measured)] if measured else [rule])


def _conditions(model: Model) -> str:
    null = dict(model.null or {})
    names = [*null, *(name for name in getattr(model.network, "conditions", ()) if name not in null)]
    said = [f"`{name}`" + (f" ({null[name]} is none)" if name in null else "") for name in names]
    return ", ".join(said) or "none"


def _front_matter(model: Model, license: str | None) -> str:
    """What the hub reads, as YAML: strings in JSON's quotes, which are YAML's too."""
    tags = ["fluvial", "flow-map" if isinstance(model, FlowMap) else "diffusion", type(model.path).__name__.lower()]
    lines = ["library_name: fluvial", *(["license: " + json.dumps(license)] if license else [])]
    lines += ["tags:", *(f"- {json.dumps(tag)}" for tag in tags)]
    if model.shape is not None and len(model.shape) == 3 and model.shape[0] in (1, 3) and _conditions(model) == "none":
        lines.append("pipeline_tag: unconditional-image-generation")
    return "\n".join(["---", *lines, "---"])


def _lines(model: Model, name: str) -> str:
    """How the model is loaded and sampled."""
    shape = "16" if model.shape is not None else "(16, …)"
    steps = "steps=1" if isinstance(model, FlowMap) else "steps=18"
    conditions = getattr(model.network, "conditions", ())
    needed = [condition for condition in conditions if condition not in (model.null or {})]
    cond = f", cond={{{', '.join(f'{json.dumps(each)}: …' for each in needed)}}}" if needed else ""
    return f"""import fluvial as fl

model = fl.load({json.dumps(name)})
x = fl.sample(model, {shape}, {steps}, seed=0{cond})
fl.sheets.save(fl.sheets.sheet(x, normalisation=model.normalisation), "samples.png")"""
