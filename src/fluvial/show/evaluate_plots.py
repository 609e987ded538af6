"""The plots of an evaluation: every run's figure against what a sample costs, and clouds of points."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fluvial.show import plots
from fluvial.show.evaluate import Entry, Evaluation
from fluvial.show.evaluate_real import MEASURES

_COLOURS = (plots.BLUE, plots.ORANGE, plots.GREEN, plots.RED, "#6a51a3", "#1c2430")
_STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))
_LABELS = {
    "frechet": "squared Fréchet distance",
    "sliced_wasserstein": "sliced Wasserstein distance (data units)",
    "energy_distance": "energy distance (data units)",
    "precision": "precision",
    "recall": "recall",
    "spread": "within-class variance, ratio to real",
}
_BEST = {"precision": "Most precise", "recall": "Most recalled"}


def distance(found: Evaluation, name: str, width: float = 7.4) -> Any:
    """A distance by NFE, on logarithmic axes, a line for each run, with the floor and its spread."""
    figure, axes = plots.blank(width, 4.3)
    _lines(axes, found, name)
    floor = found.floors[name]
    axes.axhspan(
        max(floor.mean - floor.std, 1e-3 * floor.mean), floor.mean + floor.std, color=plots.GREY, alpha=0.2, lw=0
    )
    axes.axhline(floor.mean, color=plots.GREY, ls=":", label=f"real to real ({floor.mean:.3g} ± {floor.std:.2g})")
    best = min(_having(found, name), key=lambda entry: entry.figures[name].mean)
    short = MEASURES[name].short
    axes.set(yscale="log", ylabel=_LABELS[name])
    _plain(axes.yaxis)
    axes.set_title(f"Closest to the data: {best.title} ({short} {best.figures[name].mean:.3g})")
    axes.legend(fontsize=9)
    return figure


def recognised(found: Evaluation) -> Any:
    """The share recognised as the class asked for, by NFE, beside that of held-out real data."""
    figure, axes = plots.blank(5.4, 3.9)
    _lines(axes, found, "recognised", 100.0)
    if found.accuracy is not None:
        axes.axhline(100.0 * found.accuracy, color=plots.GREY, ls=":", label="held-out real data")
    worst = min(_having(found, "recognised"), key=lambda entry: entry.figures["recognised"].mean)
    share = 100.0 * worst.figures["recognised"].mean
    axes.set(ylabel="recognised as the class asked for (%)", title=f"At least {share:.1f} % are recognised")
    axes.legend(fontsize=9)
    return figure


def spread(found: Evaluation) -> Any:
    """Variance within a class by NFE, as a ratio to the real data's."""
    figure, axes = plots.blank(5.4, 3.9)
    _lines(axes, found, "spread")
    axes.axhline(1.0, color=plots.GREY, ls=":", label="real data")
    entries = _having(found, "spread")
    few = min(entries, key=lambda entry: (entry.nfe, entry.figures["spread"].mean))
    axes.set(ylim=(0, None), ylabel=_LABELS["spread"])
    axes.set_title(f"At {few.nfe} NFE {100 * few.figures['spread'].mean:.0f} % of a class's variety is there")
    axes.legend(fontsize=9)
    return figure


def share(found: Evaluation, name: str) -> Any:
    """Precision or recall by NFE, beside what real data reach against real data."""
    figure, axes = plots.blank(5.4, 3.9)
    _lines(axes, found, name)
    floor = found.floors[name]
    axes.axhspan(floor.mean - floor.std, floor.mean + floor.std, color=plots.GREY, alpha=0.2, lw=0)
    axes.axhline(floor.mean, color=plots.GREY, ls=":", label=f"real to real ({floor.mean:.2f})")
    best = max(_having(found, name), key=lambda entry: entry.figures[name].mean)
    axes.set(ylim=(0, 1.05), ylabel=_LABELS[name])
    axes.set_title(f"{_BEST[name]}: {best.title}, {best.figures[name].mean:.2f}")
    axes.legend(fontsize=9)
    return figure


def cloud(x: Tensor, real: Tensor) -> Any:
    """Points (n, D) over real ones, on the axes of these: the first two coordinates, or a histogram of the only one."""
    figure, axes = plots.panel()
    ends = torch.stack([real.amin(0), real.amax(0)])
    limits = [(float(a - 0.15 * (b - a)), float(b + 0.15 * (b - a))) for a, b in ends.T[:2]]
    if x.shape[1] == 1:
        bins: dict[str, Any] = {"bins": 40, "range": limits[0], "density": True}
        axes.hist(real[:, 0].numpy(), color=plots.GREY, alpha=0.5, label="real", **bins)
        axes.hist(x[:, 0].numpy(), color=plots.BLUE, histtype="step", lw=1.5, label="samples", **bins)
        axes.set(xlim=limits[0], xlabel="value", ylabel="density")
    else:
        axes.scatter(*real[:, :2].T.numpy(), s=3, color=plots.GREY, alpha=0.35, lw=0, label="real", rasterized=True)
        axes.scatter(*x[:, :2].T.numpy(), s=3, color=plots.BLUE, alpha=0.5, lw=0, label="samples", rasterized=True)
        axes.set(xlim=limits[0], ylim=limits[1], xlabel="first coordinate", ylabel="second coordinate")
    return figure


def _having(found: Evaluation, name: str) -> list[Entry]:
    return [entry for entry in found.entries if name in entry.figures]


def _lines(axes: Any, found: Evaluation, name: str, unit: float = 1.0) -> None:
    """A line for each run against NFE, with the std over the seeds as bars; budgets for segments are hollow points."""
    entries = _having(found, name)
    for number, run in enumerate(found.runs):
        style, marker = _STYLES[number % len(_STYLES)]
        look = {"color": _COLOURS[number % len(_COLOURS)], "marker": marker, "ms": 5, "lw": 1.5, "capsize": 3}
        mine = sorted((entry for entry in entries if entry.run == run), key=lambda entry: entry.nfe)
        split = [entry for entry in mine if "+" in entry.steps]
        for some, more in (
            ([entry for entry in mine if "+" not in entry.steps], {"ls": style, "label": run}),
            (split, {"ls": "", "mfc": "white", "label": f"{run}, by segment"}),
        ):
            if some:
                figures = [entry.figures[name] for entry in some]
                bars = [unit * figure.std for figure in figures] if len(figures[0].values) > 1 else None
                values = [unit * figure.mean for figure in figures]
                axes.errorbar([entry.nfe for entry in some], values, yerr=bars, **look, **more)
        for entry in split:
            at = (entry.nfe, unit * entry.figures[name].mean)
            axes.annotate(entry.steps, at, xytext=(-6, 4), textcoords="offset points", fontsize=8.5, ha="right")
    ticks: list[int] = []
    for nfe in sorted({entry.nfe for entry in entries}):
        if not ticks or nfe > 1.3 * ticks[-1]:
            ticks.append(nfe)
    axes.set(xscale="log", xlabel="network evaluations for each sample (NFE)")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()


def _plain(axis: Any) -> None:
    """Numbers as they are written by hand on a logarithmic axis: 0.2, 0.5, 1, 2."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
