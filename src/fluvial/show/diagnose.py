"""The diagnosis of a model: how straight its trajectories are, what they cost, and where they leave the path's law.

Everything is measured on the model's own trajectories, over several seeds. What needs data is left out where there are
none, and `Diagnosis.omitted` says so. `measure` defines each figure.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluvial import measure, random, training
from fluvial.errors import OptionError, ShapeError
from fluvial.guidance import CFG
from fluvial.measure import Drift, Irreducible, Straightness
from fluvial.measure.distances import FLOOR
from fluvial.measure.straightness import even_split
from fluvial.measure.transport import Ends
from fluvial.model import Model
from fluvial.training import Source

MOST_REAL = 5000  # real samples that are read
SOLVER = "heun"


class Figure(NamedTuple):
    """A number: its mean over the seeds, and their standard deviation."""

    mean: float
    std: float

    def __str__(self) -> str:
        return f"{self.mean:.3g} ± {self.std:.1g}"


@dataclass
class Coupling:
    """A coupling of noise and samples: its costs, by name and for each dimension, and how its straight lines cross."""

    cost: dict[str, Figure]
    crossing_share: Figure
    crossing_depth: Figure


@dataclass
class Diagnosis:
    """What `diagnose` found; squares are means over dimensions, in squared path units.

    Attributes:
        made: how: n samples for each seed, steps, solver, grid, network calls, seeds, guidance, classes, data.
        times: the nodes of the steps; per_t, on the intervals between them; curvature, at all but the first and last.
        straightness: S; segments, per_segment: by segment, against its own chord.
        per_sample: of every sample of every seed.
        split: [0, t, 1], the halves that share the bending evenly.
        own, independent: the model's coupling of noise and samples, and the same noise with other samples.
        irreducible, drift: of the data, where there are some; `drift_shares` is alpha/(alpha + sigma) at drift.times.
        spread: variance within the classes, as a ratio to the data's.
        omitted: what was left out, and why.
    """

    made: dict[str, Any]
    times: list[float]
    straightness: Figure
    per_t: list[Figure]
    segments: list[float]
    per_segment: list[Figure]
    per_sample: list[float]
    curvature: list[Figure]
    split: list[float]
    own: Coupling
    independent: Coupling
    irreducible: Irreducible | None = None
    drift: Drift | None = None
    drift_shares: list[float] = field(default_factory=list)
    spread: Figure | None = None
    omitted: list[str] = field(default_factory=list)

    @property
    def straight(self) -> bool:
        """Whether the trajectories bend too little to say where: S below a thousandth of their mean square length."""
        return self.straightness.mean < 1e-3 * self.own.cost["squared"].mean

    @property
    def saved(self) -> float:
        """What the model's coupling saves of the squared cost of an independent one, per dimension.

        S + V for the exact model of a law, V its irreducible loss: so saved - S is the V of what the model has learned.
        """
        return self.independent.cost["squared"].mean - self.own.cost["squared"].mean

    @property
    def bends(self) -> str:
        """Which segment bends most, in a sentence."""
        if self.straight:
            return "The trajectories are straight: no segment bends noticeably"
        half = f"at t = {self.split[1]:.2f} half of the bending is done"
        if len(self.per_segment) == 1:
            return f"S is {self.straightness}, and {half}"
        worst = max(range(len(self.per_segment)), key=lambda k: self.per_segment[k].mean)
        others = max(figure.mean for k, figure in enumerate(self.per_segment) if k != worst)
        times = f"{self.per_segment[worst].mean / others:.2g} times the next" if others > 0 else "the others not at all"
        a, b = self.segments[worst : worst + 2]
        return f"The segment from {a:g} to {b:g} bends most, {times} (S {self.per_segment[worst].mean:.3g}); {half}"

    def record(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {"bends": self.bends, "saved": self.saved, **_plain(self)}


def diagnose(
    model: Model,
    source: Source | None = None,
    *,
    n: int = 512,
    steps: int = 64,
    segments: Sequence[float] = (0.0, 0.5, 1.0),
    seeds: int = 3,
    cond: Mapping[str, Tensor] | None = None,
    guidance: float | None = None,
    say: Callable[[str], Any] = lambda line: None,
) -> Diagnosis:
    """The diagnosis of a model.

    Args:
        model: any model, in any notation; its trajectories are followed on the Rectified path.
        source: real data, as `training.open_source` gives it; at most 5,000 are read.
        n: trajectories for each seed, and draws of (data, noise).
        steps: of Heun's method.
        segments: nodes [0, …, 1].
        seeds: how many: 0, 1, …; two or more, for the standard deviations.
        cond: conditions (n, …). With labels, the data of these classes alone are compared with.
        guidance: scale of classifier-free guidance.
        say: told what is being done.

    Raises:
        OptionError: a flow map; fewer than two seeds or trajectories; data without a sample of the classes asked for;
            what the measures refuse.
        ShapeError: data of another shape than the model's samples.
    """
    if model.jumps:
        raise OptionError("a flow map has no trajectories to follow; expected the model that it was made from")
    if seeds < 2 or n < 2:
        raise OptionError(f"seeds is {seeds} and n is {n}; expected 2 or more of each, for standard deviations")
    real = None
    cond = dict(cond or {})
    if source is not None:
        say(f"reading {source.name}")
        real = _read(source, model, cond.get("label"))
    guide = None if guidance is None else CFG(guidance)
    options = {"steps": steps, "solver": SOLVER, "cond": cond, "guidance": guide, "segments": segments}
    runs = []
    for seed in range(seeds):
        say(f"following {n} trajectories, seed {seed + 1} of {seeds}")
        runs.append(measure.straightness(model, n, seed=seed, **options))
    say("transport cost and crossing")
    found = _of_trajectories(runs)
    found.made = {
        "n": n,
        "seeds": list(range(seeds)),
        "solver": SOLVER,
        "steps": steps,
        "grid": "equal steps on the Rectified path",
        "nfe": runs[0].nfe,
        "guidance": guidance,
        "classes": cond["label"].unique().tolist() if "label" in cond else None,
        "data": None if source is None or real is None else {"name": source.name, "samples": len(real.data)},
    }
    if real is None:
        found.omitted.append("irreducible loss, marginal drift and the variance within classes: no data are known")
        return found
    say("irreducible loss")
    found.irreducible = measure.irreducible_loss(model.normalisation.apply(real.data), n=n, labels=real.labels)
    _add_spread(found, model, real, runs, cond)
    say("marginal drift")
    _add_drift(found, model, real, guide)
    return found


def _of_trajectories(runs: Sequence[Straightness]) -> Diagnosis:
    """What needs no data."""
    curvature = _figures([run.curvature for run in runs])
    return Diagnosis(
        made={},
        times=runs[0].times,
        straightness=_figure([run.total for run in runs]),
        per_t=_figures([run.per_t for run in runs]),
        segments=runs[0].segments,
        per_segment=_figures([run.per_segment for run in runs]),
        per_sample=torch.cat([run.per_sample for run in runs]).tolist(),
        curvature=curvature,
        split=even_split(runs[0].times, [figure.mean for figure in curvature], 2),
        own=_coupling([run.ends for run in runs]),
        # The noise of one sample is independent of the next.
        independent=_coupling([Ends(run.ends.noise, run.ends.data.roll(1, 0)) for run in runs]),
    )


def _add_spread(
    found: Diagnosis, model: Model, real: _Real, runs: Sequence[Straightness], cond: Mapping[str, Tensor]
) -> None:
    if real.labels is None:
        found.omitted.append("variance within classes: model and data have no classes in common")
        return
    try:
        ratios = [
            measure.within_class_spread(
                model.normalisation.invert(run.ends.data), cond["label"], real.data, real.labels
            ).ratio
            for run in runs
        ]
    except ShapeError as error:
        found.omitted.append(f"variance within classes: {error}")
        return
    found.spread = _figure([float(ratio) for ratio in ratios if ratio is not None])


def _add_drift(found: Diagnosis, model: Model, real: _Real, guide: CFG | None) -> None:
    # Halves of as many as there are trajectories.
    some = slice(2 * found.made["n"])
    cond = {} if real.labels is None else {"label": real.labels[some]}
    steps, seeds = found.made["steps"], len(found.made["seeds"])
    try:
        found.drift = measure.marginal_drift(
            model, real.data[some], solver=SOLVER, steps=max(steps, 8), cond=cond, guidance=guide, repeats=seeds
        )
    except ShapeError as error:
        found.omitted.append(f"marginal drift: {error}")
        return
    levels = model.path.table(found.drift.times[:-1])
    found.drift_shares = [*(c.alpha / (c.alpha + c.sigma) for c in levels), 1.0]


class _Real(NamedTuple):
    """Real samples (N, …) in their own units, and their labels (N,) where the model can be asked for them."""

    data: Tensor
    labels: Tensor | None


def _read(source: Source, model: Model, asked: Tensor | None) -> _Real:
    """Real samples in a random order, of the classes asked for."""
    if model.shape is not None and source.shape != model.shape:
        raise ShapeError(f"samples of {source.name} have shape {source.shape}; expected the model's, {model.shape}")
    if source.size is None:
        rows = next(training.batches(source, source.measured, seed=0))
    else:
        rows = source.batch(random.permutation(source.size, seed=0, stream=FLOOR)[:MOST_REAL])
    data, labels = rows["data"], rows.get("label")
    if asked is None or labels is None:
        return _Real(data, None)
    chosen = torch.isin(labels, asked.to(labels.device))
    if not bool(chosen.any()):
        classes = ", ".join(map(str, asked.unique().tolist()))
        raise OptionError(f"{source.name} has no sample of class {classes}; expected other data, or another label")
    return _Real(data[chosen], labels[chosen])


def _coupling(pairs: Sequence[Ends]) -> Coupling:
    width = pairs[0].noise[0].numel()
    crossings = [measure.crossing(pair) for pair in pairs]
    costs = ("squared", "absolute")
    return Coupling(
        {cost: _figure([measure.transport_cost(pair, cost) / width for pair in pairs]) for cost in costs},
        _figure([found.share for found in crossings]),
        _figure([found.depth for found in crossings]),
    )


def _figure(values: Sequence[float]) -> Figure:
    return Figure(statistics.fmean(values), statistics.stdev(values))


def _figures(runs: Sequence[Sequence[float]]) -> list[Figure]:
    """Lists of numbers, one for each seed, as a list of figures."""
    return [_figure(values) for values in zip(*runs)]


def _plain(value: Any) -> Any:
    """What JSON can hold; named tuples with their names."""
    if is_dataclass(value):
        return {part.name: _plain(getattr(value, part.name)) for part in fields(value)}
    if hasattr(value, "_asdict"):
        return {name: _plain(part) for name, part in value._asdict().items()}
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list) else value
