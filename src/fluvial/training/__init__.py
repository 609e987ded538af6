"""Training a model on data, and the run folders that survive it."""

from __future__ import annotations

from fluvial.training.checkpoints import convert_run, load, model_hash, save
from fluvial.training.data import batches, open_source
from fluvial.training.interrupts import RunInterrupted
from fluvial.training.mixed import Mixed
from fluvial.training.pair_engine import make_pairs
from fluvial.training.pairs import Pairs, open_pairs
from fluvial.training.runs import Run, describe
from fluvial.training.source import Source
from fluvial.training.trainer import is_main_process, model_for, train

__all__ = [
    "Mixed",
    "Pairs",
    "Run",
    "RunInterrupted",
    "Source",
    "batches",
    "convert_run",
    "describe",
    "is_main_process",
    "load",
    "make_pairs",
    "model_for",
    "model_hash",
    "open_pairs",
    "open_source",
    "save",
    "train",
]
