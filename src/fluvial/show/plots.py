"""Plots: data in, a matplotlib figure out. Axes are named with units, and the title is what the plot found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

BLUE, ORANGE, GREEN, RED, GREY = "#1f6fb4", "#d9772b", "#3a9668", "#b8405e", "#8a96a3"


def _axes(width: float = 7.4, height: float = 3.9, columns: int = 1) -> tuple[Any, Any]:
    """A figure in the house style, and its axes (one, or an array)."""
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
            "grid.color": "#e6eaee",
            "legend.frameon": False,
        }
    )
    return plt.subplots(1, columns, figsize=(width, height), layout="constrained")


def loss(metrics: Sequence[Mapping[str, Any]]) -> Any:
    """The training loss by step: all of it, and by log-SNR bin."""
    figure, axes = _axes()
    steps = [m["step"] for m in metrics]
    names = list(metrics[-1]["loss_by_log_snr"])
    import matplotlib

    shades = matplotlib.colormaps["viridis"].resampled(len(names) + 1)
    for number, name in enumerate(names):
        points = [(m["step"], m["loss_by_log_snr"].get(name)) for m in metrics]
        points = [(step, value) for step, value in points if value is not None]
        if points:
            axes.plot(*zip(*points), color=shades(number), lw=1.1, label=f"log-SNR {name}")
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
    figure, axes = _axes(height=3.2)
    tail = metrics[-max(1, len(metrics) // 5) :]
    names, values = list(tail[-1]["loss_by_log_snr"]), []
    for name in names:
        known = [m["loss_by_log_snr"][name] for m in tail if m["loss_by_log_snr"].get(name) is not None]
        values.append(sum(known) / len(known) if known else 0.0)
    axes.bar(range(len(names)), values, color=BLUE, width=0.7)
    worst = names[values.index(max(values))]
    axes.set_xticks(range(len(names)), names, rotation=20)
    axes.set(
        xlabel="log-SNR (noise on the left, data on the right)",
        ylabel="mean squared error",
        title=f"Most of the loss is left at log-SNR {worst}",
    )
    axes.grid(axis="x", visible=False)
    return figure


def quality(rows: Sequence[Mapping[str, Any]], floor: float) -> Any:
    """Frechet distance and recognised share by NFE, a line per sampler. rows: sampler, nfe, frechet, recognised."""
    figure, (left, right) = _axes(width=9.6, columns=2)
    colours = dict(zip(dict.fromkeys(r["sampler"] for r in rows), (GREY, BLUE, ORANGE, GREEN, RED)))
    for sampler, colour in colours.items():
        mine = [r for r in rows if r["sampler"] == sampler]
        nfe = [r["nfe"] for r in mine]
        left.plot(nfe, [r["frechet"] for r in mine], "o-", color=colour, label=sampler, ms=4)
        right.plot(nfe, [100 * r["recognised"] for r in mine], "o-", color=colour, label=sampler, ms=4)
    left.axhline(floor, color=GREY, ls=":", label="real against real")
    best = min(rows, key=lambda r: r["frechet"])
    left.set(xscale="log", yscale="log", xlabel="network evaluations (NFE)", ylabel="squared Fréchet distance")
    left.set_title(f"Closest to the data: {best['sampler']} at {best['nfe']} NFE")
    right.set(xscale="log", xlabel="network evaluations (NFE)", ylabel="recognised as the class asked for (%)")
    enough = [r["nfe"] for r in rows if r["recognised"] >= 0.95]
    right.set_title(f"95 % are recognised from {min(enough)} NFE" if enough else "No sampler reaches 95 % recognised")
    for axes in (left, right):
        ticks = sorted({r["nfe"] for r in rows if r["nfe"] in (1, 2, 4, 8, 16, 32, 64)})
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.minorticks_off()
    left.legend(fontsize=9)
    return figure


def gamma_sweep(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Within-class spread and distance against gamma. rows: gamma, spread (ratio to real), frechet, recognised."""
    figure, (left, right) = _axes(width=9.6, height=3.6, columns=2)
    positions = range(len(rows))
    labels = ["0 (ODE)" if r["gamma"] == 0 else f"{r['gamma']:g}" for r in rows]
    left.axhline(1.0, color=GREY, ls=":", label="real digits")
    left.plot(positions, [r["spread"] for r in rows], "o-", color=ORANGE, label="generated digits")
    ode, top = rows[0]["spread"], rows[-1]["spread"]
    change = "narrower" if top < ode else "wider"
    left.set_title(f"From gamma 0 to {rows[-1]['gamma']:g} classes get {abs(1 - top / ode):.0%} {change}")
    left.set(xlabel="Langevin rate gamma", ylabel="within-class variance, ratio to real")
    left.legend(fontsize=9)
    right.plot(positions, [r["frechet"] for r in rows], "o-", color=BLUE)
    best = min(rows, key=lambda r: r["frechet"])
    right.set_title(f"Closest to the data at gamma {best['gamma']:g}")
    right.set(xlabel="Langevin rate gamma", ylabel="squared Fréchet distance")
    for axes in (left, right):
        axes.set_xticks(positions, labels)
    return figure


def trajectories(ode: Any, sde: Any, data: Any, gamma: float) -> Any:
    """Paths of the same noise through an exact 2-D mixture, ODE beside SDE: (steps + 1, B, 2) states, (n, 2) data."""
    figure, panels = _axes(width=9.6, height=4.8, columns=2)
    for axes, states, name, colour in zip(panels, (ode, sde), ("ODE", f"SDE, gamma = {gamma:g}"), (BLUE, ORANGE)):
        axes.scatter(*data.T, s=3, color=GREY, alpha=0.35, lw=0, label="data")
        axes.plot(states[:, :, 0], states[:, :, 1], color=colour, lw=0.7, alpha=0.7)
        axes.scatter(*states[0].T, s=10, color="#1c2430", zorder=3, label="noise (start)")
        axes.scatter(*states[-1].T, s=14, color=RED, zorder=4, label="sample (end)")
        axes.set(aspect="equal", xlabel="first coordinate", ylabel="second coordinate", title=name)
    panels[0].set_title("The ODE's paths are smooth and never cross")
    panels[1].set_title(f"The SDE (gamma {gamma:g}) wanders to the same law")
    panels[0].legend(fontsize=9, loc="upper right")
    return figure
