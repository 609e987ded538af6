"""A comparison as a picture: a small sheet for each setting, with its measures and its cost below it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import torch
from torch import Tensor

from fluvial import sheets
from fluvial.show import plots
from fluvial.show.compare import SHORT, Cell, Comparison
from fluvial.show.settings import spelled

_TILE, _CELL, _AREA, _LARGEST = 48, 250, 250 * 200, 320  # pixels: of a small image, a cell of them, a large image
_GAP, _LINE, _NARROWEST = 16, 19, 640
_INK, _QUIET = (28, 36, 48), (96, 106, 118)
_NAMES = ("solver", "grid", "path")  # options whose values say which option they are of


def draw(comparison: Comparison) -> Any:
    """The sheet, a PIL image: the first option's values down, the second's across, and above what it shows."""
    from PIL import Image, ImageDraw, ImageFont

    large, small = ImageFont.load_default(17), ImageFont.load_default(14)
    pictures = _pictures(comparison)
    down, across = [*_titles(comparison), [""]][:2]
    width, height = pictures[0].size
    captions = [_caption(cell, comparison.shown) for cell in comparison.cells]
    longest = max(small.getlength(line) for lines in captions for line in lines)
    pitch = max(width, math.ceil(longest)) + _GAP, height + len(captions[0]) * _LINE + 6 + _GAP
    left = math.ceil(max(small.getlength(title) for title in down)) + 2 * _GAP
    whole = max(left + len(across) * pitch[0], _NARROWEST)
    header = [line for text in _header(comparison) for line in _wrapped(text, small, whole - 2 * _GAP)]
    finding = _wrapped(comparison.finding, large, whole - 2 * _GAP)
    top = _GAP + 24 * len(finding) + _LINE * len(header) + _GAP + (_LINE + 4 if any(across) else 0)
    canvas = Image.new("RGB", (whole, top + len(down) * pitch[1]), (255, 255, 255))
    pen = ImageDraw.Draw(canvas)
    for number, line in enumerate(finding):
        pen.text((_GAP, _GAP + 24 * number), line, fill=_INK, font=large)
    for number, line in enumerate(header):
        pen.text((_GAP, _GAP + 24 * len(finding) + _LINE * number), line, fill=_QUIET, font=small)
    for column, title in enumerate(across):
        pen.text((left + column * pitch[0] + width // 2, top - 6), title, fill=_INK, font=small, anchor="ms")
    for row, title in enumerate(down):
        pen.text((left - _GAP, top + row * pitch[1] + height // 2), title, fill=_INK, font=small, anchor="rm")
    for number, (picture, lines) in enumerate(zip(pictures, captions)):
        row, column = divmod(number, len(across))
        x, y = left + column * pitch[0], top + row * pitch[1]
        canvas.paste(picture, (x, y))
        for index, line in enumerate(lines):
            ink = _QUIET if index else _INK
            pen.text((x + 2, y + height + 4 + index * _LINE), line, fill=ink, font=small)
    return canvas


def _titles(comparison: Comparison) -> list[list[str]]:
    """For each option, its values as titles."""
    return [
        [value if option in _NAMES else f"{option} {value}" for value in values]
        for option, values in comparison.axes.items()
    ]


def _caption(cell: Cell, shown: Sequence[str]) -> list[str]:
    measures = "   ".join(f"{SHORT[name]} {cell.values[name]:.3g}" for name in shown)
    return [measures, f"{cell.drawn.nfe} NFE   {cell.milliseconds:.3g} ms"]


def _header(comparison: Comparison) -> list[str]:
    """What is the same everywhere, and what the captions mean."""
    first, start = comparison.cells[0].setting, comparison.start
    fixed = {
        "solver": spelled(first.solver),
        "steps": f"{first.steps} steps",
        "grid": f"grid {first.times or 'uniform'}",
        "guidance": first.guidance and f"guidance {first.guidance:g}",
        "path": f"path {first.view(comparison.model).path}",
    }
    same = [str(value) for option, value in fixed.items() if value and option not in comparison.axes]
    if "nfe" in comparison.axes:
        same.remove(fixed["steps"])
    said = [f"{SHORT[name]}: {comparison.said[name]}." for name in comparison.shown]
    return [
        f"The same {start.n} start noises in every cell (seed {start.seed}); {', '.join(same)}.",
        *said,
        f"NFE: network calls for each sample. ms: time for each sample, in a batch of {start.n}.",
    ]


def _wrapped(text: str, font: Any, width: float) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines[-1:] = [longer] if font.getlength(longer) <= width else [lines[-1], word]
    return [line for line in lines if line]


# Cells.


def _pictures(comparison: Comparison) -> list[Any]:
    """One of each cell, all of one size and drawn on one scale."""
    samples = [cell.drawn.x.detach().cpu() for cell in comparison.cells]
    if samples[0].ndim == 2:
        return _plots(samples)
    n = comparison.model.normalisation
    low = float(min(x.min() for x in samples)) if n.low is None else n.low
    high = float(max(x.max() for x in samples)) if n.high is None else n.high
    wide = _CELL if len(comparison.axes) == 2 else 2 * _CELL
    return [_sheet(x, wide, low, high) for x in samples]


def _sheet(x: Tensor, wide: int, low: float, high: float) -> Any:
    """The first samples, as many as fit; a large image alone, made smaller."""
    if x.ndim == 3:
        return sheets.sheet(x[:3], columns=1, low=low, high=high)
    side = max(x.shape[-2:])
    scale = max(1, round(_TILE / side))
    columns, rows = (max(1, length // (side * scale)) for length in (wide, _AREA // wide))
    picture = sheets.sheet(x[: columns * rows], columns=columns, scale=scale, low=low, high=high)
    if side > _LARGEST:
        picture.thumbnail((_LARGEST, _LARGEST))
    return picture


def _plots(samples: Sequence[Tensor]) -> list[Any]:
    """Points (n, D) by their first two coordinates, or a histogram of the only one; the same axes in all."""
    import matplotlib.pyplot as plt
    from PIL import Image

    every = torch.cat(list(samples))[:, :2]
    low, high = every.amin(0).tolist(), every.amax(0).tolist()
    pad = [0.05 * (b - a) or 1.0 for a, b in zip(low, high)]
    limits = [(a - p, b + p) for a, b, p in zip(low, high, pad)]
    pictures = []
    for x in samples:
        figure, axes = plots.panel()
        if x.shape[1] == 1:
            axes.hist(x[:, 0].numpy(), bins=40, range=limits[0], color=plots.BLUE)
            axes.set(xlim=limits[0], xlabel="value", ylabel="samples")
        else:
            axes.scatter(*x[:, :2].T.numpy(), s=5, color=plots.BLUE, alpha=0.6, lw=0)
            axes.set(xlim=limits[0], ylim=limits[1], xlabel="first coordinate", ylabel="second coordinate")
        buffer = BytesIO()
        figure.savefig(buffer, format="png", dpi=100)
        plt.close(figure)
        with Image.open(buffer) as image:
            pictures.append(image.convert("RGB"))
    return pictures
