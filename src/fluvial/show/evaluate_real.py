"""The real side of an evaluation: which data samples are measured against, by which measures, and the floors."""

from __future__ import annotations

import math
import statistics
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluvial import measure, random
from fluvial.errors import OptionError
from fluvial.measure import Floor
from fluvial.measure import features as feature_networks
from fluvial.measure.distances import FLOOR
from fluvial.show.compare import MOST_REAL
from fluvial.training import Source

_NEIGHBOUR = 3  # k of precision and recall


class Measure(NamedTuple):
    """What is said of a figure: in a table, in words, and whether it is a distance, which has an excess."""

    short: str
    words: str
    distance: bool = False


MEASURES = {
    "frechet": Measure("FD", "squared Fréchet distance, on the features", True),
    "sliced_wasserstein": Measure("SW", "sliced Wasserstein distance, on the numbers, in the data's own units", True),
    "energy_distance": Measure("energy", "energy distance, on the numbers, in the data's own units", True),
    "mmd": Measure("MMD²", "unbiased squared MMD with a Gaussian kernel, on the numbers", True),
    "kid": Measure("KID", "unbiased squared MMD with the kernel (x·y/D + 1)³, on the features", True),
    "precision": Measure("precision", f"share of samples among the real ones, on the features, k = {_NEIGHBOUR}"),
    "recall": Measure("recall", f"share of real ones among the samples, on the features, k = {_NEIGHBOUR}"),
    "density": Measure("density", f"real balls around a sample over k, on the features, k = {_NEIGHBOUR}"),
    "coverage": Measure("coverage", f"share of real balls with a sample in them, on the features, k = {_NEIGHBOUR}"),
    "recognised": Measure("recognised", "share that the classifier takes for the class asked for"),
    "spread": Measure("spread", "variance within a class, on the numbers, as a ratio to the real data's"),
}


class Real:
    """The real data that samples are measured against, and the measures.

    Args:
        source: the data; of large ones a random part is read, three times as many as there are samples.
        n: samples of each seed.
        asked: (n,) the classes that they ask for; None where not every model asks.
        features: for `measure.features.of`.

    Attributes:
        kept: which of the n samples take part in distances: of each class as many as half of the real ones, at most.
        floors: of every measure that is taken of a pair of sets.
    """

    def __init__(self, source: Source, n: int, asked: Tensor | None, features: Any) -> None:
        rows = source.batch(random.permutation(len(source), seed=0, stream=FLOOR)[: max(MOST_REAL, 3 * n)])
        self.data, self.labels = rows["data"], rows.get("label")
        scale = source.normalisation
        self.low, self.high = scale.low, scale.high
        self.network = feature_networks.of(features, self.data, self.labels, scale.low, scale.high)
        self.classifier = self.network.classifier
        known, wanted = torch.zeros(len(self.data), dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
        if asked is not None and self.labels is not None:
            known, wanted = self.labels, asked
            if self.classifier is None and len(known.unique()) > 1:
                self.classifier = measure.train_classifier(self.data, known)
        self.as_numbers = self.data.ndim == 2 or self.labels is None
        self.bandwidth = measure.median_distance(self.data) if self.as_numbers else None
        self.kept, self.chosen, pool = _matched(known, wanted)
        self.features = self.network(self.data)
        self.floors = self._floors(pool, known)

    def _floors(self, pool: Tensor, known: Tensor) -> dict[str, Floor]:
        found: list[dict[str, float]] = []

        def each(a: Tensor, b: Tensor) -> float:
            a, b = a[:, 0], b[:, 0]
            found.append(self._pair(self.features[a], self.features[b], self.data[a], self.data[b]))
            return 0.0

        # One pass over the splits for all measures: each is given the numbers of its samples.
        n = measure.real_floor(each, pool[:, None], len(self.kept), labels=known[pool]).n
        floors = {}
        for name in found[0]:
            values = [one[name] for one in found]
            floors[name] = Floor(statistics.fmean(values), statistics.stdev(values), n)
        return floors

    def _pair(self, real: Tensor, fake: Tensor, real_data: Tensor, fake_data: Tensor) -> dict[str, float]:
        """What is measured of two sets of features, and of the samples that they are of."""
        values = {"frechet": measure.frechet(real, fake), "kid": measure.kid(real, fake).mean}
        covered = measure.precision_recall(real, fake, _NEIGHBOUR)
        values |= {name: getattr(covered, name) for name in ("precision", "recall", "density", "coverage")}
        if self.as_numbers:
            for name, distance in (
                ("sliced_wasserstein", measure.sliced_wasserstein),
                ("energy_distance", measure.energy_distance),
                ("mmd", lambda a, b: measure.mmd(a, b, self.bandwidth)),
            ):
                values[name] = distance(real_data, fake_data)
        return values

    def clamp(self, x: Tensor) -> Tensor:
        """Images within the data's range, as they are looked at; all else as it is."""
        return x.clamp(self.low, self.high) if x.ndim == 4 else x

    def __call__(self, x: Tensor, label: Tensor | None) -> dict[str, float]:
        """Every measure of samples (n, …), which asked for the classes `label` (n,)."""
        x = self.clamp(x)
        fake = x[self.kept]
        values = self._pair(self.features[self.chosen], self.network(fake), self.data[self.chosen], fake)
        if label is not None and self.labels is not None and self.classifier is not None:
            values["recognised"] = measure.share_recognised(self.classifier, x, label)
            if int(label.bincount().max()) > 1:
                ratio = measure.within_class_spread(x, label, self.data, self.labels).ratio
                values["spread"] = math.nan if ratio is None else ratio
        return values

    def record(self) -> dict[str, Any]:
        """How the figures are made, for JSON."""
        classifier = None if self.classifier is None else self.classifier.description
        return {
            "features": self.network.description,
            "classifier": classifier,
            "compared": {"samples": len(self.kept), "real": len(self.chosen), "classes": "as many of each in both"},
            "clamped_to": [self.low, self.high] if self.data.ndim == 4 else None,
            "mmd_bandwidth": self.bandwidth,
        }


def _matched(known: Tensor, asked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which samples and which real ones are compared, as many of each class, and the pool of real ones for the floor.

    Args:
        known: (N,) classes of the real data.
        asked: (n,) classes of the samples.

    Returns:
        Indices: (k,) into the samples, (k,) into the data, and (k * fold,) into the data with the same mix of classes.
    """
    kept, real, pool = [], [], []
    there = {label: int((known == label).sum()) for label in asked.unique().tolist()}
    # Half of a class at most, so that the floor has two sets of the same size.
    counts = {label: min(int((asked == label).sum()), there[label] // 2) for label in there}
    counts = {label: count for label, count in counts.items() if count}
    if sum(counts.values()) <= _NEIGHBOUR:
        raise OptionError(
            f"{len(asked)} samples and {len(known)} real ones make {sum(counts.values())} pairs of one class; "
            f"expected more than {_NEIGHBOUR}: ask for more samples, or give more data"
        )
    fold = min(there[label] // count for label, count in counts.items())
    for label, count in counts.items():
        mine = (known == label).nonzero()[:, 0]
        kept.append((asked == label).nonzero()[:count, 0])
        real.append(mine[:count])
        pool.append(mine[: fold * count])
    return torch.cat(kept), torch.cat(real), torch.cat(pool)
