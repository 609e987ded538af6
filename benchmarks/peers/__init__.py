"""Other libraries' samplers, called as they are, on the problems of `problems.py` and on exact noise levels.

A peer gets its state in its own scaling and its own prediction, computed from the exact network. An absent peer is
said to be absent, and left out.
"""

from __future__ import annotations

import functools

from peers import on_azula, on_diffusers, on_flow_matching, on_k_diffusion
from peers.method import Method

LIBRARIES = {
    "diffusers": on_diffusers.methods,
    "k-diffusion": on_k_diffusion.methods,
    "azula": on_azula.methods,
    "flow_matching": on_flow_matching.methods,
}

__all__ = ["LIBRARIES", "Method", "absent", "leave_out", "methods"]


@functools.cache
def absent() -> dict[str, str]:
    """The libraries that cannot be imported, and why."""
    reasons = {}
    for library, make in LIBRARIES.items():
        try:
            list(make("edm"))
        except ImportError as error:
            reasons[library] = str(error)
    return reasons


def leave_out() -> None:
    """No peers in this process."""
    LIBRARIES.clear()


def methods(family: str) -> list[Method]:
    """Every method of every library that is here."""
    return [method for library, make in LIBRARIES.items() if library not in absent() for method in make(family)]
