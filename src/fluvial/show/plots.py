"""Plots: data in, a matplotlib figure out. Axes are named with units, and the title is what the plot found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

BLUE, ORANGE, GREEN, RED, GREY = "#1f6fb4", "#d9772b", "#3a9668", "#b8405e", "#8a96a3"


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
    """The training loss by step: all of it, and by log-SNR bin."""
    figure, axes = blank()
    steps = [m["step"] for m in metrics]
    names = list(metrics[-1]["loss_by_log_snr"])
    import matplotlib

    shades = matplotlib.colormaps["viridis"].resampled(len(names) + 1)
    for number, name in enumerate(names):
        points = [(m["step"], m["loss_by_log_snr"].get(name)) for m in metrics]
        points = [(step, value) for step, value in points if value is not None]
        if points:
            axes.plot(*zip(*points), color=shades(number), lw=1.1, label=f"log-SNR {_range(name)}")
    axes.plot(steps, [m["loss"] for m in metrics], color="#1c2430", lw=2.2, label="all")
    first, last = metrics[0]["loss"], metrics[-1]["loss"]
    axes.set(
        yscale="log",
        xlabel="training step",
        ylabel="mean squared error of the target",
        title=f"Loss fell from {first:.3g} to {last:.3g}",
    )
    axes.legend(fontsize=8.5, ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def loss_by_log_snr(metrics: Sequence[Mapping[str, Any]]) -> Any:
    """Where the remaining loss sits: the mean of the last records, per log-SNR bin."""
    figure, axes = blank(height=3.2)
    tail = metrics[-max(1, len(metrics) // 5) :]
    names, values = list(tail[-1]["loss_by_log_snr"]), []
    for name in names:
        known = [m["loss_by_log_snr"][name] for m in tail if m["loss_by_log_snr"].get(name) is not None]
        values.append(sum(known) / len(known) if known else 0.0)
    axes.bar(range(len(names)), values, color=BLUE, width=0.7)
    worst = names[values.index(max(values))]
    axes.set_xticks(range(len(names)), [_range(name) for name in names], rotation=20)
    axes.set(
        xlabel="log-SNR (noise on the left, data on the right)",
        ylabel="mean squared error",
        title=f"Most of the loss is left at log-SNR {_range(worst)}",
    )
    axes.grid(axis="x", visible=False)
    return figure


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
