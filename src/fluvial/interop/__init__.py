"""Models of elsewhere in, models for elsewhere out, and what to trust.

In: `from_callable`, any network under a named convention of the field; `from_diffusers`. Out: `as_denoiser`,
`as_velocity`, `to_diffusers`, and `diffusers.FluvialScheduler`. Trust: `check_convention` finds on real data which
convention a network follows; `certify` measures whether a model keeps the one that it states.
"""

from fluvial.interop import diffusers
from fluvial.interop.callables import Denoiser, VelocityField, as_denoiser, as_velocity, from_callable
from fluvial.interop.certify import Certificate, certify
from fluvial.interop.check import check_convention
from fluvial.interop.check_report import Candidate, ConventionReport
from fluvial.interop.conventions import NAMES, Foreign, SigmaClock, foreign, in_words
from fluvial.interop.diffusers import from_diffusers, to_diffusers

__all__ = [
    "NAMES",
    "Candidate",
    "Certificate",
    "ConventionReport",
    "Denoiser",
    "Foreign",
    "SigmaClock",
    "VelocityField",
    "as_denoiser",
    "as_velocity",
    "certify",
    "check_convention",
    "diffusers",
    "foreign",
    "from_callable",
    "from_diffusers",
    "in_words",
    "to_diffusers",
]
