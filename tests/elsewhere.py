"""A second device where there is none: its tensors hold their numbers on the processor, and refuse to meet its own.

    with elsewhere():
        model.to(DEVICE)
        fl.sample(model, 4)     # an error where a tensor was left behind

It goes by the name of torch's device without memory, "meta", for which everything is registered. As on a real one, a
number (a tensor without dimensions) and indices may come from the processor, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")

_OPS: Any = torch.ops.aten
_CROSSING = {_OPS._to_copy.default, _OPS.copy_.default, _OPS.lift_fresh.default, _OPS._local_scalar_dense.default}
_INDEXING = {_OPS.index.Tensor, _OPS.index_put.default, _OPS.index_put_.default, _OPS._index_put_impl_.default}
_MAKING = (torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor)


class There(Tensor):
    """A tensor of the second device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        made = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=DEVICE,
        )  # type: ignore[attr-defined]  # fmt: skip
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def item(self) -> Any:
        return self.held.item()

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("a tensor of the second device was asked for its numbers; expected .cpu() first")

    __array__ = numpy

    def __float__(self) -> float:
        return float(self.held)

    def __int__(self) -> int:
        return int(self.held)

    def __bool__(self) -> bool:
        return bool(self.held)

    __index__ = __int__

    def __deepcopy__(self, memo: Any) -> Any:
        made = There(self.held.clone())
        return torch.nn.Parameter(made, self.requires_grad) if isinstance(self, torch.nn.Parameter) else made

    def __repr__(self, **_: Any) -> str:
        return f"There({self.held})"


@contextmanager
def elsewhere() -> Iterator[None]:
    """Where tensors can be moved to `DEVICE`, and made there. Other threads do not know of it."""
    with _Made(), _Run():
        yield


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device) == DEVICE


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, There)]
    here = [x for x in tensors if not isinstance(x, There) and x.ndim > 0]
    into = bool(tensors) and isinstance(args[0], There)
    if there and here and func not in _CROSSING and not (func in _INDEXING and into):
        shapes = ", ".join(str(tuple(x.shape)) for x in here)
        raise RuntimeError(f"{func} of tensors of two devices: {shapes} on the processor; expected all on one")
    asked = kwargs.get("device")
    goes_there = _is_there(asked) if asked is not None else into if func is _OPS.copy_.default else bool(there)
    plain = {
        name: torch.device("cpu") if name == "device" and value is not None else tree_map(_held, value)
        for name, value in kwargs.items()
    }
    found = func(*tree_map(_held, args), **plain)

    def labelled(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        same = [y for y in tensors if y is x or (isinstance(y, There) and y.held is x)]  # changed in place
        return same[0] if same else There(x) if goes_there else x

    return tree_map(labelled, found)


def _held(x: Any) -> Any:
    return x.held if isinstance(x, There) else x


class _Run(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Made(TorchFunctionMode):
    """torch.tensor and its like fill a tensor without telling: first here, then there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _MAKING and _is_there(kwargs.get("device")):
            del kwargs["device"]
            return func(*args, **kwargs).to(DEVICE)
        return func(*args, **kwargs)
