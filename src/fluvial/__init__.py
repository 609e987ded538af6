"""Fluvial: one library for every diffusion and flow model."""

__version__ = "0.1.0"
