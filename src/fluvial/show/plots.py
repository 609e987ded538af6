"""Plots: data in, a matplotlib figure out. Axes are named with units, and the title is what the plot found."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

BLUE, ORANGE, GREEN, RED, GREY = "#1f6fb4", "#d9772b", "#3a9668", "#b8405e", "#8a96a3"

# The spread of what a student makes of noise, in units of the data's: one that has left this fails.
HEALTHY = (0.5, 2.0)


def blank(width: float = 7.4, height: float = 3.9) -> tuple[Any, Any]:
    """A figure in the house style, and its axes."""
    import matplotlib

    matplotlib.use("agg", force=False)
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            "font.sans-serif": ["Helvetica Neue", "Arial", "DejaVu Sans"],
            "font.size": 10.5,
            "axes.titlesize": 11.5,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.titlepad": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": GREY,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e6eaee",
            "legend.frameon": False,
        }
    )
    return plt.subplots(figsize=(width, height), layout="constrained")


def panel() -> tuple[Any, Any]:
    """A small figure among others, and its axes."""
    figure, axes = blank(2.9, 2.6)
    axes.tick_params(labelsize=8)
    axes.xaxis.label.set_size(8.5)
    axes.yaxis.label.set_size(8.5)
    return figure, axes


def loss(metrics: Sequence[Mapping[str, Any]]) -> Any:
    """The training loss by step: all of it, and by log-SNR bin; on a logarithmic axis where it spans much."""
    import matplotlib

    figure, axes = blank()
    names, steps, whole = _bins(metrics), [m["step"] for m in metrics], [m["loss"] for m in metrics]
    shades, shown = matplotlib.colormaps["viridis"].resampled(len(names) + 1), list(whole)
    for number, name in enumerate(names):
        points = [(m["step"], m["loss_by_log_snr"].get(name)) for m in metrics]
        points = [(step, value) for step, value in points if value is not None]
        shown += [value for _, value in points]
        axes.plot(*zip(*points), color=shades(number), lw=1.1, label=f"log-SNR {_range(name)}", **_dots(points))
    axes.plot(steps, whole, color="#1c2430", lw=2.2, label="all", **_dots(steps))
    axes.set(xlabel="training step", ylabel="training loss (mean over samples)", title=f"Loss {_change(whole)}")
    if min(shown) > 0.0 and max(shown) > 5.0 * min(shown):
        _log_scale(axes, shown)
    else:
        axes.set_ylim(0, None)
    axes.legend(fontsize=8.5, ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def loss_by_log_snr(metrics: Sequence[Mapping[str, Any]]) -> Any:
    """Where the remaining loss sits: the mean of the last records, per log-SNR bin."""
    figure, axes = blank(height=3.2)
    tail = metrics[-max(1, len(metrics) // 5) :]
    names, values = _bins(tail), []
    for name in names:
        known = [m["loss_by_log_snr"][name] for m in tail if m["loss_by_log_snr"].get(name) is not None]
        values.append(sum(known) / len(known) if known else 0.0)
    axes.bar(range(len(names)), values, color=BLUE, width=0.7)
    worst = names[values.index(max(values))]
    axes.set_xticks(range(len(names)), [_range(name) for name in names], rotation=20)
    axes.set(
        xlabel="log-SNR (noise on the left, data on the right)",
        ylabel="training loss",
        title=f"Most of the loss is left at log-SNR {_range(worst)}",
    )
    axes.grid(axis="x", visible=False)
    return figure


def gap_and_spread(metrics: Sequence[Mapping[str, Any]]) -> Any:
    """What a distillation watches: the student's distance to its target, and the spread of what it makes of noise."""
    figure, axes = blank(height=3.4)
    steps = [m["step"] for m in metrics]
    axes.axhspan(*HEALTHY, color=GREEN, alpha=0.10, lw=0, label="healthy spread")
    axes.axhline(1.0, color=GREY, ls=":", label="spread of the data")
    for name, colour in (("spread", GREEN), ("gap", ORANGE)):
        # What is not a number, or 0, has no place on a logarithmic axis; the title says so.
        values = [m[name] if 0.0 < m[name] < math.inf else math.nan for m in metrics]
        axes.plot(steps, values, color=colour, lw=1.8, label=name, **_dots(steps))
    _log_scale(axes, [value for m in metrics for value in (m["gap"], m["spread"], *HEALTHY) if 0.0 < value < math.inf])
    axes.set(xlabel="training step", ylabel="standard deviations of the data")
    axes.set_title(watched_finding(metrics))
    axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def watched_finding(metrics: Sequence[Mapping[str, Any]]) -> str:
    """In one line: when the run began to fail, or how it went.

    A student starts from its teacher, whose one step makes means: a spread that is small at first may yet rise.
    """
    (low, high), grown = HEALTHY, False
    for m in metrics:
        if not (math.isfinite(m["gap"]) and math.isfinite(m["spread"])):
            return f"This run fails: no number is left at step {m['step']}"
        for name in ("spread", "gap"):
            if m[name] > high or (name == "spread" and grown and m[name] < low):
                return f"This run fails: the {name} is {m[name]:.2g} at step {m['step']}"
        grown = grown or m["spread"] >= low
    return f"The gap {_change([m['gap'] for m in metrics])}; the spread is {metrics[-1]['spread']:.2f}"


def _change(values: Sequence[float]) -> str:
    first, last = values[0], values[-1]
    if len(values) == 1:
        return f"is {first:.3g} after the first record"
    if abs(last - first) <= 0.1 * abs(first):
        return f"stayed at about {last:.2g}"
    return f"{'fell' if last < first else 'rose'} from {first:.3g} to {last:.3g}"


