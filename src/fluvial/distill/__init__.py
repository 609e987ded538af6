"""One step: flow maps made of any model. One paper, one file; one trainer and one loss core for all."""

from __future__ import annotations

from fluvial.distill.consistency import ConsistencyDistillation, ConsistencyTraining
from fluvial.distill.continuous import ContinuousConsistency
from fluvial.distill.core import Asked, Distillation
from fluvial.distill.easy import EasyConsistencyTuning
from fluvial.distill.improved import ImprovedConsistencyTraining
from fluvial.distill.learn import learn
from fluvial.distill.mean_flow import Adaptive, MeanFlow
from fluvial.distill.methods import (
    METHODS,
    consistency,
    consistency_training,
    continuous_consistency,
    easy_consistency,
    improved_consistency,
    mean_flow,
    progressive,
    regression,
    shortcut,
)
from fluvial.distill.progressive import Halving
from fluvial.distill.regression import Regression
from fluvial.distill.shortcut import Shortcut

__all__ = [
    "METHODS",
    "Adaptive",
    "Asked",
    "ConsistencyDistillation",
    "ConsistencyTraining",
    "ContinuousConsistency",
    "Distillation",
    "EasyConsistencyTuning",
    "Halving",
    "ImprovedConsistencyTraining",
    "MeanFlow",
    "Regression",
    "Shortcut",
    "consistency",
    "consistency_training",
    "continuous_consistency",
    "easy_consistency",
    "improved_consistency",
    "learn",
    "mean_flow",
    "progressive",
    "regression",
    "shortcut",
]
