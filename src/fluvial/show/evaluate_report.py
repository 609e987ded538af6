"""What an evaluation leaves in its folder: the figures as JSON, a sheet for each run and number of steps, the page."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from fluvial import __version__, sheets
from fluvial.model import Normalisation
from fluvial.show import evaluate_plots, page
from fluvial.show.evaluate import Entry, Evaluation
from fluvial.show.evaluate_real import MEASURES
from fluvial.training import atomic

_LARGE = 96  # pixels: larger images stand four in a row, others
_SMALL = 10
_TABLES = {
    "Distances on the features": ("frechet", "kid"),
    "Distances of the numbers": ("sliced_wasserstein", "energy_distance", "mmd"),
    "Fidelity and variety": ("precision", "recall", "density", "coverage"),
    "Classes": ("recognised", "spread"),
}


def write(folder: Path, found: Evaluation, normalisation: Normalisation | None = None) -> Path:
    """`evaluation.json`, `sheets/` and `report.html` in the folder; returns the page.

    Args:
        folder: new, or one that an evaluation wrote.
        found: the evaluation.
        normalisation: the range that images are drawn in; default: each sheet's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = {"fluvial": __version__, **found.record()}
    atomic.write_json(folder / "evaluation.json", record)
    shared = {key: record[key] for key in ("fluvial", "data", "solver", "grid", "guidance", "labels")}
    for entry, figures in zip(found.entries, record["entries"]):
        info = {**shared, "seed": found.shared["seeds"][0], **found.runs[entry.run], **figures}
        picture = sheets.sheet(entry.x, columns=_columns(entry.x), normalisation=normalisation)
        sheets.save(picture, folder / "sheets" / f"{_file(entry)}.png", info)
    low, high = (None, None) if normalisation is None else (normalisation.low, normalisation.high)
    parts = [
        *_opening(found),
        *_distances(found),
        *_cover(found),
        *_table(found),
        *_samples(found, low, high),
        *_how(found),
    ]
    models = ", ".join(f"{run} {told['model']}" for run, told in found.runs.items())
    data = found.shared["data"]["name"]
    title = f"{' and '.join(found.runs) if len(found.runs) < 3 else f'{len(found.runs)} runs'} against {data}"
    return page.write(folder / "report.html", title, parts, f"Made by Fluvial {__version__}; models {models}.")


def _file(entry: Entry) -> str:
    return re.sub(r"[^\w.+-]+", "-", f"{entry.run}-steps-{entry.steps}").strip("-")


def _opening(found: Evaluation) -> Iterator[str]:
    shared, main = found.shared, found.main
    best = min(found.entries, key=lambda entry: entry.figures[main].mean)
    floor = found.floors[main]
    yield page.paragraph(f"{html.escape(found.finding)}.", "lead")
    facts = [
        (f"{best.figures[main].mean:.3g}", f"lowest {MEASURES[main].words} ({best.title})"),
        (f"{floor.mean:.3g} ± {floor.std:.2g}", f"the same for real data against real data, {floor.n} a side"),
    ]
    if found.accuracy is not None and "recognised" in best.figures:
        share, real = best.figures["recognised"].mean, found.accuracy
        facts.append((f"{share:.1%}", f"of its samples are recognised as asked; of held-out real ones {real:.1%}"))
    facts.append((f"{shared['samples']} x {len(shared['seeds'])}", "samples x seeds behind every figure"))
    yield page.facts(facts)


def _distances(found: Evaluation) -> Iterator[str]:
    n = found.floors[found.main].n
    yield page.heading("Distance to the data")
    caption = (
        f"{n} samples to {n} real ones, mean and std over {len(found.shared['seeds'])} seeds. Lower is better, and the "
        "grey band is as low as it gets: real data against other real data, mean and std over random splits."
    )
    yield page.figure(page.svg(evaluate_plots.distance(found, found.main), "distance by NFE"), caption)
    if found.main != "frechet":
        yield page.row(
            [
                page.figure(page.svg(evaluate_plots.distance(found, name, 5.4), f"{MEASURES[name].short} by NFE"))
                for name in ("frechet", "energy_distance")
            ],
            "wide",
        )


def _cover(found: Evaluation) -> Iterator[str]:
    yield page.heading("Fidelity and variety")
    yield page.paragraph(
        "Precision is the share of samples that lie among the real data, recall the share of real data that lie among "
        "the samples. Blurred or broken samples lower the first; missing variety lowers the second."
    )
    pair = [
        page.figure(page.svg(evaluate_plots.share(found, name), f"{name} by NFE")) for name in ("precision", "recall")
    ]
    yield page.row(pair, "wide")
    classes = {"recognised": evaluate_plots.recognised, "spread": evaluate_plots.spread}
    drawn = [
        page.figure(page.svg(draw(found), f"{name} by NFE")) for name, draw in classes.items() if name in found.measured
    ]
    if drawn:
        yield page.row(drawn, "wide")


