"""Models of elsewhere in, models for elsewhere out, and what to trust.

In: `load`, from a folder or the hub; `from_callable`, any network under a named convention of the field;
`from_diffusers`; `from_edm`. Out: `as_denoiser`, `as_velocity`, `to_diffusers`, `push_to_hub`,
`diffusers.FluvialScheduler`, and `comfyui`. Trust: `check_convention` finds on real data which convention a network
follows; `certify` measures whether a model keeps the one that it states.
"""

from fluvial.interop import comfyui, diffusers
from fluvial.interop.callables import Denoiser, VelocityField, as_denoiser, as_velocity, from_callable
from fluvial.interop.card import write_card
from fluvial.interop.certify import Certificate, certify
from fluvial.interop.check import check_convention
from fluvial.interop.check_report import Candidate, ConventionReport
from fluvial.interop.conventions import NAMES, Foreign, SigmaClock, foreign, in_words
from fluvial.interop.diffusers import from_diffusers, to_diffusers
from fluvial.interop.edm import from_edm
from fluvial.interop.opening import describe, from_pretrained, load, push_to_hub

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
    "comfyui",
    "describe",
    "diffusers",
    "foreign",
    "from_callable",
    "from_diffusers",
    "from_edm",
    "from_pretrained",
    "in_words",
    "load",
    "push_to_hub",
    "to_diffusers",
    "write_card",
]
