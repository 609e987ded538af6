"""Pickles written by hand, to say what no pickler would."""

from __future__ import annotations

import collections
import pickle
import struct
import sys

import torch
from edm_files import dumps


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def built(*parts):
    """A pickle of protocol 4 from its instructions."""
    return b"\x80\x04" + b"".join(parts) + b"."


def word(text):
    return b"\x8c" + bytes([len(text)]) + text.encode()


def name_of(module, name):
    return word(module) + word(name) + b"\x93"


def numbers(count=4, claimed=4, written=4, key=b"0", dtype=torch.float32, keys=1):
    """The storage of `count` numbers, that claims other counts."""
    stream = [pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    head = b"\x80\x02(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0" + key + b"X\x03\0\0\0cpuJ"
    stream.append(head + struct.pack("<i", claimed) + b"NtQ.")
    stream.append(pickle.dumps(["0"] * keys, 2))
    return b"".join(stream) + struct.pack("<q", written) + b"\0" * count * dtype.itemsize


def tensor(data, offset=0, size=(4,), stride=(1,)):
    storage = Calls(torch.storage._load_from_bytes, data)
    return dumps(
        Calls(
            sys.modules["torch._utils"]._rebuild_tensor_v2,
            storage,
            offset,
            size,
            stride,
            False,
            collections.OrderedDict(),
        )
    )
