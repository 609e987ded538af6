"""What a contract suite returns and raises."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluvial.errors import FluvialError


class ContractError(FluvialError, AssertionError):
    """A check of the contract suite failed; the message names the check, what was found and what was expected."""


class Fault(Exception):
    """What a check found wrong where there is no figure: "found; expected …". Becomes a `ContractError`."""


class Figure(NamedTuple):
    """One measured figure of a check, and the bounds it must keep."""

    what: str
    found: float
    most: float = math.inf
    least: float = -math.inf

    @property
    def bounds(self) -> str:
        """What is expected, in words."""
        if self.least == self.most:
            return f"{self.most:g}"
        return f"at least {self.least:g}" if self.most == math.inf else f"at most {self.most:g}"


Check = Callable[..., Iterator[Figure]]


class Row(NamedTuple):
    """One line of a report."""

    check: str
    what: str
    found: float
    least: float
    most: float


class Report(list[Row]):
    """What was measured, as (check, what, found, least, most); prints as a table.

    Attributes:
        subject: what was checked.
    """

    def __init__(self, subject: str) -> None:
        super().__init__()
        self.subject = subject

    @property
    def checks(self) -> list[str]:
        """The names of the checks that had something to measure, in order."""
        return list(dict.fromkeys(row.check for row in self))

    def __str__(self) -> str:
        lines = [("check", "measured", "found", "expected")]
        lines += [(r.check, r.what, f"{r.found:.3g}", Figure(r.what, r.found, r.most, r.least).bounds) for r in self]
        widths = [max(len(line[column]) for line in lines) for column in range(4)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
        return "\n".join([f"{self.subject}: {len(self.checks)} checks passed", *table])


def run(subject: str, checks: Sequence[Check], *given: Any) -> Report:
    """Runs checks, each a generator of figures, and raises at the first that is out of its bounds.

    An error of the subject's own inside a check fails that check.

    Raises:
        ContractError: one line.
    """
    report = Report(subject)
    for check in checks:
        name = check.__name__.replace("_", " ")
        try:
            for figure in check(*given):
                report.append(Row(name, figure.what, figure.found, figure.least, figure.most))
                if not figure.least <= figure.found <= figure.most:
                    raise Fault(f"{figure.what} is {figure.found:.3g}; expected {figure.bounds}")
        except Fault as fault:
            raise ContractError(f"{subject}: check {name!r}: {fault}") from None
        except Exception as error:
            said = " ".join(str(error).split())
            raise ContractError(
                f"{subject}: check {name!r}: {type(error).__name__}: {said}; expected no error here"
            ) from error
    return report


def label(thing: object) -> str:
    """A short name of it for messages."""
    text = " ".join(repr(thing).split())
    return text if len(text) <= 60 else f"{text[:56]} …"


def apart(a: Any, b: Any, floor: float = 1.0) -> float:
    """The largest |a - b| over |b| and `floor`; inf when only one is finite, or the shapes differ. Equal infs agree."""
    a, b = (torch.as_tensor(value, dtype=torch.float64) for value in (a, b))
    if a.shape != b.shape:
        return math.inf
    wrong = (a - b).abs() / b.abs().clamp(min=floor)
    wrong = torch.where(a == b, torch.zeros_like(wrong), wrong).nan_to_num(nan=math.inf, posinf=math.inf)
    return float(wrong.max()) if wrong.numel() else 0.0


def share(wrong: Tensor, whole: Tensor) -> float:
    """The largest |wrong| over the largest |whole|, as a share; inf for what is not finite."""
    if not bool(wrong.isfinite().all()):
        return math.inf
    return float(wrong.abs().max()) / max(float(whole.abs().max()), 1e-12)
