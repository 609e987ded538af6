"""Compositions of models: latent diffusion, cascades, unCLIP. Each stage is a model like any other."""

from fluvial.systems.base import System
from fluvial.systems.folders import load

__all__ = ["System", "load"]
