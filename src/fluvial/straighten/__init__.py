"""Straight is fast: reflow, whole or piece by piece, from pairs that a model makes of itself."""

from __future__ import annotations

from fluvial.straighten.online import Online
from fluvial.straighten.piecewise import Piecewise
from fluvial.straighten.reflow import reflow, reflow_run
from fluvial.straighten.rounds import rounds
from fluvial.training import Pairs, make_pairs, open_pairs

__all__ = ["Online", "Pairs", "Piecewise", "make_pairs", "open_pairs", "reflow", "reflow_run", "rounds"]
