"""Comparisons: one model sampled from the same noises under several settings, with what each costs and how good it is.

A run folder knows no data, so its samples are measured against what the model itself means by them:

- `rms`, for ODE solvers: the root mean square difference to the accurate solution from the same noises, over samples
  and dimensions;
- `sliced_wasserstein`, for all as soon as one of them adds noise: the distance to as many accurate ODE solutions from
  other noises, beside the distance between two such sets (`measure.real_floor`). Where the model is not exact its SDE
  has a law of its own, and stays above that floor however many steps it takes;
- `frechet`, with data: the squared Fréchet distance to as many real samples, beside that of real ones to real ones.

The accurate solution is `REFERENCE`, made once for each path and guidance. Its own error is taken for a third of its
difference to half as many steps, as of a method of order 2. Sample i starts from noise i of the seed in every cell.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fluvial import measure, random, solvers
from fluvial.errors import OptionError, ShapeError
from fluvial.measure.distances import FLOOR
from fluvial.model import Model
from fluvial.show.settings import Axes, Drawn, Setting, Start, draw
from fluvial.training import Source

REFERENCE, REFERENCE_STEPS, REFERENCE_GRID = "vabm", 256, "log_snr"
MOST_REAL = 5000  # real samples that are read
SHORT = {"frechet": "FD", "sliced_wasserstein": "SW", "rms": "RMS"}


@dataclass
class Cell:
    """One setting: where it stands, how it draws, its samples (n, …) and cost, its measures and their floors."""

    at: tuple[str, ...]
    setting: Setting
    drawn: Drawn
    values: dict[str, float]
    reference_error: float
    floors: dict[str, measure.Floor]

    @property
    def milliseconds(self) -> float:
        """For each sample."""
        return 1000.0 * self.drawn.seconds / len(self.drawn.x)


class _Reference:
    """Accurate solutions of a model on one path, under one guidance: `same`, from the noises of the cells."""

    def __init__(self, model: Model, setting: Setting, start: Start, distribution: bool) -> None:
        exact = replace(setting, solver=solvers.named(REFERENCE), steps=REFERENCE_STEPS, times=REFERENCE_GRID, nfe=None)
        # The first call of a network is slow on most devices, and is no part of what a cell takes.
        draw(model, replace(exact, steps=1), start)
        self.same = draw(model, exact, start).x
        self.error = rms(self.same, draw(model, replace(exact, steps=REFERENCE_STEPS // 2), start).x) / 3.0
        self.other: Tensor | None = None
        self.floor: measure.Floor | None = None
        if distribution:
            self.other = draw(model, exact, start, first=start.n).x
            labels = start.cond.get("label")
            both = None if labels is None else torch.cat([labels, labels])
            pool = torch.cat([self.same, self.other])
            self.floor = measure.real_floor(measure.sliced_wasserstein, pool, start.n, labels=both)


def rms(a: Tensor, b: Tensor) -> float:
    """The root mean square difference of two sets, sample by sample."""
    return float((a.double() - b.double()).square().mean().sqrt())


class Judge:
    """The squared Fréchet distance to real samples, as many as there are, with the same labels where both have some.

    It is taken on the features of a classifier of these data; without labels, on the numbers themselves.

    Attributes:
        floor: that of real samples to real samples.
        description: in words, for what is written beside the figures.
    """

    def __init__(self, source: Source, model: Model, start: Start) -> None:
        if model.shape is not None and source.shape != model.shape:
            raise ShapeError(f"samples of {source.name} have shape {source.shape}; expected the model's, {model.shape}")
        rows = source.batch(random.permutation(len(source), seed=0, stream=FLOOR)[:MOST_REAL])
        real, known = rows["data"], rows.get("label")
        self.low, self.high = real.min(), real.max()
        self.features: Callable[[Tensor], Tensor] = lambda x: x.flatten(1)
        on = "the numbers themselves"
        if known is not None and len(known.unique()) > 1:
            classifier = measure.train_classifier(real, known)
            self.features, on = classifier.features, classifier.description
        asked = start.cond.get("label") if known is not None else None
        if asked is not None and known is not None:
            real, known = (part[torch.isin(known, asked)] for part in (real, known))
        features = self.features(real)
        self.floor = measure.real_floor(measure.frechet, features, start.n, labels=known if asked is not None else None)
        n = self.floor.n
        self.real = features[:n] if asked is None or known is None else features[_alike(known, asked[:n])]
        self.description = (
            f"squared Frechet distance of {n} samples to {len(self.real)} of {source.name}, on {on}; "
            f"real to real {self.floor.mean:.3g} ± {self.floor.std:.2g}"
        )

    def __call__(self, x: Tensor) -> float:
        x = x[: self.floor.n]
        return measure.frechet(self.features(x.clamp(self.low, self.high) if x.ndim == 4 else x), self.real)


def _alike(known: Tensor, asked: Tensor) -> Tensor:
    """Indices of real samples with as many of each label as were asked for."""
    counts = zip(*(part.tolist() for part in asked.unique(return_counts=True)))
    return torch.cat([(known == label).nonzero()[:count, 0] for label, count in counts])


@dataclass
class Comparison:
    """All cells, row by row: the first option's values down, the second's across.

    Attributes:
        axes: the options compared, each with its values as given.
        cells: in that order.
        shown: the measures that all cells have, the most telling first.
        said: each measure in words.
    """

    model: Model
    axes: Mapping[str, Sequence[str]]
    cells: list[Cell]
    start: Start
    shown: list[str]
    said: dict[str, str] = field(default_factory=dict)

    @property
    def finding(self) -> str:
        """In one line: which setting is best, or how many cannot be told from it."""
        key = self.shown[0]
        best = min(self.cells, key=lambda cell: cell.values[key])
        to = {"frechet": "data", "sliced_wasserstein": "model's ODE in distribution", "rms": "exact solution"}[key]
        at = ", ".join(f"{option} {value}" for option, value in zip(self.axes, best.at))
        floor = f", floor {best.floors[key].mean:.3g} ± {best.floors[key].std:.2g}" if key in best.floors else ""
        noise = 2.0 * best.floors[key].std if key in best.floors else 0.0
        alike = sum(cell.values[key] <= best.values[key] + noise for cell in self.cells)
        if alike > 1:
            count = f"{alike} of {len(self.cells)}"
            return f"{count} are equally close to the {to} ({SHORT[key]} from {best.values[key]:.3g}{floor})"
        return f"Closest to the {to}: {at} ({SHORT[key]} {best.values[key]:.3g}{floor})"

    def table(self) -> tuple[list[str], list[list[str]]]:
        """The figures, a row for each cell below a header."""
        names = [name for name in SHORT if name in self.said]
        rows = [
            [
                *cell.at,
                *(f"{cell.values[name]:.4g}" if name in cell.values else "" for name in names),
                str(cell.drawn.nfe),
                f"{cell.milliseconds:.3g}",
            ]
            for cell in self.cells
        ]
        return [*self.axes, *(SHORT[name] for name in names), "NFE", "ms/sample"], rows

    def record(self) -> dict[str, Any]:
        """Everything but the samples, for JSON."""
        cells = [
            {
                **dict(zip(self.axes, cell.at)),
                "setting": cell.setting.record(self.model),
                "nfe": cell.drawn.nfe,
                "ms_per_sample": cell.milliseconds,
                **cell.values,
                "reference_error": cell.reference_error,
                "floors": {name: asdict(floor) for name, floor in cell.floors.items()},
            }
            for cell in self.cells
        ]
        shared = {"samples": self.start.n, "seed": self.start.seed, "noise": self.start.noise}
        return {"compared": dict(self.axes), **shared, "finding": self.finding, "measures": self.said, "cells": cells}


def compare(
    model: Model,
    base: Setting,
    options: Axes,
    start: Start,
    data: Source | None = None,
    say: Callable[[str], Any] = lambda line: None,
) -> Comparison:
    """Samples the model under `base` with every combination of the options' values.

    Args:
        model: any model.
        base: what is not compared.
        options: what is, from `axes`.
        start: the noises and conditions of every cell.
        data: real samples, for the Fréchet distance.
        say: told what is being done.

    Raises:
        OptionError: for a flow map, or a combination that cannot be sampled, before the first network call.
    """
    if model.jumps:
        raise OptionError("the model is a flow map, with no ODE to compare with; expected fluvial evaluate, with data")
    settings: dict[tuple[str, ...], Setting] = {}
    for at in itertools.product(*options.values()):
        chosen = {option: options[option][value] for option, value in zip(options, at)}
        changed = replace(base, **{"times" if option == "grid" else option: v for option, v in chosen.items()})
        settings[at] = changed.fitted(model)
    if isinstance(base.times, (list, tuple)) and base.times[-1] != 1.0:
        raise OptionError(f"times end at {base.times[-1]:g}; expected an end at 1, where samples are")
    distribution = any(setting.solver.stochastic for setting in settings.values())
    judge = None
    if data is not None:
        say(f"reading {data.name}")
        judge = Judge(data, model, start)
    references: dict[Any, _Reference] = {}
    cells = []
    for number, (at, setting) in enumerate(settings.items(), start=1):
        view = setting.path, setting.guidance
        if view not in references:
            say(f"accurate solution for cell {number} of {len(settings)}")
            references[view] = _Reference(model, setting, start, distribution)
        say(f"cell {number} of {len(settings)}: {', '.join(at)}")
        cells.append(_cell(model, at, setting, start, references[view], judge))
    shown = ["frechet"] if judge else []
    shown.append("sliced_wasserstein" if distribution else "rms")
    return Comparison(
        model, {o: list(v) for o, v in options.items()}, cells, start, shown, _said(model, cells, start, judge)
    )


def _cell(
    model: Model, at: tuple[str, ...], setting: Setting, start: Start, reference: _Reference, judge: Judge | None
) -> Cell:
    drawn = draw(model, setting, start)
    values, floors = {}, {}
    if judge is not None:
        values["frechet"], floors["frechet"] = judge(drawn.x), judge.floor
    if reference.other is not None and reference.floor is not None:
        floors["sliced_wasserstein"] = reference.floor
        values["sliced_wasserstein"] = measure.sliced_wasserstein(drawn.x, reference.other)
    if not setting.solver.stochastic:
        values["rms"] = rms(drawn.x, reference.same)
    return Cell(at, setting, drawn, values, reference.error, floors)


def _said(model: Model, cells: Sequence[Cell], start: Start, judge: Judge | None) -> dict[str, str]:
    """The measures in words, with their floors."""
    exact = f"accurate ODE solution ({REFERENCE}, {REFERENCE_STEPS} steps on {REFERENCE_GRID})"
    low, high = model.normalisation.low, model.normalisation.high
    units = "" if low is None or high is None else f", in data units ({low:.3g} to {high:.3g})"
    said = {} if judge is None else {"frechet": judge.description}
    floors = [cell.floors["sliced_wasserstein"] for cell in cells if "sliced_wasserstein" in cell.floors]
    if floors:
        said["sliced_wasserstein"] = (
            f"sliced Wasserstein distance of {start.n} samples to {start.n} of the model's {exact} from other noises; "
            f"between two such sets {_range([f.mean for f in floors])} ± {max(f.std for f in floors):.2g}{units}"
        )
    if any("rms" in cell.values for cell in cells):
        said["rms"] = (
            f"root mean square difference, over {start.n} samples, to the model's {exact} from the same noise, "
            f"which is itself off by about {_range([cell.reference_error for cell in cells])}{units}"
        )
    return said


def _range(values: Sequence[float]) -> str:
    low, high = (f"{value:.2g}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
