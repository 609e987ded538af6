"""Evaluation: models against real data, at several numbers of steps, over several seeds, with floors.

The same for every model and number of steps: sample i of a seed starts from noise i, and asks for the classes in turn.
Distances compare as many samples as real ones, with the same number of each class; the floor is the same distance
between real ones and real ones, at those counts. What can be compared between models is the excess over the floor.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fluvial import measure, paths, sampling, solvers, training
from fluvial.errors import OptionError, ShapeError
from fluvial.grids import Split
from fluvial.measure import Floor
from fluvial.model import Model
from fluvial.show.evaluate_real import MEASURES, Real
from fluvial.show.settings import Drawn, Setting, Start, draw
from fluvial.solvers import Solver
from fluvial.systems import System
from fluvial.training import Source

Steps = int | tuple[int, ...]

STEPS: tuple[Steps, ...] = (1, 2, 4, 8, 64)
SHOWN = 60  # samples of an image sheet
_SHOWN_POINTS = 2000
_BATCH_NUMBERS, _LARGEST_BATCH = 2**22, 1000


@dataclass(frozen=True)
class Figure:
    """A measure by seed: `mean`, and `std`, which is NaN for a single seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float:
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    def __str__(self) -> str:
        spread = "" if math.isnan(self.std) else f" ± {self.std:.1g}"
        return f"{self.mean:.3g}{spread}"


@dataclass(frozen=True)
class Entry:
    """One model at one number of steps: what a sample cost, its figures, and its first samples of the first seed."""

    run: str
    steps: str
    nfe: int
    milliseconds: float
    figures: dict[str, Figure]
    x: Tensor

    @property
    def title(self) -> str:
        return f"{self.run} at {self.steps} steps" if "+" in self.steps else f"{self.run} at {self.nfe} NFE"


@dataclass(frozen=True)
class Evaluation:
    """All entries, run by run in the order given, the fewest steps first where they were given so.

    Attributes:
        floors: of each measure that has one: the same figure for real data against real data.
        accuracy: share of held-out real data that the classifier recognises; None without one.
        real: real samples, to be shown beside the others.
        shared: how the figures were made, where it is the same for all of them, for JSON.
        runs: of each run what is known of its model, for JSON.
    """

    entries: list[Entry]
    floors: dict[str, Floor]
    accuracy: float | None
    real: Tensor
    shared: dict[str, Any]
    runs: dict[str, dict[str, Any]]

    @property
    def main(self) -> str:
        """The measure of the first plot: the sliced Wasserstein distance where samples are points, else Fréchet's."""
        return "sliced_wasserstein" if self.real.ndim == 2 else "frechet"

    @property
    def reference(self) -> Entry:
        """What ratios are to: the first run at its largest budget."""
        return max((e for e in self.entries if e.run == self.entries[0].run), key=lambda entry: entry.nfe)

    def excess(self, entry: Entry, name: str) -> float:
        return measure.excess(entry.figures[name].mean, self.floors[name])

    def ratio(self, entry: Entry, name: str) -> float:
        """The excess as a multiple of the reference's; NaN where that cannot be told from none."""
        return measure.excess_ratio(entry.figures[name].mean, self.reference.figures[name].mean, self.floors[name])

    @property
    def finding(self) -> str:
        """In one line: what is closest to the data, or how many cannot be told from it."""
        floor, short = self.floors[self.main], MEASURES[self.main].short
        best = min(self.entries, key=lambda entry: entry.figures[self.main].mean)
        lowest = best.figures[self.main]
        alike = [entry for entry in self.entries if not self._differ(entry, best)]
        fewest = min(alike, key=lambda entry: entry.nfe)
        figures = f"{short} {lowest.mean:.3g}, real to real {floor.mean:.3g}"
        also = f"; {fewest.title} cannot be told from it" if fewest.nfe < best.nfe else ""
        return f"Closest to the data: {best.title} ({figures}){also}"

    def _differ(self, entry: Entry, best: Entry) -> bool:
        """Whether the main figures differ by more than two standard errors; of a single seed, two std of the floor."""
        a, b = entry.figures[self.main], best.figures[self.main]
        error = self.floors[self.main].std
        if len(a.values) > 1:
            error = math.hypot(a.std, b.std) / math.sqrt(len(a.values))
        return a.mean - b.mean > 2.0 * error

    @property
    def measured(self) -> list[str]:
        """The measures that some entry has, in the order of `MEASURES`."""
        return [name for name in MEASURES if any(name in entry.figures for entry in self.entries)]

    def table(self, names: Sequence[str], bars: bool = True) -> tuple[list[str], list[list[str]]]:
        """These measures by entry below a header, and real data against real data in the last row.

        Args:
            names: from `measured`. Of the main one the excess follows, and its ratio to the reference's if it has one.
            bars: mean ± std over the seeds of all of them, not of the main one only.
        """
        header, real = ["run", "steps", "NFE"], ["real data", "", ""]
        rows = [[entry.run, entry.steps, str(entry.nfe)] for entry in self.entries]
        for name in names:
            shown = bars or name == self.main
            header.append(MEASURES[name].short)
            real.append(self._real(name, shown))
            for entry, row in zip(self.entries, rows):
                figure = entry.figures.get(name)
                row.append("" if figure is None else str(figure) if shown else f"{figure.mean:.3g}")
            if name == self.main:
                header.append("over floor")
                real.append("")
                for entry, row in zip(self.entries, rows):
                    row.append(f"{self.excess(entry, name):.3g}")
                if not math.isnan(self.ratio(self.reference, name)):
                    header.append("x reference")
                    real.append("")
                    for entry, row in zip(self.entries, rows):
                        row.append(f"{self.ratio(entry, name):.3g}")
        return header, [*rows, real]

    def _real(self, name: str, bars: bool) -> str:
        """What real data measure."""
        if name in self.floors:
            floor = self.floors[name]
            return f"{floor.mean:.3g} ± {floor.std:.1g}" if bars else f"{floor.mean:.3g}"
        known = self.accuracy if name == "recognised" else 1.0
        return "" if known is None else f"{known:.3g}"

    def record(self) -> dict[str, Any]:
        """Everything but the samples, for JSON."""
        return {
            **self.shared,
            "finding": self.finding,
            "runs": self.runs,
            "measures": {name: MEASURES[name].words for name in self.measured},
            "floors": {name: asdict(floor) for name, floor in self.floors.items()},
            "reference": {"run": self.reference.run, "steps": self.reference.steps},
            "entries": [self._entry(entry) for entry in self.entries],
        }

    def _entry(self, entry: Entry) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        for name, figure in entry.figures.items():
            figures[name] = {"mean": figure.mean, "std": _or_none(figure.std), "by_seed": list(figure.values)}
            if MEASURES[name].distance:
                ratio = _or_none(self.ratio(entry, name))
                figures[name] |= {"excess": self.excess(entry, name), "excess_ratio": ratio}
        cost = {"nfe": entry.nfe, "ms_per_sample": entry.milliseconds}
        return {"run": entry.run, "steps": entry.steps, **cost, **figures}


