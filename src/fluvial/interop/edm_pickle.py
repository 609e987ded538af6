"""Reads the network pickles of EDM and EDM2 without unpickling them: no code of the file, nor any that it names, runs.

A pickle is a program for a stack machine, and its danger is that the program may import any function and call it. Here
`pickletools` takes the file apart, and a machine of our own carries out the few instructions that such files need. A
name in the file is looked up in `_MEANING` and nowhere else: what stands there are functions of this module, that make
dicts, tensors and inert `Record`s. Any other name ends the reading. The source text that these files carry is left
where it lies.

Sizes are those of the file: nothing is set aside for a size that is only claimed. Keys are words and numbers, so that
nesting, however deep, is never walked.
"""

from __future__ import annotations

import io
import os
import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluvial.errors import RunError


@dataclass(eq=False)
class Record:
    """An object of the file as it was described there: the name of its class, and what it held."""

    kind: str
    state: Any = None


class Refused(Exception):
    """Why a file is not read."""


def read(path: str | os.PathLike[str]) -> Any:
    """What a network pickle holds: dicts, lists, numbers, tensors, and `Record`s of all other objects.

    Raises:
        RunError: for a file that is missing, damaged, of another format, or that names anything beyond tensors and
            descriptions.
    """
    try:
        return _Machine(_MEANING).run(io.BytesIO(Path(path).read_bytes()))
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}") from error
    except Refused as error:
        raise RunError(f"{path} {error}; nothing of it was run. Expected a network pickle of EDM or EDM2") from error
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).split("\n")[0][:120] or type(error).__name__
        raise RunError(
            f"{path} is damaged or no pickle ({reason}); expected a network pickle of EDM or EDM2"
        ) from error
    except struct.error as error:
        raise RunError(f"{path} is damaged ({error}); expected a network pickle of EDM or EDM2") from error


# The machine


class _Named(NamedTuple):
    """A name that the file asked for, and what it means here."""

    name: str
    meaning: Callable[..., Any]


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT",
    "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8",
}  # fmt: skip
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = {"PROTO", "FRAME"}
_SHORT = 64  # bytes, of numpy's numbers say, that may be used again


class _Machine:
    """Carries out one pickle at a time. `persistent` answers for objects that are kept beside the stream."""

    def __init__(
        self, meaning: Mapping[str, Callable[..., Any]], persistent: Callable[[Any], Any] | None = None
    ) -> None:
        self.meaning, self.persistent = meaning, persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: io.BytesIO) -> Any:
        """The object of the next pickle in the stream, which is left behind its last instruction."""
        self.stack, self.marks, self.memo = [], [], {}
        for code, arg, _ in pickletools.genops(stream):
            name = code.name
            if name in _LITERALS:
                self.stack.append(arg)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _EMPTY:
                self.stack.append(_EMPTY[name]())
            elif name in _TUPLES:
                self._push(tuple(self._pop(_TUPLES[name])))
            elif (step := getattr(self, f"_on_{name.lower()}", None)) is not None:
                step(arg)
            elif name not in _IGNORED and name != "STOP":
                raise Refused(f"has the instruction {name}, which such a file does not need")
        (found,) = self.stack
        return found

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    def _pop(self, count: int) -> list[Any]:
        """The last `count` of the stack, above the mark."""
        start = len(self.stack) - count
        if start < (self.marks[-1] if self.marks else 0):
            raise ValueError("it takes more than it has put down")
        found = self.stack[start:]
        del self.stack[start:]
        return found

    def _since_mark(self) -> list[Any]:
        if not self.marks:
            raise ValueError("it ends a group that it has not begun")
        return self._pop(len(self.stack) - self.marks.pop())

    def _on_mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def _on_tuple(self, _: Any) -> None:
        self._push(tuple(self._since_mark()))

    def _on_append(self, _: Any) -> None:
        self._extend(self._pop(1))

    def _on_appends(self, _: Any) -> None:
        self._extend(self._since_mark())

    def _extend(self, values: list[Any]) -> None:
        _as(list, self.stack[-1]).extend(values)

    def _on_setitem(self, _: Any) -> None:
        self._set(self._pop(2))

    def _on_setitems(self, _: Any) -> None:
        self._set(self._since_mark())

    def _set(self, values: list[Any]) -> None:
        target = _as(dict, self.stack[-1])
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[_key(key)] = value

    def _on_additems(self, _: Any) -> None:
        values = self._since_mark()
        _as(set, self.stack[-1]).update(_key(value) for value in values)

    def _on_binput(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    _on_long_binput = _on_binput

    def _on_memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _on_binget(self, index: int) -> None:
        if index not in self.memo:
            raise ValueError("it takes up again what it has not put down")
        value = self.memo[index]
        # A tensor each time would make a large memory of a small file.
        if type(value) is bytes and len(value) > _SHORT:
            raise Refused("uses a block of numbers twice")
        self._push(value)

    _on_long_binget = _on_binget

    def _on_global(self, arg: str) -> None:
        self._name(*arg.split(" ", 1))

    def _on_stack_global(self, _: Any) -> None:
        module, name = self._pop(2)
        self._name(_as(str, module), _as(str, name))

    def _name(self, module: str, name: str) -> None:
        full = f"{module}.{name}"
        if full not in self.meaning:
            raise Refused(f"names {full!r:.80}, which no network of EDM needs")
        self._push(_Named(full, self.meaning[full]))

    def _on_reduce(self, _: Any) -> None:
        called, args = self._pop(2)
        if not isinstance(called, _Named):
            raise Refused(f"calls a {type(called).__name__}, which is no name")
        self._push(called.meaning(*_as(tuple, args)))

    # An object of a class: the same, as what the name means makes it.
    _on_newobj = _on_reduce

    def _on_build(self, _: Any) -> None:
        (state,) = self._pop(1)
        target = self.stack[-1]
        if not isinstance(target, Record) or target.state is not None:
            raise Refused(f"gives a state to a {type(target).__name__}, which has none")
        target.state = state

    def _on_binpersid(self, _: Any) -> None:
        (given,) = self._pop(1)
        if self.persistent is None:
            raise Refused("refers to objects that are not in it")
        self._push(self.persistent(given))


def _as(kind: type, value: Any) -> Any:
    """The value, which must be of exactly this type."""
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} stands where a {kind.__name__} should")
    return value


