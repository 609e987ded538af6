"""Files that are whole or not there: written beside their place, flushed to the disk, then renamed.

Tensors are safetensors, everything else is JSON: nothing written here can run code when it is read.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fluvial.errors import RunError

_SUFFIX = ".unfinished"


@contextlib.contextmanager
def writing(where: Path, then: str = "") -> Iterator[None]:
    """Turns what a disk may answer into one clear line; `then` says what is left and how to go on."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors reports the system's errors as text.
        number = getattr(error, "errno", None)
        if number is None and (match := re.search(r"os error (\d+)", str(error))):
            number = int(match[1])
        full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason = f"no space is left ({os.strerror(number)})" if full and number else str(error)
        advice = "free some space" if full else "mend that"
        raise RunError(f"{where} cannot be written: {reason}; {advice} and run it again{then}") from error


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Has `write` make a file beside `path`, and puts it in its place: readers see the old one or the new one."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}{_SUFFIX}")
    try:
        write(unfinished)
        sync(unfinished)
        os.replace(unfinished, path)
        sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def replace_folder(path: Path, write: Callable[[Path], object]) -> None:
    """The same for a folder, whose files are synced one by one. An old folder at `path` is removed."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}{_SUFFIX}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        write(unfinished)
        for file in unfinished.iterdir():
            sync(file)
        sync(unfinished)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(unfinished, path)
        sync(path.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Removes what a process that was killed left unfinished."""
    for path in (*folder.glob(f".*{_SUFFIX}"), *folder.glob(".*.part")):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    replace(path, lambda file: file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); expected the JSON that Fluvial wrote there") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} holds a {type(content).__name__}; expected the JSON object that Fluvial wrote there")
    return content


def write_tensors(path: Path, tensors: Mapping[str, Tensor], **metadata: Any) -> None:
    """A safetensors file, neither atomic nor synced by itself; metadata (one entry) are kept as text."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    path.touch()
    mode = path.stat().st_mode
    # One entry at most: safetensors writes several in any order, and equal runs should be equal files.
    save_file(plain, path, {key: str(value) for key, value in metadata.items()} or {"format": "pt"})
    path.chmod(mode)  # safetensors would keep it from everybody but its owner


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and its metadata.

    Raises:
        RunError: for a file that is missing, damaged or cut short.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in [*file.keys()]}, file.metadata() or {}
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing; expected the tensors of a run there") from error
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(
            f"{path} is damaged or cut short ({reason}); expected a whole safetensors file: restore it from a copy, "
            "or train again into another folder"
        ) from error