def _or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def evaluate(
    models: Mapping[str, Model | System],
    source: Source,
    *,
    steps: Sequence[Steps] = STEPS,
    solver: str | Solver | None = None,
    grid: Any = None,
    n: int = 1000,
    seeds: int = 3,
    guidance: float | None = None,
    label: int | None = None,
    features: Any = None,
    say: Callable[[str], Any] = lambda line: None,
) -> Evaluation:
    """Samples every model at every number of steps, and measures the samples against the data.

    Args:
        models: by the names that their runs go by; systems too, every stage of which takes these steps.
        source: real data, of the models' shape and in their units.
        steps: numbers of steps. A tuple is a budget for each segment, (1, 9): of the segments of a model that has some,
            of equal parts of the rectified path's time for all others, which are then sampled in that notation.
        solver: a name or an object; default "euler", and "jump" for flow maps.
        grid: a grid or its name, laid into each segment where there are several; None is uniform.
        n: samples of each seed. They ask for the classes in turn.
        seeds: how many; seed s starts from the noise of that seed, in all models and at all steps.
        guidance: a scale of classifier-free guidance.
        label: the only class to ask for.
        features: for `measure.features.of`: a name, a module, a `Classifier`, or None for what suits the data.
        say: told what is being done.

    Raises:
        OptionError, ShapeError, DependenceError: for what cannot be sampled or compared, before anything is measured.
    """
    taken = {run: _solver(model, solver) for run, model in models.items()}
    _check(models, source, steps, n, seeds, label)
    settings = {
        (run, budget): _setting(model, taken[run], budget, grid, guidance)
        for run, model in models.items()
        for budget in steps
    }
    asked = {run: _asked(model, n, label) for run, model in models.items()}
    for (run, _), setting in settings.items():
        # What cannot be sampled is known now; and a first network call, which is slow, is no part of what one takes.
        _drawn(models[run], setting, 1, 0, asked[run])
    say(f"reading {source.name}")
    real = Real(source, n, next(iter(asked.values())) if all(a is not None for a in asked.values()) else None, features)
    entries = []
    for (run, budget), setting in settings.items():
        say(f"{run}, {spelled(budget)} steps ({len(entries) + 1} of {len(settings)})")
        drawn = [_drawn(models[run], setting, n, seed, asked[run]) for seed in range(seeds)]
        values = [real(one.x, asked[run]) for one in drawn]
        entries.append(
            Entry(
                run,
                spelled(budget),
                max(one.nfe for one in drawn),
                1000.0 * sum(one.seconds for one in drawn) / (n * seeds),
                {name: Figure(tuple(value[name] for value in values)) for name in values[0]},
                drawn[0].x[: _SHOWN_POINTS if real.data.ndim == 2 else SHOWN],
            )
        )
    shared = {
        "data": {"name": source.name, "size": len(source), "read": len(real.data)},
        **real.record(),
        "samples": n,
        "seeds": list(range(seeds)),
        "solver": ", ".join(dict.fromkeys(map(repr, taken.values()))),
        "grid": str(grid or "uniform"),
        "guidance": guidance,
        "labels": "none" if not any(a is not None for a in asked.values()) else "in turn" if label is None else label,
    }
    accuracy = None if real.classifier is None else real.classifier.accuracy
    # Real ones in the order of the classes asked for.
    shown = real.data[real.chosen[real.kept.argsort()]]
    runs = {run: describe(model) | {"solver": repr(taken[run])} for run, model in models.items()}
    return Evaluation(entries, real.floors, accuracy, shown[:_SHOWN_POINTS], shared, runs)


