"""Two sources as one: such as pairs of a model's own samples, with a share of pairs of real data among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fluvial.errors import OptionError
from fluvial.training.source import Rows, Source


class Mixed(Source):
    """A source of which a share comes from `second` and the rest from `first`.

    With n samples in `first` it has round(n / (1 - share)): all of `first`, once, and as many of `second` as make the
    share, taken at even distances from its whole length (more than once each, where it has fewer). Every index is a
    fixed row.

    Args:
        first: the source that is seen whole in every epoch.
        second: the other; of the same shape, conditions and normalisation.
        share: of the samples that come from `second`, between 0 and 1.

    Attributes:
        path, times: of the pairs, where the sources are pairs; None and () otherwise.

    Raises:
        OptionError: for a share out of range, streams, and sources that do not agree; says in what.

    Source: Lee, Lin, Fanti: Improving the training of rectified flows (2024), https://arxiv.org/abs/2405.20320
    """

    def __init__(self, first: Source, second: Source, share: float) -> None:
        if not 0.0 < share < 1.0:
            raise OptionError(f"share is {share}; expected a number between 0 and 1, of samples from the second source")
        for source in (first, second):
            if source.size is None:
                raise OptionError(
                    f"{source.name} is a stream: its rows have no numbers; expected sources of known size"
                )
        _require_agreement(first, second)
        self.first, self.second, self.share = first, second, share
        self.waits, self.autoencoder = first.waits or second.waits, first.autoencoder
        self.name = f"{first.name} with {share:.3g} of {second.name}"
        self.size = round(len(first) / (1.0 - share))
        self.shape, self.conditions, self.num_classes = first.shape, first.conditions, first.num_classes
        self.normalisation, self.measured = first.normalisation, first.measured
        self.class_names, self.skipped = first.class_names, [*first.skipped, *second.skipped]
        self.path, self.times = getattr(first, "path", None), getattr(first, "times", ())

    def batch(self, indices: Tensor) -> Rows:
        mine = indices < len(self.first)
        others = len(self) - len(self.first)
        rows: dict[str, Tensor] = {}
        spread = (indices[~mine] - len(self.first)) * len(self.second) // max(others, 1)
        for source, where, numbers in ((self.first, mine, indices[mine]), (self.second, ~mine, spread)):
            if len(numbers):
                for name, values in source.batch(numbers).items():
                    if name not in rows:
                        rows[name] = values.new_empty((len(indices), *values.shape[1:]))
                    rows[name][where] = values
        return {name: rows[name] for name in ("data", *self.conditions)}


_AGREEING: dict[str, Callable[[Any], Any]] = {
    "shape": lambda source: source.shape,
    "conditions": lambda source: set(source.conditions),
    "classes": lambda source: source.num_classes,
    "normalisation": lambda source: (source.normalisation.shift, source.normalisation.scale),
    "times of the states": lambda source: getattr(source, "times", ()),
    "path": lambda source: getattr(source, "path", None),
}


def _require_agreement(first: Source, second: Source) -> None:
    for what, of in _AGREEING.items():
        a, b = of(first), of(second)
        if a != b:
            a, b = (", ".join(sorted(x)) if isinstance(x, set) else x for x in (a, b))
            raise OptionError(f"{first.name} has {what} {a}, and {second.name} {b}; expected the same to mix them")
