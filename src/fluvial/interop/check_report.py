"""What `check_convention` says: the readings of a network, ranked, and the finding in plain words."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fluvial.convention import Convention
from fluvial.model import Model

# How many times worse a candidate must be to be told from the best: over all levels of noise, or at one of them.
TOLD, TOLD_AT_ONE = 1.1, 1.5
KNOWS_NOTHING = 0.95


@dataclass(frozen=True)
class Candidate:
    """One reading of a network, and how well it denoises so read.

    Attributes:
        prediction, schedule, time, data: the reading, in words.
        error: the geometric mean over levels of noise; 1 is knowing nothing.
        ratio: this error over the best candidate's.
        levels: the error at each level, from much noise to little.
        convention: the reading as a `fl.model.Convention`.
        network: the network, so called.
    """

    prediction: str
    schedule: str
    time: str
    data: str
    error: float
    ratio: float
    levels: tuple[float, ...]
    convention: Convention = field(repr=False)
    network: Callable[..., Tensor] = field(repr=False)

    def __str__(self) -> str:
        return f"{self.prediction}, {self.schedule}, time {self.time}, data {_range(self.data)}"

    def model(self) -> Model:
        """The network as a model under this convention."""
        model = Model(self.network, self.convention.path)
        model.convention = self.convention
        return model

    @property
    def reading(self) -> dict[str, str]:
        """prediction, schedule, time and data by name."""
        return {name: getattr(self, name) for name in _AXES}


_AXES = ("prediction", "schedule", "time", "data")


def _range(data: str) -> str:
    return f"in {data}" if data.startswith("[") else data


@dataclass(frozen=True)
class ConventionReport:
    """What `check_convention` found; prints as a verdict and a table.

    Attributes:
        candidates: all readings, the best first.
        blind: of "state", "scale", "offset" and "time", what the network's output does not depend on.
        loss: the mean squared error of the best candidate's own output at uniform times: the figure that is published.
        stated: the reading that the model itself states, where a model was given.
        n, seed: how many noisy samples, and of which seed.
    """

    candidates: tuple[Candidate, ...]
    blind: tuple[str, ...]
    loss: float
    stated: Candidate | None
    n: int
    seed: int

    @property
    def best(self) -> Candidate:
        return self.candidates[0]

    @property
    def alike(self) -> tuple[Candidate, ...]:
        """The best and all that cannot be told from it."""
        return tuple(c for c in self.candidates if self._alike(c))

    def _alike(self, candidate: Candidate) -> bool:
        worst = max(one / other for one, other in zip(candidate.levels, self.best.levels))
        return candidate.ratio < TOLD and worst < TOLD_AT_ONE

    @property
    def fits(self) -> bool:
        """Whether the network denoises at all under its best reading."""
        return self.best.error < KNOWS_NOTHING and "state" not in self.blind

    @property
    def told(self) -> dict[str, tuple[str, ...]]:
        """What may be, for each of prediction, schedule, time and data; one answer where the data can tell."""
        return {name: tuple(dict.fromkeys(getattr(c, name) for c in self.alike)) for name in _AXES}

    @property
    def agrees(self) -> bool | None:
        """Whether what the model states is among the best; None for a bare function."""
        return None if self.stated is None else self._alike(self.stated)

    @property
    def verdict(self) -> str:
        """The finding in plain words."""
        if not self.fits:
            if "state" in self.blind:
                return "fits no candidate: the output does not depend on the state at all; expected a trained network"
            return (
                f"fits no candidate: the best ({self.best}) has an error of {self.best.error:.2f}, where knowing "
                "nothing is 1; expected a trained network, and data such as it was trained on"
            )
        sentences = [self._looks_like()]
        if "scale" in self.blind or "offset" in self.blind:
            what = " and ".join(b for b in self.blind if b != "time")
            sentences.append(
                f"it is blind to the {what} of its input: what depends on these only is untestable, and a wrong input "
                "scale or data range would go unnoticed"
            )
        if "time" in self.blind:
            sentences.append("it does not depend on its time: the clock is untestable")
        if self.agrees is False and self.stated is not None:
            sentences.append(f"what the model states is {self.stated.ratio:.3g} x worse")
        return "; ".join(sentences)

    def _looks_like(self) -> str:
        parts = [
            _range(v[0]) if name == "data" else v[0]
            for name, v in self.told.items()
            if len(v) == 1 and v[0] != "its own"
        ]
        data = "data " if len(self.told["data"]) == 1 else ""
        if data:
            parts[-1] = data + parts[-1]
        text = "looks like: " + (", ".join(parts) or "several")
        for name, values in self.told.items():
            if len(values) > 1:
                text += f"; {name} cannot be told: {' or '.join(values)} (within {self.alike[-1].ratio:.2f} x)"
        beaten = next((c for c in self.candidates if not self._alike(c)), None)
        return text if beaten is None else f"{text}; runner-up ({beaten}) is {beaten.ratio:.3g} x worse"

    def config(self) -> dict[str, Any]:
        """A JSON-able account, of the twenty best candidates."""
        rows = [{**c.reading, "error": c.error, "ratio": c.ratio} for c in self.candidates[:20]]
        return {
            "verdict": self.verdict,
            "fits": self.fits,
            "agrees": self.agrees,
            "blind": list(self.blind),
            "loss": self.loss if math.isfinite(self.loss) else None,
            "n": self.n,
            "seed": self.seed,
            "candidates": rows,
        }

    def __str__(self) -> str:
        lines = [("prediction", "schedule", "time", "data", "error", "times the best")]
        lines += [(*c.reading.values(), f"{c.error:.3g}", f"{c.ratio:.3g}") for c in self.candidates[:8]]
        widths = [max(len(line[k]) for line in lines) for k in range(6)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
        return "\n".join([self.verdict, *table])