def describe(model: Any) -> dict[str, Any]:
    """What is said of a model, or of a system, beside its figures."""
    if isinstance(model, System):
        parts = {name: describe(part) for name, part in model.models.items()}
        return {"model": " + ".join(part["model"] for part in parts.values()), "system": model.kind, "stages": parts}
    hashed = training.model_hash(model)
    return {"model": hashed, "path": str(model.path), "prediction": model.prediction.name}


def spelled(steps: Steps) -> str:
    """8, or 1+9 of budgets for segments."""
    return str(steps) if isinstance(steps, int) else "+".join(map(str, steps))


def _check(
    models: Mapping[str, Any], source: Source, steps: Sequence[Steps], n: int, seeds: int, label: int | None
) -> None:
    if not models or not steps or n < 1 or seeds < 1:
        raise OptionError(
            f"{len(models)} models, {len(steps)} numbers of steps, n = {n}, {seeds} seeds; expected 1 or more of each"
        )
    if source.size is None:
        raise OptionError(
            f"{source.name} is a stream, of which no random part can be read; expected data with a length"
        )
    for run, model in models.items():
        if model.shape is not None and model.shape != source.shape:
            raise ShapeError(f"samples of {source.name} have shape {source.shape}; expected {run}'s, {model.shape}")
        classes = (model.null or {}).get("label")
        if classes is not None and source.num_classes is not None and classes != source.num_classes:
            raise OptionError(f"{source.name} has {source.num_classes} classes; expected {run}'s, {classes}")
        if label is not None and (classes is None or not 0 <= label < classes):
            expected = "a model with classes" if classes is None else f"0 to {classes - 1}"
            raise OptionError(f"label is {label} for {run}; expected {expected}")


def _asked(model: Any, n: int, label: int | None) -> Tensor | None:
    """The classes that samples 0 … n-1 ask for."""
    classes = (model.null or {}).get("label")
    if classes is None:
        return None
    return torch.arange(n) % classes if label is None else torch.full((n,), label)


def _solver(model: Any, solver: str | Solver | None) -> Any:
    """The solver of a model; those of a system by stage, where they are not one."""
    if isinstance(model, System):
        found = {name: _solver(part, solver) for name, part in model.models.items()}
        first = next(iter(found.values()))
        return first if all(each == first for each in found.values()) else found
    chosen = solvers.named(solver or ("jump" if model.jumps else "euler"))
    return sampling.suited(chosen, model)


def _setting(model: Any, solver: Any, steps: Steps, grid: Any, guidance: float | None) -> Setting:
    if isinstance(model, System) and not isinstance(steps, int):
        raise OptionError(f"steps are {spelled(steps)}, budgets for the segments of one model; expected whole numbers")
    if isinstance(steps, int) or model.segments is not None:  # type: ignore[union-attr]
        return Setting(solver, steps, times=grid, guidance=guidance)  # type: ignore[arg-type]
    nodes = [k / len(steps) for k in range(len(steps) + 1)]
    split = Split(nodes, steps, [grid] * len(steps))
    return Setting(solver, times=split, guidance=guidance, path=paths.Rectified())


def _drawn(model: Any, setting: Setting, n: int, seed: int, asked: Tensor | None) -> Drawn:
    """Samples 0 … n-1 of a seed, in batches that bound the memory they take."""
    size = min(_LARGEST_BATCH, max(1, _BATCH_NUMBERS // math.prod(model.shape or (1,))))
    parts = []
    for first in range(0, n, size):
        count = min(size, n - first)
        cond = {} if asked is None else {"label": asked[first : first + count]}
        parts.append(draw(model, setting, Start(count, seed, cond), first=first))
    x = torch.cat([part.x.cpu() for part in parts])
    return Drawn(x, max(part.nfe for part in parts), sum(part.seconds for part in parts))
