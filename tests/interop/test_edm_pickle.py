"""The reader of network pickles: what it reads; that all else a file may hold is refused, and nothing of it run."""

from __future__ import annotations

import collections
import pickle
import random
import struct
import zipfile

import numpy as np
import pytest
import torch
from edm_files import NETWORKS, Persistent, content, dumps, pickled, their_names
from edm_forged import built, numbers, tensor, word
from torch import nn

from fluvial.errors import RunError
from fluvial.interop import from_edm
from fluvial.interop.edm import EDMNetwork
from fluvial.interop.edm_pickle import Record, read
from problems import one_line

EDM = {"sigma_min": 0.0, "sigma_max": float("inf"), "sigma_data": 0.5}


@pytest.fixture
def network():
    return EDMNetwork(**NETWORKS["ncsnpp"])


@pytest.fixture
def reading(tmp_path):
    """read(bytes), by way of a file."""

    def read_bytes(data, how=read):
        path = tmp_path / "net.pkl"
        path.write_bytes(data)
        return how(path)

    return read_bytes


# What it reads


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values(reading, protocol):
    value = {
        "none": None, "yes": True, "no": False, "whole": [0, -1, 255, 65_536, -(2**40), 2**70], "real": -1.5e-300,
        "word": "c_σ" * 100, "bytes": b"\0\xff", "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)), 7: {"a": {}},
        "shared": [[1, 2]] * 3, "many": list(range(3000)),
    }  # fmt: skip
    if protocol < 3:
        del value["bytes"]
    assert reading(pickle.dumps(value, protocol)) == value
    if protocol >= 4:
        assert reading(pickle.dumps({"set": {"a", "b"}}, protocol)) == {"set": {"a", "b"}}


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
     torch.uint8, torch.bool],
)  # fmt: skip
def test_tensors_of_every_type(reading, dtype):
    whole = (torch.arange(24).reshape(2, 3, 4) % 3).to(dtype)
    for value in (
        whole,
        whole[0, 0, 1],
        whole[:0],
        whole.permute(2, 0, 1),
        whole[1:, ::2, 1],
        torch.zeros((), dtype=dtype),
    ):
        found = reading(dumps(value))
        assert found.dtype == dtype
        assert found.shape == value.shape
        assert torch.equal(found, value)


def test_parameters_and_numbers_of_numpy(reading):
    found = reading(
        dumps(
            {
                "p": nn.Parameter(torch.arange(3.0)),
                "hooks": collections.OrderedDict(a=1),
                "numbers": [np.float64(0.1), np.float32(0.5), np.int64(-7), np.bool_(True)],
                "array": np.ones(3),
                "modules": nn.ModuleDict({"a": nn.ModuleDict()}),
            }
        )
    )
    assert torch.equal(found["p"], torch.arange(3.0))
    assert not found["p"].requires_grad
    assert found["hooks"] == {"a": 1}
    assert found["numbers"] == [0.1, 0.5, -7, True]
    assert found["array"].kind == "ndarray"
    assert found["modules"].state["_modules"]["a"].kind == "ModuleDict"


def test_objects_are_records_of_their_state(reading, network):
    found = reading(pickled(network, "EDMPrecond", **EDM))
    assert found["ema"].kind == "EDMPrecond"
    assert found["ema"].state["sigma_data"] == 0.5
    assert type(found["dataset_kwargs"]) is dict
    inner = found["ema"].state["_modules"]["model"]
    assert inner.state["_init_kwargs"]["encoder_type"] == "residual"
    assert isinstance(inner.state["_modules"]["enc"], Record)


