"""A run's own page: what was trained, under which convention, how the loss went, and what it draws."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping
from pathlib import Path

from fluvial import __version__, training
from fluvial.show import page, plots

_HOW_TO_READ = (
    "The gap is how far the student is from its target; the spread is that of what it makes of pure noise in one step, "
    "small at first, where that is a mean, and near 1 in the end. A gap that keeps growing, or a spread that leaves "
    "the band, is a run that fails, whatever its loss says; a gap may step up where a method makes its task harder."
)


def write(folder: str | os.PathLike[str]) -> Path:
    """`report.html` in a run folder, from its `config.json`, `metrics.jsonl` and sheets.

    Raises:
        RunError: for a folder that is not a run.
    """
    from PIL import Image

    folder = Path(folder)
    described = training.describe(folder)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    parts = [
        page.paragraph("What this run is, how its training went, and what its averaged weights draw.", "lead"),
        _facts(described),
    ]
    if metrics:
        parts += [
            page.heading("Loss"),
            page.figure(page.svg(plots.loss(metrics), "training loss by step")),
        ]
        if "gap" in metrics[0]:
            parts.append(page.figure(page.svg(plots.gap_and_spread(metrics), "gap and spread by step"), _HOW_TO_READ))
        parts.append(
            page.figure(
                page.svg(plots.loss_by_log_snr(metrics), "loss by log-SNR"), "Mean of the last fifth of the records."
            )
        )
    pictures = sorted((folder / "sheets").glob("*.png"))
    if pictures:
        parts.append(page.heading("Samples along the way"))
        # The first, some between, and the last.
        chosen = sorted({round(k * (len(pictures) - 1) / 5) for k in range(6)})
        for picture in (pictures[k] for k in chosen):
            with Image.open(picture) as image:
                parts.append(page.figure(page.image(image, picture.stem), html.escape(picture.stem)))
    made = f"Made by Fluvial {__version__}; model {training.model_hash(folder)}."
    return page.write(folder / "report.html", f"Run {folder.name}", parts, made)


def _facts(described: Mapping[str, str]) -> str:
    """What each thing is called, and what it is, in lines that wrap: some are long."""
    style = 'style="white-space: normal; text-align: left; overflow-wrap: anywhere"'
    rows = (f"<tr><td>{html.escape(n)}</td><td {style}>{html.escape(w)}</td></tr>" for n, w in described.items())
    return f"<table><tbody>{''.join(rows)}</tbody></table>"