def _key(value: Any) -> Any:
    if type(value) not in (str, int):
        raise ValueError(f"a {type(value).__name__} is a key; expected words and whole numbers")
    return value


# What the names mean


def _object(meta: Any) -> Record:
    """An object that was pickled with its source: its class's name and its state; the source is not looked at."""
    meta = _as(dict, meta)
    return Record(_as(str, meta["class_name"]), _as(dict, meta["state"]))


def _dict() -> dict[Any, Any]:
    return {}


def _inert(kind: str) -> Callable[..., Record]:
    return lambda *args: Record(kind, None)


_NUMBERS = {"f8": "<d", "f4": "<f", "f2": "<e", "i8": "<q", "i4": "<i", "b1": "<?"}


def _numpy_type(code: Any, *_: Any) -> Record:
    return Record(_as(str, code))


def _number(kind: Any, data: Any) -> float | int | bool:
    """A numpy number."""
    kind = _as(Record, kind)
    if kind.kind not in _NUMBERS or (isinstance(kind.state, tuple) and ">" in kind.state):
        raise Refused(f"has a number of the type {kind.kind!r:.20}")
    return struct.unpack(_NUMBERS[kind.kind], _as(bytes, data))[0]


class _Storage(NamedTuple):
    """What is said of a storage before its numbers come."""

    dtype: torch.dtype
    count: int


_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
_STORAGES = {f"torch.{name}": lambda *_: None for name in _DTYPES}
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


def _described(given: Any) -> _Storage:
    """A storage from ("storage", its class, key, device, count, …)."""
    word, kind, _, _, count = _as(tuple, given)[:5]
    if word != "storage" or not isinstance(kind, _Named) or type(count) is not int:
        raise ValueError("a tensor's storage is not described as PyTorch does")
    return _Storage(_DTYPES[kind.name.removeprefix("torch.")], count)


def _numbers(data: Any) -> Tensor:
    """The storage that PyTorch wrote into a pickle: five pickles, a count, and the numbers, little-endian."""
    stream = io.BytesIO(_as(bytes, data))
    machine = _Machine(_STORAGES, _described)
    magic, protocol, system, storage, keys = (machine.run(stream) for _ in range(5))
    if magic != _MAGIC or protocol != _PROTOCOL or not _as(dict, system).get("little_endian", True):
        raise ValueError("a tensor's numbers are not written as PyTorch does")
    storage, rest = _as(_Storage, storage), len(data) - stream.tell() - 8
    (count,) = struct.unpack("<q", stream.read(8))
    if len(_as(list, keys)) != 1 or count != storage.count or rest != count * storage.dtype.itemsize:
        raise ValueError(f"a tensor of {storage.count} numbers comes with {max(rest, 0)} bytes")
    if not count:
        return torch.empty(0, dtype=storage.dtype)
    return torch.frombuffer(bytearray(stream.read()), dtype=storage.dtype)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """A tensor in its storage: never more numbers than that has."""
    storage, size = _as(Tensor, storage), _as(tuple, size)
    count = 1
    for side in size:
        count *= _as(int, side)
        if side < 0 or count > len(storage):
            raise ValueError(f"a tensor of the shape {size!r:.60} lies in {len(storage)} numbers")
    return torch.as_strided(storage, size, _as(tuple, stride), _as(int, offset))


def _parameter(data: Any, *_: Any) -> Tensor:
    return _as(Tensor, data)


_MEANING: dict[str, Callable[..., Any]] = {
    "torch_utils.persistence._reconstruct_persistent_obj": _object,
    "dnnlib.util.EasyDict": _dict,
    "collections.OrderedDict": _dict,
    "torch.nn.modules.container.ModuleDict": _inert("ModuleDict"),
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.storage._load_from_bytes": _numbers,
    # Numbers of numpy's among the settings, and arrays in an encoder, which are not read.
    "numpy.dtype": _numpy_type,
    "numpy.ndarray": _inert("ndarray"),
    **{
        f"numpy.{core}.multiarray.{name}": meaning
        for core in ("core", "_core")
        for name, meaning in (("scalar", _number), ("_reconstruct", _inert("ndarray")))
    },
}
