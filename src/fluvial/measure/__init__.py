"""Measures of samples against data. Each returns plain numbers; none prints or plots.

A distance between finite samples is never zero: report it beside `real_floor`, the same distance between two
sets of real data. A distance on features also states the features: see `Classifier.description`.
"""

from fluvial.measure.classifier import Classifier, share_recognised, train_classifier
from fluvial.measure.concentration import Spread, within_class_spread, within_mode_spread
from fluvial.measure.distances import Floor, energy_distance, frechet, real_floor, sliced_wasserstein
from fluvial.measure.drift import Drift, marginal_drift
from fluvial.measure.features import Features, dinov2, excess, excess_ratio, inception, module_features
from fluvial.measure.irreducible import Irreducible, irreducible_loss
from fluvial.measure.kernel import Kid, kid, median_distance, mmd
from fluvial.measure.manifold import PrecisionRecall, precision_recall
from fluvial.measure.straightness import Straightness, straightness
from fluvial.measure.transport import Crossing, crossing, transport_cost

__all__ = [
    "Classifier",
    "Crossing",
    "Drift",
    "Features",
    "Floor",
    "Irreducible",
    "Kid",
    "PrecisionRecall",
    "Spread",
    "Straightness",
    "crossing",
    "dinov2",
    "energy_distance",
    "excess",
    "excess_ratio",
    "frechet",
    "inception",
    "irreducible_loss",
    "kid",
    "marginal_drift",
    "median_distance",
    "mmd",
    "module_features",
    "precision_recall",
    "real_floor",
    "share_recognised",
    "sliced_wasserstein",
    "straightness",
    "train_classifier",
    "transport_cost",
    "within_class_spread",
    "within_mode_spread",
]