def _table(found: Evaluation) -> Iterator[str]:
    reference, short = found.reference, MEASURES[found.main].short
    yield page.heading("All figures")
    yield page.paragraph(
        f"Mean ± std over the seeds. “Over floor” is {short} less that of real data; “x reference” divides it by the "
        f"same of {html.escape(reference.run)} at {reference.steps} steps, and is left out where the reference cannot "
        "be told from real data."
    )
    for title, group in sorted(_TABLES.items(), key=lambda item: found.main not in item[1]):
        if names := [name for name in group if name in found.measured]:
            yield page.subheading(title)
            yield page.table(*found.table(names))


def _samples(found: Evaluation, low: float | None, high: float | None) -> Iterator[str]:
    yield page.heading("Samples")
    asked = " and asking for the same classes" if found.shared["labels"] != "none" else ""
    yield page.paragraph(
        f"All from the same noises (seed {found.shared['seeds'][0]}){asked}: what differs is the model and its steps."
    )
    if found.real.ndim == 2:
        clouds = [
            page.figure(
                page.svg(evaluate_plots.cloud(entry.x, found.real), f"samples of {entry.run} at {entry.steps} steps"),
                _caption(found, entry),
            )
            for entry in found.entries
        ]
        yield page.row(clouds)
        yield page.paragraph("Blue: samples. Grey: real data.")
        return
    columns = _columns(found.real)
    yield page.figure(_picture(found.real, columns, low, high, "real samples"), "Real data.")
    if columns == _SMALL and len(found.runs) > 1:
        columns = _SMALL // 2
    for steps in dict.fromkeys(entry.steps for entry in found.entries):
        yield page.subheading(f"{steps} step{'s' if steps != '1' else ''}")
        yield page.row(
            [
                page.figure(
                    _picture(entry.x, columns, low, high, f"samples of {entry.run} at {steps} steps"),
                    _caption(found, entry),
                )
                for entry in found.entries
                if entry.steps == steps
            ],
            "wide",
        )


def _caption(found: Evaluation, entry: Entry) -> str:
    short, figure = MEASURES[found.main].short, entry.figures[found.main]
    return html.escape(f"{entry.run}, {entry.steps} steps: {entry.nfe} NFE, {short} {figure}")


def _picture(x: Tensor, columns: int | None, low: float | None, high: float | None, alt: str) -> str:
    count = 2 * _SMALL if _columns(x) == _SMALL else 4
    return page.image(sheets.sheet(x[:count], columns=columns, low=low, high=high), alt)


def _columns(x: Tensor) -> int | None:
    """Of small images as many in a row as there often are classes; four large ones; two series."""
    if x.ndim == 4:
        return _SMALL if max(x.shape[-2:]) <= _LARGE else 4
    return 2 if x.ndim == 3 else None


def _how(found: Evaluation) -> Iterator[str]:
    shared = found.shared
    rows: list[tuple[str, Any]] = [
        ("data", f"{shared['data']['name']}, {shared['data']['read']:,} of {shared['data']['size']:,} read"),
        ("features", shared["features"]),
        ("samples", f"{shared['samples']} for each of seeds {', '.join(map(str, shared['seeds']))}"),
        ("in distances", f"{shared['compared']['samples']} samples and {shared['compared']['real']} real ones"),
        ("classes asked for", shared["labels"]),
        ("solver", f"{shared['solver']}, grid {shared['grid']}"),
    ]
    if shared["classifier"] not in (None, shared["features"]):
        rows.append(("recognised by", shared["classifier"]))
    if shared["clamped_to"] is not None:
        low, high = shared["clamped_to"]
        rows.append(("clamped", f"samples to {low:g} … {high:g}, the data's range, before anything is measured"))
    if shared["guidance"] is not None:
        rows.append(("guidance", f"{shared['guidance']:g}"))
    rows += [(run, ", ".join(f"{key} {value}" for key, value in told.items())) for run, told in found.runs.items()]
    yield page.heading("How it was measured")
    yield "".join(page.paragraph(f"<b>{html.escape(name)}</b>: {html.escape(str(value))}") for name, value in rows)
    yield page.subheading("The measures")
    words = [f"<b>{MEASURES[name].short}</b>: {html.escape(MEASURES[name].words)}." for name in found.measured]
    yield page.paragraph("<br>".join(words))
    yield page.paragraph("Every figure, seed by seed, is in <code>evaluation.json</code> beside this page.")
