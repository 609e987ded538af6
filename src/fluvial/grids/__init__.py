"""Times: grids of them for sampling, densities of them for training. One object each.

A sampling grid turns a path and a number of steps N into N + 1 floats, rising from 0 (noise) to 1 (data). The last is
where the sampler lands: at sigma = 0. Where the path itself stops short of the data (sigma(1) > 0: VE, EDM,
Discrete), t = 1 is no noise level to visit but the name of that landing, so the N levels visited lie below it.

A training density turns uniform numbers into times, by its quantile function: the same numbers give the same times
on any device and rank.
"""

from fluvial.grids.base import LOG_SNR_MAX, LOG_SNR_MIN, Clocked, Density, Grid
from fluvial.grids.closed import Beta, Cosine, Exponential, Flow, Karras, LogSNR, Shifted, Uniform
from fluvial.grids.densities import ExponentialDensity, LogitNormal, LogNormal, UShaped
from fluvial.grids.fitted import Fitted, level_of
from fluvial.grids.names import density, named, names
from fluvial.grids.resolve import resolve
from fluvial.grids.segments import Segments
from fluvial.grids.split import Split

__all__ = [
    "LOG_SNR_MAX",
    "LOG_SNR_MIN",
    "Beta",
    "Clocked",
    "Cosine",
    "Density",
    "Exponential",
    "ExponentialDensity",
    "Fitted",
    "Flow",
    "Grid",
    "Karras",
    "LogNormal",
    "LogSNR",
    "LogitNormal",
    "Segments",
    "Shifted",
    "Split",
    "UShaped",
    "Uniform",
    "density",
    "level_of",
    "named",
    "names",
    "resolve",
]