def test_sizes_that_are_only_claimed(reading):
    assert torch.equal(reading(tensor(numbers())), torch.zeros(4))
    huge = 2**62
    for data in (
        tensor(numbers(claimed=2**31 - 1)),
        tensor(numbers(written=huge)),
        tensor(numbers(claimed=5, written=5)),
        tensor(numbers(claimed=-4, written=-4)),
        tensor(numbers(keys=2)),
        tensor(numbers(count=3)),
        tensor(numbers()[:60]),
        tensor(numbers(), size=(huge,), stride=(0,)),
        tensor(numbers(), size=(2**31, 2**31, 4), stride=(0, 0, 1)),
        tensor(numbers(), size=(0, 2**70), stride=(1, 1)),
        tensor(numbers(), size=(-1,)),
        tensor(numbers(), offset=1),
        tensor(numbers(), offset=huge),
        tensor(numbers(), stride=(2,)),
        tensor(numbers(), stride=(-1,)),
        tensor(numbers(), size=(4.0,)),
        tensor(numbers(), size=[4]),
        built(b"\x8e" + struct.pack("<Q", huge) + b"abc"),
        built(b"\x8d" + struct.pack("<Q", 2**64 - 1) + b"abc"),
        built(b"B" + struct.pack("<I", 2**32 - 1) + b"abc"),
        built(b"\x8b" + struct.pack("<i", 2**31 - 1) + b"abc"),
        built(b"N", b"r" + struct.pack("<I", 2**32 - 1), b"j" + struct.pack("<I", 2**32 - 2)),
        # The same numbers again and again.
        dumps([*[block := b"x" * 100], block]),
    ):
        with pytest.raises(RunError) as caught:
            reading(data)
        one_line(caught.value)
    assert reading(built(b"N", b"r" + struct.pack("<I", 2**32 - 1))) is None


def test_nesting_however_deep_is_no_matter(reading, network):
    deep = 60_000
    for inner in (b")" + b"\x85" * deep, b"]" * deep + b"a" * (deep - 1)):
        with pytest.raises(RunError) as caught:
            reading(built(b"}", word("ema"), inner, b"s"), from_edm)
        one_line(caught.value)
        with pytest.raises(RunError):  # as a key it would be walked
            reading(built(b"}", inner, b"Ns"))
    # Modules in modules, and few modules that hold each other many times over.
    with their_names():
        module = Persistent("Linear", _parameters={}, _buffers={}, _modules={})
        for _ in range(40):
            module = Persistent("Linear", _parameters={}, _buffers={}, _modules={"a": module, "b": module})
        whole = content(network, "EDMPrecond", **EDM)
        whole["ema"].state["_modules"]["model"].state["_modules"]["map_layer0"] = module
        data = dumps(whole)
    with pytest.raises(RunError, match="modules, or they lie deeper"):
        reading(data, from_edm)


def test_files_that_are_something_else(reading, tmp_path, network):
    for text in (b"", b"hello, world\n", b"<html></html>", b"\x89PNG\r\n\x1a\n\0\0", b"\0" * 100, "Ωmega\n".encode()):
        with pytest.raises(RunError) as caught:
            reading(text)
        assert "damaged or no pickle" in one_line(caught.value) or "instruction" in str(caught.value)
    with zipfile.ZipFile(tmp_path / "net.pkl", "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    with pytest.raises(RunError):
        read(tmp_path / "net.pkl")
    with pytest.raises(RunError, match="cannot be read: No such file"):
        from_edm(tmp_path / "none.pkl")
    with pytest.raises(RunError, match="cannot be read: Is a directory"):
        from_edm(tmp_path)
    for value in ({}, [1], {"ema": None}, {"ema": {"a": 1}}, None, {"net": 1}):
        with pytest.raises(RunError, match="holds 'no network' as its ema; expected one of EDMPrecond, Precond"):
            reading(dumps(value), from_edm)


def test_damaged_files_are_refused_or_read(reading, network):
    """Cut anywhere it is an error; with some bytes changed an error too, or a file like any other: nothing else."""
    data = pickled(network, "EDMPrecond", **EDM)
    source = random.Random(0)
    for cut in [*range(1, 60, 7), *(source.randrange(len(data)) for _ in range(10)), len(data) - 1]:
        with pytest.raises(RunError) as caught:
            reading(data[:cut], from_edm)
        one_line(caught.value)
    small = dumps({"a": torch.zeros(2), "b": [np.float64(1), nn.Parameter(torch.ones(1))], "c": nn.ModuleDict()})
    read_well = 0
    for _ in range(500):
        changed = bytearray(small)
        for _ in range(source.randrange(1, 4)):
            changed[source.randrange(len(small))] = source.randrange(256)
        try:
            reading(bytes(changed))
            read_well += 1
        except RunError as error:
            one_line(error)
    assert 0 < read_well < 500
