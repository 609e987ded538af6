"""The Hugging Face hub: a model's folder by its name there, of JSON and safetensors alone.

fetch("owner/name"), fetch("owner/name@revision")        a folder of that model, in the hub's own cache
"""

from __future__ import annotations

import os
import re
import textwrap
from pathlib import Path
from typing import Any

from fluvial.errors import OptionError, RunError
from fluvial.interop.folders import layout, weight_patterns

_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def require_repo(repo: str) -> None:
    """Refuses what is no name of a model on the hub."""
    named = _ID.fullmatch(repo)
    if named is None or named["revision"] is not None:
        raise OptionError(f"repo is {repo!r}; expected owner/name")


def library() -> Any:
    """huggingface_hub itself.

    Raises:
        OptionError: where it is not installed.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise OptionError(
            'the hub needs huggingface_hub, which is not installed; expected: pip install "fluvial[diffusers]"'
        ) from error
    return huggingface_hub


def local(
    source: str | os.PathLike[str], revision: str | None = None, token: str | None = None, weights: bool = True
) -> Path:
    """The folder of a model: itself, where there is one of that name; else that of the hub.

    Args:
        source: a folder, or "owner/name" or "owner/name@revision" on the hub. A folder always comes first.
        revision: a branch, tag or commit on the hub.
        token: for what is private there; default: that of the login.
        weights: whether the weights are wanted, or only what describes them.

    Raises:
        OptionError: for a revision of a folder, or two of them.
        RunError: for what is neither here nor there, and for files that lie outside what was downloaded.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise OptionError(f"revision is {revision!r} and {source} is a folder here; expected none")
        return folder
    named = _ID.fullmatch(source) if isinstance(source, str) and not folder.exists() else None
    if named is None:
        problem = "is a file" if folder.exists() else "does not exist"
        raise RunError(f"{source} {problem}; expected a folder, or a name on the hub such as owner/name")
    if revision is not None and named["revision"] not in (None, revision):
        raise OptionError(f"revision is {revision!r} and the name says {named['revision']!r}; expected one of them")
    return _fetched(named["repo"], revision or named["revision"], token, weights)


def _fetched(repo: str, revision: str | None, token: str | None, weights: bool) -> Path:
    folder = _snapshot(repo, revision, token, ["*.json"])
    if weights:
        # A branch may move between the two: the second asks for what the first one got.
        commit = folder.name if _COMMIT.fullmatch(folder.name) else revision
        folder = _snapshot(repo, commit, token, ["*.json", *weight_patterns(folder, layout(folder))])
    return folder


def _snapshot(repo: str, revision: str | None, token: str | None, patterns: list[str]) -> Path:
    """The folder of a repository's files of these names; of one that is empty, too."""
    hub = library()
    try:
        folder = Path(hub.snapshot_download(repo, revision=revision, token=token, allow_patterns=patterns))
    except Exception as error:  # the hub's, of the connection's libraries, which differ, and of the disk
        where = repo if revision is None else f"{repo}@{revision}"
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 160, placeholder=" …")
        raise RunError(
            f"{where} is no folder here (in {Path.cwd()}) and could not be had from the hub ({reason}); expected "
            "a folder, or the name of a model on the hub that this machine can reach"
        ) from error
    _require_inside(folder)
    return folder


def _require_inside(folder: Path) -> None:
    """Refuses links to files that the download did not bring: the hub's cache links to its own blobs alone."""
    root = (folder.parents[1] if folder.parent.name == "snapshots" else folder).resolve()
    for path in folder.rglob("*"):
        if not path.resolve().is_relative_to(root):
            raise RunError(f"{path} leads out of the download, to {path.resolve()}; expected files of its own")
