"""Data that is always there: the handwritten digits inside scikit-learn, and toys in two dimensions.

Every toy is a function of its name alone: 20,000 points, drawn with this library's counter-based noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fluvial import random
from fluvial.training.source import Tensors

POINTS = 20_000


def digits() -> Tensors:
    """1,797 handwritten digits of 8x8 pixels from 0 to 16, with their classes.

    Source: E. Alpaydin, C. Kaynak: Optical recognition of handwritten digits, UCI repository (1998),
    https://doi.org/10.24432/C50P49; the copy inside scikit-learn.
    """
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    images, label = load_digits(return_X_y=True)
    data = torch.from_numpy(images).to(torch.float32).reshape(-1, 1, 8, 8)
    return Tensors("digits", {"data": data, "label": torch.from_numpy(label)}, [str(digit) for digit in range(10)])


def _draws(toy: int) -> tuple[Tensor, Tensor]:
    """Uniform (n, 2) and normal (n, 2) numbers of this toy's own."""
    uniform = random.uniform(POINTS, (2,), seed=0, draw=2 * toy, stream=random.DATA)
    return uniform, random.normal(POINTS, (2,), seed=0, draw=2 * toy + 1, stream=random.DATA)


def _moons() -> dict[str, Tensor]:
    uniform, normal = _draws(0)
    label = torch.arange(POINTS) % 2
    angle = math.pi * uniform[:, 0]
    upper = torch.stack([angle.cos(), angle.sin()], dim=1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], dim=1)
    return {"data": torch.where(label[:, None] == 0, upper, lower) + 0.07 * normal, "label": label}


def _checkerboard() -> dict[str, Tensor]:
    uniform, _ = _draws(1)
    # Two of four columns of squares in each row of squares: which two depends on the row.
    row = (4 * uniform[:, 1]).floor()
    column = (4 * uniform[:, 0]).floor()
    within = 4 * uniform[:, 0] - column
    column = 2 * (column % 2) + row % 2
    return {"data": torch.stack([column + within, 4 * uniform[:, 1]], dim=1) * 2 - 4}


def _eight_gaussians() -> dict[str, Tensor]:
    _, normal = _draws(2)
    label = torch.arange(POINTS) % 8
    angle = 2 * math.pi * label / 8
    return {"data": 4 * torch.stack([angle.cos(), angle.sin()], dim=1) + 0.3 * normal, "label": label}


def _spiral() -> dict[str, Tensor]:
    uniform, normal = _draws(3)
    # The square root spreads the points evenly along the arm, whose turns grow with the angle.
    angle = 4 * math.pi * uniform[:, 0].sqrt()
    return {"data": 0.3 * angle[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1) + 0.08 * normal}


TOYS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "moons": _moons,
    "checkerboard": _checkerboard,
    "eight_gaussians": _eight_gaussians,
    "spiral": _spiral,
}


def toy(name: str) -> Tensors:
    """The toy of this name: points (20000, 2), with a label where there are parts to tell apart."""
    return Tensors(name, TOYS[name]())
