"""Sheets of samples as PNG, with Pillow alone: images in a grid, points as a scatter, series as small curves.

A sheet shows the numbers as they are: nothing is smoothed, small images are enlarged by repeating their pixels. The
file says how its samples were made, in a PNG text chunk called "fluvial".
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn import functional as F

from fluvial.errors import DataError, OptionError, ShapeError
from fluvial.model import Normalisation

CHUNK = "fluvial"

_PAPER, _INK, _FAINT = (255, 255, 255), (40, 44, 52), (226, 229, 234)
_DOT = (28, 92, 168)
_SIDE = 560  # of the square canvas for points


def sheet(
    images: Tensor,
    columns: int | None = None,
    scale: int | None = None,
    normalisation: Normalisation | None = None,
    low: float | None = None,
    high: float | None = None,
    labels: Sequence[str] | None = None,
) -> Image.Image:
    """One picture of many samples, in the data's own units.

    Args:
        images: images (n, C, H, W): 3 channels are RGB, of any other number the first is shown in grey; or points
            (n, D), of which the first two coordinates are drawn, one against its frequency; or series (n, C, L).
        columns: how many samples in a row; default: a sheet about as high as wide.
        scale: screen pixels per image pixel; default: as many as make an image about 64 wide, at least 1.
        normalisation: the measured range to draw, if `low` and `high` are not given.
        low: drawn black; default: the smallest number here.
        high: drawn white; default: the largest number here.
        labels: a title for each row of the grid.

    Raises:
        ShapeError: for a shape that is none of these.
        OptionError: for labels that are not one per row, or a columns or scale below 1.
    """
    if images.ndim not in (2, 3, 4) or images.numel() == 0:
        raise ShapeError(
            f"a sheet is drawn of images (n, C, H, W), points (n, D) or series (n, C, L), not {tuple(images.shape)}"
        )
    if (columns is not None and columns < 1) or (scale is not None and scale < 1):
        raise OptionError(f"columns is {columns}, scale is {scale}; expected whole numbers from 1")
    samples = images.detach().to("cpu", torch.float64)
    if samples.ndim == 2:
        return _scatter(samples) if samples.shape[1] > 1 else _histogram(samples[:, 0])
    if low is None:
        low = normalisation.low if normalisation else None
    if high is None:
        high = normalisation.high if normalisation else None
    finite = samples[samples.isfinite()]
    low = low if low is not None else float(finite.min()) if len(finite) else 0.0
    high = high if high is not None else float(finite.max()) if len(finite) else 1.0
    # What is not a number is drawn at the low end: the numbers beside it are still worth seeing.
    unit = ((samples.nan_to_num(nan=low) - low) / ((high - low) or 1.0)).clamp(0, 1)
    tiles = _curves(unit, scale) if samples.ndim == 3 else _pixels(unit, scale)
    return _grid(tiles, columns or _columns(len(tiles), tiles[0].width, tiles[0].height), labels)


def beside(pictures: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    """Sheets side by side, each under its title."""
    gap = 16
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    # To be read on a page, into whose width the whole is shrunk.
    size = max(16, width // 56)
    above, font = size + 12, _font(size)
    canvas = Image.new("RGB", (width, above + max(picture.height for picture in pictures)), _PAPER)
    draw, left = ImageDraw.Draw(canvas), 0
    for picture, title in zip(pictures, titles):
        draw.text((left + picture.width / 2, above / 2), title, fill=_INK, font=font, anchor="mm")
        canvas.paste(picture, (left, above))
        left += picture.width + gap
    return canvas


def save(image: Image.Image, path: str | os.PathLike[str], info: dict[str, Any]) -> Path:
    """Writes a PNG, whole or not at all, with `info` (JSON-able: how its samples were made) inside it."""
    path = Path(path)
    text = PngInfo()
    text.add_text(CHUNK, json.dumps(info))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        image.save(unfinished, format="PNG", pnginfo=text, optimize=True)
        os.replace(unfinished, path)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
    return path


def read_info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """How the samples of this PNG were made: what `save` was given.

    Raises:
        DataError: for a file that is no PNG, or says nothing of itself.
    """
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {}).get(CHUNK)
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise DataError(f"{path} cannot be read as a PNG: {error}") from error
    if text is None:
        raise DataError(f"{path} does not say how it was made: it has no {CHUNK!r} text")
    return json.loads(text)


def _columns(count: int, width: int, height: int) -> int:
    """A grid about as wide as it is high, of full rows where the count allows it."""
    ideal = max(1.0, math.sqrt(count * height / width))
    near = range(min(count, math.ceil(ideal * 1.6)), max(1, math.ceil(ideal * 0.7)) - 1, -1)
    # Ten classes and the like read best in full rows; otherwise as square as can be.
    return min(near, key=lambda n: (count % n != 0, abs(math.log(n / ideal))), default=1)


def _pixels(unit: Tensor, scale: int | None) -> list[Image.Image]:
    """Images (n, C, H, W) in 0 … 1 -> RGB tiles, each pixel repeated."""
    height, width = unit.shape[-2:]
    scale = scale or max(1, round(64 / max(height, width)))
    shown = unit if unit.shape[1] == 3 else unit[:, :1].expand(-1, 3, -1, -1)
    levels = (shown * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    size = width * scale, height * scale
    return [Image.fromarray(tile.numpy()).resize(size, Image.Resampling.NEAREST) for tile in levels]


def _curves(unit: Tensor, scale: int | None) -> list[Image.Image]:
    """Series (n, C, L) in 0 … 1 -> tiles with a curve per channel."""
    scale = scale or 1
    width, height = 144 * scale, 72 * scale
    colours = [_DOT, (200, 86, 40), (60, 140, 84), (128, 84, 160)]
    tiles = []
    for sample in unit:
        tile = Image.new("RGB", (2 * width, 2 * height), (247, 248, 250))
        draw = ImageDraw.Draw(tile)
        across = torch.linspace(8, 2 * width - 8, sample.shape[1]).tolist()
        for channel, curve in enumerate(sample):
            down = (8 + (1 - curve) * (2 * height - 16)).tolist()
            draw.line(list(zip(across, down)), fill=colours[channel % len(colours)], width=3 * scale, joint="curve")
        tiles.append(tile.resize((width, height), Image.Resampling.LANCZOS))
    return tiles


def _grid(tiles: Sequence[Image.Image], columns: int, titles: Sequence[str] | None) -> Image.Image:
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    if titles is not None and len(titles) != rows:
        raise OptionError(f"there are {len(titles)} labels for {rows} rows of {columns}; expected one for each row")
    width, height = tiles[0].size
    gap = 2 if max(width, height) < 200 else 4
    font = _font(max(12, min(20, height // 4)))
    margin = 0
    if titles:
        margin = max(math.ceil(font.getlength(title)) for title in titles) + 20
    whole = (margin + columns * (width + gap) + gap, rows * (height + gap) + gap)
    canvas = Image.new("RGB", whole, _PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        canvas.paste(tile, (margin + gap + column * (width + gap), gap + row * (height + gap)))
    for row, title in enumerate(titles or ()):
        middle = gap + row * (height + gap) + height / 2
        draw.text((margin - 10, middle), title, fill=_INK, font=font, anchor="rm")
    return canvas


def _scatter(points: Tensor) -> Image.Image:
    """Points (n, D >= 2), the first two coordinates with equal axes; darker where there are more."""
    points = points[:, :2]
    points = points[points.isfinite().all(1)]
    middle, half = _frame(points)
    # Twice as fine as the picture, each point a disc, and their number a layer of ink on ink.
    fine = 2 * _SIDE
    at = ((points - middle) / half / 2 + 0.5) * fine
    at = at[((at >= 0) & (at < fine)).all(1)].long()
    cells = (fine - 1 - at[:, 1]) * fine + at[:, 0]
    counts = torch.bincount(cells, minlength=fine * fine).reshape(1, 1, fine, fine).float()
    radius = 3 if len(points) > 5000 else 4 if len(points) > 500 else 6
    reach = torch.arange(-radius, radius + 1)
    disc = (reach[:, None] ** 2 + reach[None, :] ** 2 <= radius**2).float()
    counts = F.conv2d(counts, disc[None, None], padding=radius)
    inked = counts[counts > 0]
    crowd = float(inked.quantile(0.9)) if len(inked) else 1.0
    # Where nine tenths of the inked places are thinner, the paper is covered to 85 %; one point alone still shows.
    alpha = max(0.12, 1 - 0.15 ** (1 / max(crowd, 1.0)))
    ink = F.avg_pool2d(1 - (1 - alpha) ** counts, 2)[0, 0]  # (side, side)
    canvas, origin = _axes(middle, half)
    mask = Image.fromarray((ink * 255).round().to(torch.uint8).numpy())
    canvas.paste(Image.new("RGB", mask.size, _DOT), origin, mask)
    return canvas


def _frame(points: Tensor) -> tuple[Tensor, float]:
    """Centre (D,) and half side of the square to draw: all points, unless a few far ones would shrink the rest."""
    if len(points) == 0:
        return torch.zeros(points.shape[1], dtype=torch.float64), 1.0
    sample = points[:: max(1, len(points) // 100_000)]
    edges = sample.quantile(torch.tensor([0.002, 0.998], dtype=torch.float64), dim=0)
    ends = torch.stack([sample.amin(0), sample.amax(0)])
    if float((ends[1] - ends[0]).max()) < 2.5 * float((edges[1] - edges[0]).max()):
        edges = ends
    half = float((edges[1] - edges[0]).max()) / 2 * 1.08
    return edges.mean(0), half or 1.0


def _axes(middle: Tensor, half: float) -> tuple[Image.Image, tuple[int, int]]:
    """Paper with a light grid and the numbers of the range; and where the drawing begins on it."""
    left, top, right, below = 52, 14, 14, 32
    canvas = Image.new("RGB", (left + _SIDE + right, top + _SIDE + below), _PAPER)
    draw = ImageDraw.Draw(canvas)
    font = _font(14)
    for axis in range(len(middle)):
        start, end = float(middle[axis]) - half, float(middle[axis]) + half
        for tick in _ticks(start, end):
            place = (tick - start) / (end - start) * _SIDE
            text = f"{tick:.6g}"
            if axis == 0:
                draw.line([(left + place, top), (left + place, top + _SIDE)], fill=_FAINT)
                draw.text((left + place, top + _SIDE + 8), text, fill=_INK, font=font, anchor="mt")
            else:
                draw.line([(left, top + _SIDE - place), (left + _SIDE, top + _SIDE - place)], fill=_FAINT)
                draw.text((left - 8, top + _SIDE - place), text, fill=_INK, font=font, anchor="rm")
    draw.rectangle([left, top, left + _SIDE, top + _SIDE], outline=(190, 195, 203))
    return canvas, (left, top)


def _ticks(start: float, end: float) -> list[float]:
    """Four to eight round numbers in the range."""
    rough = (end - start) / 6
    unit = 10 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough)
    return [round(k * step, 12) + 0.0 for k in range(math.ceil(start / step), math.floor(end / step) + 1)]


def _histogram(values: Tensor) -> Image.Image:
    """Numbers (n,) as a histogram: across their value, up how often, the most frequent at the top."""
    values = values[values.isfinite()]
    middle, half = _frame(values[:, None])
    bins = 70
    heights = torch.histc(values, bins, float(middle) - half, float(middle) + half)
    heights = (heights / heights.max().clamp(min=1) * (_SIDE - 20)).tolist()
    canvas, (left, top) = _axes(middle, half)
    draw = ImageDraw.Draw(canvas)
    for i, height in enumerate(heights):
        if height:
            bar = _SIDE / bins
            draw.rectangle(
                [left + i * bar + 1, top + _SIDE - height, left + (i + 1) * bar - 1, top + _SIDE - 1], fill=_DOT
            )
    return canvas


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
