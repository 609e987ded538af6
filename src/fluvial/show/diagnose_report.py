"""The report of a diagnosis: the figures, how to read them, and how they were made."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from fluvial.show import diagnose_plots as plots
from fluvial.show import page
from fluvial.show.diagnose import Diagnosis
from fluvial.training import atomic


def write(folder: Path, found: Diagnosis, name: str) -> Path:
    """`diagnosis.json` and `report.html` in the folder."""
    with atomic.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_json(folder / "diagnosis.json", found.record())
    parts = [*_opening(found), *_straightness(found), *_transport(found), *_data(found), *_made(found)]
    made = found.made
    told = ", ".join(f"{key} {made[key]}" for key in ("model", "weights", "fluvial") if key in made)
    return page.write(folder / "report.html", f"Diagnosis of {name}", parts, f"Made by fluvial diagnose: {told}.")


def _opening(found: Diagnosis) -> list[str]:
    own, other = found.own, found.independent
    facts = [
        (_short(found.straightness.mean), "straightness S: 0 is straight, and one Euler step then exact"),
        (
            f"{found.straightness.mean / own.cost['squared'].mean:.1%}",
            "is S of the mean square length of the chords",
        ),
        (
            _short(own.cost["squared"].mean),
            f"squared transport cost per dimension; {_short(other.cost['squared'].mean)} for an independent coupling",
        ),
        (
            f"{own.crossing_depth.mean:.2f}",
            f"depth at which its straight lines cross; {other.crossing_depth.mean:.2f} for an independent coupling",
        ),
    ]
    if found.spread is not None:
        facts.append((f"{found.spread.mean:.2f}", "variance within a class, as a ratio to the data's"))
    made = found.made
    lead = (
        f"{html.escape(found.bends)}. Measured on {made['n'] * len(made['seeds']):,} trajectories of the model's own, "
        f"by {html.escape(made['solver'])} with {made['steps']} steps, over {len(made['seeds'])} seeds."
    )
    return [page.paragraph(lead, "lead"), page.facts(facts)]


def _straightness(found: Diagnosis) -> list[str]:
    caption = f"S = {found.straightness}: mean ± standard deviation over the seeds, as the band."
    if found.irreducible is not None:
        caption += (
            " Beside it the irreducible loss of the data, ± its standard error, which is "
            f"{_short(found.irreducible.total)} in all: how much straight lines between noise and data cross, and the "
            "least velocity loss of a network that has these samples by heart."
        )
    parts = [
        page.heading("Straightness"),
        page.paragraph(
            "S = ∫ E|(Z<sub>1</sub> − Z<sub>0</sub>) − v(Z<sub>t</sub>)|² dt along the trajectories Z, after "
            "conversion to the Rectified path, where straight means one step. It says how far the velocity is from "
            "the trajectory's own chord."
        ),
        page.figure(page.svg(plots.straightness(found), "straightness by time"), caption),
    ]
    if len(found.per_segment) > 1:
        whole = sum(f.mean * (b - a) for f, a, b in zip(found.per_segment, found.segments, found.segments[1:]))
        rows = [
            (f"{a:g} to {b:g}", figure, f"{figure.mean * (b - a) / whole:.0%}" if whole else "")
            for figure, a, b in zip(found.per_segment, found.segments, found.segments[1:])
        ]
        parts += [
            page.subheading("By segment"),
            page.table(["segment", "S of the segment", "share of the sum"], [*rows]),
            page.paragraph(
                "Each segment against its own chord: 0 where one Euler step crosses it exactly. Weighted by length "
                f"they sum to {_short(whole)}, against {_short(found.straightness.mean)} for the single chord."
            ),
        ]
    return [
        *parts,
        page.figure(
            page.svg(plots.curvature(found), "curvature by time"),
            "Root mean square over dimensions, mean over trajectories: an Euler step of length h is off by h²/2 times "
            "this, before that error grows or shrinks on the way.",
        ),
        page.figure(
            page.svg(plots.samples(found), "straightness of single trajectories"), "All trajectories of all seeds."
        ),
    ]


def _transport(found: Diagnosis) -> list[str]:
    own, other = found.own, found.independent
    rows = [
        ("squared cost per dimension", own.cost["squared"], other.cost["squared"]),
        ("absolute cost per dimension", own.cost["absolute"], other.cost["absolute"]),
        ("crossing: share of pairs", own.crossing_share, other.crossing_share),
        ("crossing: depth", own.crossing_depth, other.crossing_depth),
    ]
    parts = [
        page.heading("Transport and crossing"),
        page.paragraph(
            "The model pairs each noise with the sample it becomes. Beside it the same noise with other samples: what "
            "an independent coupling of the same ends costs, and how much its straight lines cross. The less the "
            "model's own lines cross, the less a reflow on its pairs has left to straighten."
        ),
        page.table(["", "the model's pairs", "independent"], rows),
    ]
    if found.made["guidance"] is not None:
        return parts
    implied = found.saved - found.straightness.mean
    told = (
        f"The model's pairs save {_short(found.saved)} of the squared cost. For the exact model of any law that is "
        f"S + V, V its irreducible loss: so V is {_short(implied)} for what this model has learned."
    )
    if found.irreducible is not None:
        told += (
            f" For the data, taken for all there is, it is {_short(found.irreducible.total)}: a model that has them by "
            "heart comes down to this, one that generalises stays above, the more so the fewer they are."
        )
    return [*parts, page.paragraph(told)]


def _data(found: Diagnosis) -> list[str]:
    parts = []
    if found.drift is not None:
        drift, shares = found.drift, found.drift_shares
        parts += [
            page.heading("Marginal drift"),
            page.paragraph(
                "At every noise level an exact sampler has the law of α·data + σ·noise. The floor is that law to "
                "itself, on two disjoint halves of the data with noise of their own: what a perfect sampler would "
                "measure. Above it the states have left the path, by the network's error or the solver's, there or "
                "earlier."
            ),
            page.row(
                [
                    page.figure(page.svg(plots.drift(drift, shares, name), f"{name} distance by noise level"))
                    for name in ("sliced Wasserstein", "energy")
                ],
                "wide",
            ),
            page.paragraph(
                f"{drift.n} states on each side, mean ± standard deviation of {drift.repeats} splits, each with "
                f"another seed of the sampler; on the model's own path, {drift.nfe} NFE, in path units."
                + (" Guidance draws the states away from this law on purpose." if found.made["guidance"] else "")
            ),
        ]
    if found.spread is not None:
        parts += [
            page.heading("Variance within a class"),
            page.paragraph(
                f"{found.spread} of the data's. Below 1 samples crowd around the middle of their class, above 1 they "
                "scatter beyond it."
            ),
        ]
    if found.omitted:
        parts.append(page.heading("What was left out"))
        parts += [page.paragraph(html.escape(line[:1].upper() + line[1:]) + ".") for line in found.omitted]
    return parts


def _made(found: Diagnosis) -> list[str]:
    rows = [(key, _told(value)) for key, value in found.made.items() if value is not None]
    return [page.heading("How it was made"), page.table(["", ""], rows), page.paragraph("All figures: diagnosis.json.")]


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {part}" for key, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _short(value: float) -> str:
    return f"{value:.3g}"