def _dots(points: Sequence[Any]) -> dict[str, str]:
    """A line through one point alone would not be seen."""
    return {"marker": "o"} if len(points) == 1 else {}


def _log_scale(axes: Any, shown: Sequence[float]) -> None:
    """A logarithmic axis whose numbers are written out, also between powers of ten where there are few of those."""
    few = max(shown) < 30.0 * min(shown)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if few and f"{value:e}"[0] in "235" else "")


def _bins(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """The log-SNR bins that any of the records has, from noise to data."""
    names = {name for m in metrics for name in m["loss_by_log_snr"]}
    return sorted(names, key=lambda name: float(name.split("..")[0] or "-inf"))


def _range(name: str) -> str:
    """A bin of the metrics, "-8..-6", in words."""
    low, high = name.split("..")
    return f"{low} to {high}" if low and high else f"below {high}" if high else f"above {low}"


def frechet(rows: Sequence[Mapping[str, Any]], floor: float) -> Any:
    """Frechet distance by NFE, a line per sampler. rows: sampler, nfe, frechet."""
    figure, axes = _by_nfe(rows, lambda r: r["frechet"])
    axes.axhline(floor, color=GREY, ls=":", label="real to real")
    best = min(rows, key=lambda r: r["frechet"])
    axes.set(yscale="log", ylabel="squared Fréchet distance")
    axes.set_title(f"Closest to the data: {best['sampler']}, {best['nfe']} NFE")
    axes.legend(fontsize=9)
    return figure


def recognised(rows: Sequence[Mapping[str, Any]]) -> Any:
    """The share recognised as the class asked for, by NFE. rows: sampler, nfe, recognised."""
    figure, axes = _by_nfe(rows, lambda r: 100 * r["recognised"])
    least = min(r["recognised"] for r in rows)
    axes.set(
        ylabel="recognised as the class asked for (%)", title=f"At least {100 * least:.1f} % are recognised throughout"
    )
    return figure


def spread(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Within-class variance by NFE, as a ratio to the real data's. rows: sampler, nfe, spread."""
    figure, axes = _by_nfe(rows, lambda r: r["spread"])
    axes.axhline(1.0, color=GREY, ls=":", label="real digits")
    few = min(rows, key=lambda r: r["nfe"])
    axes.set(ylim=(0, None), ylabel="within-class variance, ratio to real")
    axes.set_title(f"At {few['nfe']} NFE only {100 * few['spread']:.0f} % of a class's variety is there")
    axes.legend(fontsize=9)
    return figure


def _by_nfe(rows: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float]) -> tuple[Any, Any]:
    """A line per sampler against NFE."""
    figure, axes = blank(5.4, 4.0)
    for sampler, colour in zip(dict.fromkeys(r["sampler"] for r in rows), (GREY, BLUE, ORANGE, GREEN, RED)):
        mine = [r for r in rows if r["sampler"] == sampler]
        axes.plot([r["nfe"] for r in mine], [value(r) for r in mine], "o-", color=colour, label=sampler, ms=4)
    axes.set(xscale="log", xlabel="network evaluations (NFE)")
    ticks = sorted({r["nfe"] for r in rows if r["nfe"] in (1, 2, 4, 8, 16, 32, 64)})
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    return figure, axes


def gamma_spread(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Within-class variance by Langevin rate. rows: gamma, spread (ratio to real)."""
    figure, axes = _by_gamma(rows, "spread", ORANGE)
    axes.axhline(1.0, color=GREY, ls=":", label="real digits")
    change = rows[-1]["spread"] / rows[0]["spread"] - 1
    axes.set(ylim=(0, None), ylabel="within-class variance, ratio to real")
    axes.set_title(f"From gamma 0 to {rows[-1]['gamma']:g} it changes by {change:+.0%}")
    axes.legend(fontsize=9, loc="lower right")
    return figure


def gamma_frechet(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Frechet distance by Langevin rate. rows: gamma, frechet."""
    figure, axes = _by_gamma(rows, "frechet", BLUE)
    best = min(rows, key=lambda r: r["frechet"])
    axes.set(ylim=(0, None), ylabel="squared Fréchet distance", title=f"Closest to the data at gamma {best['gamma']:g}")
    return figure


def _by_gamma(rows: Sequence[Mapping[str, Any]], key: str, colour: str) -> tuple[Any, Any]:
    figure, axes = blank(5.4, 3.6)
    axes.plot(range(len(rows)), [r[key] for r in rows], "o-", color=colour, label="generated digits")
    axes.set_xticks(range(len(rows)), ["0 (ODE)" if r["gamma"] == 0 else f"{r['gamma']:g}" for r in rows])
    axes.set_xlabel("Langevin rate gamma")
    return figure, axes


def trajectories(states: Any, data: Any, colour: str, title: str) -> Any:
    """Paths of noise through an exact 2-D mixture: (steps + 1, B, 2) states, (n, 2) data."""
    figure, axes = blank(5.4, 5.2)
    axes.scatter(*data.T, s=3, color=GREY, alpha=0.35, lw=0, label="data")
    axes.plot(states[:, :, 0], states[:, :, 1], color=colour, lw=0.7, alpha=0.7)
    axes.scatter(*states[0].T, s=10, color="#1c2430", zorder=3, label="noise (start)")
    axes.scatter(*states[-1].T, s=14, color=RED, zorder=4, label="sample (end)")
    axes.set(aspect="equal", xlim=(-3.6, 3.6), ylim=(-3.4, 3.8), title=title)
    axes.set(xlabel="first coordinate", ylabel="second coordinate")
    axes.legend(fontsize=8.5, loc="upper right")
    return figure
