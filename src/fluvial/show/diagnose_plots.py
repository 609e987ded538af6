"""The plots of a diagnosis. Each says in its title what it shows."""

from __future__ import annotations

import statistics
from typing import Any

from fluvial.measure import Drift, Irreducible
from fluvial.measure.drift import Curve
from fluvial.show.diagnose import Diagnosis
from fluvial.show.plots import BLUE, GREEN, GREY, ORANGE, RED, blank


def straightness(found: Diagnosis) -> Any:
    """E|chord - velocity|² along the time, with the irreducible loss of the data beside it."""
    figure, axes = blank()
    means = [f.mean for f in found.per_t]
    middles = [(a + b) / 2 for a, b in zip(found.times, found.times[1:])]
    low, high = ([f.mean + sign * f.std for f in found.per_t] for sign in (-1, 1))
    axes.fill_between(middles, low, high, color=BLUE, alpha=0.2, lw=0)
    axes.plot(middles, means, color=BLUE, lw=2, label="chord − velocity: what straightening can remove")
    if found.irreducible is not None:
        _irreducible(axes, found.irreducible)
    worst = middles[means.index(max(means))]
    title = "Nowhere far from the chord" if found.straight else f"Furthest from the chord at t = {worst:.2f}"
    axes.set(xlim=(0, 1), ylim=(0, None), xlabel="time t (0 noise, 1 data)", title=title)
    axes.set_ylabel("mean square per dimension\n(path units²)")
    axes.legend(fontsize=9)
    return figure


def _irreducible(axes: Any, found: Irreducible) -> None:
    low, high = ([m + sign * e for m, e in zip(found.per_t, found.per_t_error)] for sign in (-1, 1))
    axes.fill_between(found.times, low, high, color=ORANGE, alpha=0.2, lw=0)
    axes.plot(found.times, found.per_t, color=ORANGE, lw=2, label="irreducible loss of the data")


def curvature(found: Diagnosis) -> Any:
    """E|dv/dt| along the time, with the split it suggests."""
    figure, axes = blank(height=3.5)
    inner = found.times[1:-1]
    low, high = ([f.mean + sign * f.std for f in found.curvature] for sign in (-1, 1))
    axes.fill_between(inner, low, high, color=BLUE, alpha=0.2, lw=0)
    axes.plot(inner, [f.mean for f in found.curvature], color=BLUE, lw=2, label="curvature")
    if found.straight:
        title = "No bending to speak of"
    else:
        axes.axvline(found.split[1], color=RED, ls="--", lw=1.3, label="half of the bending on either side")
        title = f"Half of the bending is before t = {found.split[1]:.2f}"
    for k, node in enumerate(found.segments[1:-1]):
        axes.axvline(node, color=GREY, ls=":", lw=1.3, label=None if k else "segments as measured")
    axes.set(xlim=(0, 1), ylim=(0, None), xlabel="time t (0 noise, 1 data)", ylabel="E |dv/dt| (path units)")
    axes.set_title(title)
    axes.legend(fontsize=9)
    return figure


def samples(found: Diagnosis) -> Any:
    """How the trajectories differ."""
    figure, axes = blank(height=3.2)
    axes.hist(found.per_sample, bins=40, color=BLUE)
    median = statistics.median(found.per_sample)
    last = statistics.quantiles(found.per_sample, n=10)[-1]
    axes.axvline(median, color=RED, ls="--", lw=1.3, label="median")
    ratio = f", {last / median:.1f} times the median" if median > 0 else ""
    axes.set(xlabel="∫ |chord − velocity|² dt of one trajectory (path units²)", ylabel="trajectories")
    axes.set(xlim=(0, None), title=f"One in ten is above {last:.3g}{ratio}")
    axes.legend(fontsize=9)
    return figure


def drift(found: Drift, shares: list[float], name: str) -> Any:
    """A distance to the forward process by noise level, beside its floor."""
    figure, axes = blank(5.4, 3.9)
    own, floor = (found.energy, found.energy_floor) if name == "energy" else (
        found.sliced_wasserstein, found.sliced_wasserstein_floor
    )  # fmt: skip
    for curve, colour, label in ((floor, GREY, "floor: the forward process to itself"), (own, GREEN, "the sampler")):
        axes.errorbar(shares, curve.mean, curve.std, color=colour, marker="o", ms=4, lw=1.6, capsize=2.5, label=label)
    axes.set(xlim=(-0.02, 1.02), ylim=(0, None), xlabel="share of data α/(α + σ): 0 noise, 1 data")
    axes.set_ylabel("energy distance" if name == "energy" else "sliced Wasserstein distance")
    axes.set_title(above(own, floor, shares))
    axes.legend(fontsize=9)
    return figure


def above(own: Curve, floor: Curve, shares: list[float]) -> str:
    """Where a distance is most above its floor, by more than twice the scatter of both."""
    ratios = {
        share: a / b
        for share, a, s, b, e in zip(shares, own.mean, own.std, floor.mean, floor.std)
        if a - b > 2.0 * (s**2 + e**2) ** 0.5 and b > 0.0
    }
    if not ratios:
        return "At the floor throughout"
    worst = max(ratios, key=lambda share: ratios[share])
    return f"{ratios[worst]:.1f} times the floor at a share of {worst:.2g}"
