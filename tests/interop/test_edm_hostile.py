"""Files that would run something if they were unpickled: each is refused, and nothing of it runs."""

from __future__ import annotations

import importlib
import io
import os
import pickle
import pickletools
import sys

import pytest
import torch
from edm_files import NETWORKS, content, dumps, their_names
from edm_forged import Calls, built, name_of, numbers, word

from fluvial.errors import RunError
from fluvial.interop import from_edm
from fluvial.interop.edm import EDMNetwork
from fluvial.interop.edm_pickle import read
from problems import one_line

EDM = {"sigma_min": 0.0, "sigma_max": float("inf"), "sigma_data": 0.5}


@pytest.fixture
def reading(tmp_path):
    """read(bytes), by way of a file."""

    def read_bytes(data, how=read):
        path = tmp_path / "net.pkl"
        path.write_bytes(data)
        return how(path)

    return read_bytes


def touch(sentinel):
    return Calls(os.system, f"touch {sentinel}")


def opcodes(text):
    return lambda sentinel: text.replace(b"FILE", str(sentinel).encode())


def named(module, name, argument="FILE"):
    """The call of a name with a word: of protocol 4, so that the name may have dots."""
    return lambda sentinel: built(name_of(module, name), word(argument.replace("FILE", str(sentinel))), b"\x85R")


def within(place):
    """A call of os.system somewhere inside an otherwise whole file."""

    def write(sentinel):
        with their_names():
            whole = content(EDMNetwork(**NETWORKS["ncsnpp"]), "EDMPrecond", **EDM)
            place(whole, touch(sentinel))
            return dumps(whole)

    return write


def in_module(whole, evil):
    whole["ema"].state["_modules"]["model"].state["_modules"]["map_layer0"] = evil


def in_weights(whole, evil):
    whole["ema"].state["_modules"]["model"].state["_modules"]["map_layer0"].state["_parameters"]["weight"] = evil


def in_options(whole, evil):
    whole["ema"].state["_modules"]["model"].state["_init_kwargs"]["dropout"] = evil


def beside_it(whole, evil):
    whole["augment_pipe"] = [evil]


def as_source(whole, evil):
    whole["ema"] = Calls(sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, evil)


def in_numbers(sentinel):
    """Where the numbers of a tensor should be."""
    return dumps(Calls(torch.storage._load_from_bytes, dumps(touch(sentinel))))


def in_last_numbers(sentinel):
    """In the last of the five pickles that precede a tensor's numbers."""
    data = numbers()
    stream = io.BytesIO(data)
    for _ in range(4):
        list(pickletools.genops(stream))
    return dumps(Calls(torch.storage._load_from_bytes, data[: stream.tell()] + dumps(touch(sentinel))))


HOSTILE = {
    "os.system": lambda s: dumps({"ema": touch(s)}),
    "eval": lambda s: dumps({"ema": Calls(eval, f"__import__('pathlib').Path({str(s)!r}).touch()")}),
    "exec": lambda s: dumps({"ema": Calls(exec, f"import pathlib; pathlib.Path({str(s)!r}).touch()")}),
    "open": lambda s: dumps({"ema": Calls(open, str(s), "w")}),
    "importlib": lambda s: dumps({"ema": Calls(importlib.import_module, "os")}),
    "getattr": lambda s: dumps({"ema": Calls(getattr, Calls(dict), "update")}),
    "old name": opcodes(b"cposix\nsystem\n(S'touch FILE'\ntR."),
    "INST": lambda s: b"(" + word(f"touch {s}") + b"iposix\nsystem\n.",
    "OBJ": opcodes(b"(cposix\nsystem\nS'touch FILE'\no."),
    "EXT1": opcodes(b"\x80\x02\x82\x01."),
    "PERSID": opcodes(b"Pstorage\n."),
    "BINPERSID": opcodes(b"\x80\x02X\x01\0\0\0aQ."),
    "another name of an allowed module": named("collections", "UserDict"),
    "a module in an allowed module": named("torch._utils", "torch.serialization.os.system", "touch FILE"),
    "a dotted name": named("torch_utils.persistence", "sys.modules"),
    "a downloader": named("dnnlib.util", "open_url"),
    "torch.load": named("torch", "load"),
    "a storage from a file": named("torch.storage", "UntypedStorage.from_file"),
    "a storage at the top": named("torch", "FloatStorage"),
    "in a module": within(in_module),
    "in the weights": within(in_weights),
    "in the options": within(in_options),
    "beside the network": within(beside_it),
    "as the source": within(as_source),
    "in a tensor's numbers": in_numbers,
    "in a tensor's last numbers": in_last_numbers,
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("how", [read, from_edm])
def test_hostile_files_are_refused_and_nothing_runs(reading, tmp_path, name, how):
    sentinel = tmp_path / "it_ran"
    data = HOSTILE[name](sentinel)
    with pytest.raises(RunError) as caught:
        reading(data, how)
    assert "net.pkl" in one_line(caught.value)
    assert not sentinel.exists()


@pytest.mark.parametrize("name", ["os.system", "eval", "old name", "INST"])
def test_the_traps_would_have_worked(tmp_path, name):
    sentinel = tmp_path / "it_ran"
    pickle.loads(HOSTILE[name](sentinel))
    assert sentinel.exists()


def test_hostile_arguments_of_what_is_allowed(reading):
    tensor = name_of("torch._utils", "_rebuild_tensor_v2")
    dictionary = name_of("collections", "OrderedDict")
    meta = name_of("torch_utils.persistence", "_reconstruct_persistent_obj")
    module = name_of("torch.nn.modules.container", "ModuleDict")
    scalar = name_of("numpy.core.multiarray", "scalar")
    kind = name_of("numpy", "dtype") + word("O8") + b"\x85R"
    for data in (
        built(tensor, b"(", word("a"), word("b"), word("c"), b"tR"),
        built(tensor, b")R"),
        built(dictionary, b"(", b"(K\x01K\x02tt", b"R"),
        built(meta, b"]\x85R"),
        built(meta, b"}\x85R"),
        built(meta, b"}", word("class_name"), b"Ns", word("state"), b"}s\x85R"),
        built(module, b")R}bb"),  # a state twice, and of nothing
        built(module, b")R}b}b"),
        built(dictionary, b")R}b"),
        built(module, b"}b"),
        built(b"]", b")R"),  # a list is called
        built(word("a"), b")R"),
        built(module, b")R", b")R"),
        built(module, b"K\x01R"),  # arguments that are no tuple
        built(scalar, kind, b"C\x08", b"\0" * 8, b"\x86R"),
        built(scalar, name_of("numpy", "dtype") + word("f8") + b"\x85R", b"C\x02\0\0\x86R"),
        built(b"}", b"](K\x01K\x02es"),
        built(b"}", b"]K\x01s"),  # a list as a key
        built(b"}", b"(K\x01u"),  # a key without its value
        built(b"\x8f", b"()\x90"),  # a tuple in a set
        built(b"K\x01", b"K\x02a"),  # appended to a number
        built(b"(((", b"K\x01K\x02a"),
        built(b"t"), built(b"a"), built(b""), built(b"NN"), built(b"h\x05"), built(b"("), built(b"\x93"),
        built(b"K\x01K\x02\x93"), built(b"\x85"), built(b"b"), built(b"R"),
    ):  # fmt: skip
        with pytest.raises(RunError) as caught:
            reading(data)
        one_line(caught.value)
