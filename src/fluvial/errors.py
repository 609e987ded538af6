"""Errors that say what was given, what was expected, and how to mend it.

Every error Fluvial raises on purpose is a `FluvialError`, and one line long: the command line prints it as it is.
Each kind is also the built-in exception a Python programmer would expect, so `except ValueError` keeps working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FluvialError(Exception):
    """What every deliberate error of this library is."""


class OptionError(FluvialError, ValueError):
    """An argument has a value that cannot be used."""


class PathTimeError(FluvialError, ValueError):
    """A time lies outside the path, or a quantity does not exist at that end of it."""


class ShapeError(FluvialError, ValueError):
    """A tensor's shape does not fit the model or the other tensors."""


class DependenceError(FluvialError, ValueError):
    """The score was asked of a model whose noise is not known to be independent of its data."""


class DataError(FluvialError, ValueError):
    """Data that cannot be read, or is not fit for training."""


class RunError(FluvialError, RuntimeError):
    """A run folder or a checkpoint is missing, damaged, or belongs to other settings."""


class NonFiniteError(FluvialError, ArithmeticError):
    """A loss or a state became NaN or infinite; the message names the culprit."""


def one_of(kind: str, given: object, known: Iterable[str]) -> OptionError:
    """The error for an unknown name: lists the known ones and guesses the one that was meant."""
    names = sorted(known)
    close = difflib.get_close_matches(str(given), names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return OptionError(f"unknown {kind} {given!r}; expected one of {', '.join(names)}{hint}")
