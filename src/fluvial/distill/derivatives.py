"""Derivatives along a direction, by forward-mode differentiation: one pass, whatever the dimension."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


def along(
    function: Callable[..., Tensor], point: tuple[Tensor, ...], direction: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """function(*point), and its derivative in this direction: d/de function(*(point + e direction)) at e = 0.

    In full precision, and with the attention that is written out: the fused kernels have no forward derivative.

    Args:
        function: differentiable in its arguments; a time among them lies inside its path, where the path's clock has a
            derivative.
        point, direction: as many tensors each, of the same shapes and dtypes.
    """
    _load_rules()
    with torch.autocast(point[0].device.type, enabled=False), sdpa_kernel(SDPBackend.MATH), _Contiguous():
        found: Any = torch.func.jvp(function, point, direction)
    return found


@functools.cache
def _load_rules() -> None:
    """Has torch load its rules of forward derivatives: at first use it warns of the compiler that it has for them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
        torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))


class _Contiguous(TorchFunctionMode):
    """Lays out what group_norm reads one sample after another: its forward derivative takes no other layout."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.group_norm, functional.group_norm):
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))
