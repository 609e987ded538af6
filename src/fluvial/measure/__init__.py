"""Measures of samples against data. Each returns plain numbers; none prints or plots.

A distance between finite samples is never zero: report it beside `real_floor`, the same distance between two
sets of real data. A distance on features also states the features: see `Classifier.description`.
"""

from fluvial.measure.classifier import Classifier, share_recognised, train_classifier
from fluvial.measure.concentration import Spread, within_class_spread, within_mode_spread
from fluvial.measure.distances import Floor, energy_distance, frechet, real_floor, sliced_wasserstein

__all__ = [
    "Classifier",
    "Floor",
    "Spread",
    "energy_distance",
    "frechet",
    "real_floor",
    "share_recognised",
    "sliced_wasserstein",
    "train_classifier",
    "within_class_spread",
    "within_mode_spread",
]
