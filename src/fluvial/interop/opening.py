"""Any model by its name: a run, a diffusers pipeline or network, in a folder or on the hub; and onto the hub again.

model = load("runs/a")                            # as fl.train and fl.save write it
model = load("pipelines/ddpm")                    # as diffusers saves pipelines and single networks
model = load("owner/name@main")                   # on the hub, either
push_to_hub(model, "owner/name")
"""

from __future__ import annotations

import os
import tempfile
import textwrap
from pathlib import Path
from typing import Any

from torch import nn

from fluvial import systems, training
from fluvial.convention import Convention
from fluvial.errors import OptionError, RunError, one_of
from fluvial.interop import folders, hub
from fluvial.interop.card import facts, write_card
from fluvial.interop.conventions import in_words
from fluvial.interop.diffusers_in import from_diffusers, opened
from fluvial.model import Model, convert
from fluvial.systems.base import INDEX
from fluvial.training.atomic import read_json
from fluvial.training.checkpoints import WEIGHTS, read_config
from fluvial.training.pairs import MANIFEST

Source = str | os.PathLike[str]


def load(
    source: Source,
    network: nn.Module | None = None,
    weights: str = "ema",
    *,
    revision: str | None = None,
    token: str | None = None,
) -> Any:
    """The model of a folder, or of that name on the hub, on the CPU and ready to sample; or the `System` there.

        model = fl.load("runs/a")
        model = fl.load("owner/name")

    A folder here always comes before a name on the hub. What it holds decides: a run, or a model that `fl.save` or
    `fl.push_to_hub` wrote, comes back as it was; a pipeline or a network of diffusers' as by `from_diffusers`. Only
    JSON and safetensors are read, and of the hub only those files are downloaded that the model needs.

    Args:
        source: a folder, or "owner/name[@revision]" on the hub.
        network: a network of the class that was saved, for classes that Fluvial does not build itself. It is filled
            in place.
        weights: "ema", the averaged weights where the folder has them; or "raw". A folder of diffusers' has one set.
        revision: a branch, tag or commit on the hub.
        token: for what is private there; default: that of the login.

    Raises:
        OptionError: for other `weights`; for a network where it is of no use; for a class of diffusers', or a
            scheduler, that is not known here.
        RunError: for what is neither a folder nor on the hub; for damaged files, pickles, weights that do not fit.
    """
    if weights not in WEIGHTS:
        raise one_of("kind of weights", weights, WEIGHTS)
    folder = hub.local(source, revision, token)
    kind = folders.layout(folder).kind
    if kind == folders.MODEL:
        return training.load(folder, network, weights)
    if kind == folders.SYSTEM:
        return systems.load(folder)
    if network is not None:
        raise OptionError(f"network is given, and {source} says which it has; expected none")
    return from_diffusers(folder)


# The name that users of other libraries look for.
from_pretrained = load


def describe(source: Source, *, revision: str | None = None, token: str | None = None) -> dict[str, str]:
    """A model or system in words, of a folder or on the hub: what each thing is called, and what it is.

    Of a folder of diffusers' no weights are read, and none are downloaded. Folders of pairs, of latents, of an
    autoencoder and of a CLIP are described too.

    Raises:
        RunError: for what is none of these.
    """
    folder = hub.local(source, revision, token, weights=False)
    part = systems.describe_part(folder)
    if part is not None:
        return part
    if (folder / MANIFEST).is_file():
        return training.describe(folder)
    found = folders.layout(folder)
    if found.kind == folders.MODEL:
        folder = hub.local(source, revision, token)
        first, *rest = training.describe(folder).items()
        convention = in_words(Convention.from_config(read_config(folder)["convention"]))
        return dict([first, ("convention", convention), *rest])
    if found.kind == folders.SYSTEM:
        return _describe_system(hub.local(source, revision, token))
    words = {key.lower(): value for key, value in facts(from_diffusers(opened(folder, weights=False))).items()}
    what = f"a {found.name}" if found.kind == folders.PIPELINE else f"a {found.name} with its scheduler"
    return {"model": f"{what} of diffusers'", **{key: value.replace("`", "") for key, value in words.items()}}


def _describe_system(folder: Path) -> dict[str, str]:
    index = read_json(folder / INDEX)
    parts = {}
    for name in index["models"]:
        convention = Convention.from_config(read_config(folder / name)["convention"])
        parts[name] = f"{in_words(convention)}; samples {' x '.join(map(str, convention.shape or ('of any shape',)))}"
    settings = {key.replace("_", " "): str(value) for key, value in index["settings"].items()}
    return {"system": f"{index['system']}: {', '.join(index['models'])}", **parts, **settings}


def save_converted(source: Source, out: Source, path: Any = None, prediction: Any = None) -> Model:
    """Writes the model of a folder, or of the hub, into a folder in another notation, around the same weights."""
    folder = hub.local(source)
    if folders.layout(folder).kind == folders.MODEL:
        return training.convert_run(folder, out, path, prediction)
    converted = convert(load(folder), path, prediction)
    training.save(converted, out)
    return converted


def push_to_hub(
    model: Model,
    repo: str,
    *,
    ema: Model | None = None,
    private: bool | None = None,
    token: str | None = None,
    license: str | None = None,
    message: str | None = None,
) -> str:
    """Uploads a model, with a card that says what its weights do not; `fl.load(repo)` brings it back as it is.

        fl.push_to_hub(run.ema, "owner/name", license="apache-2.0")

    The files are those of `fl.save`, and README.md, see `write_card`.

    Args:
        model: any model that `fl.save` saves.
        repo: "owner/name"; it is made where it does not exist.
        ema: the same model with averaged weights, to be kept beside the others.
        private: whether a new repository is; None: as the owner has it.
        token: one that may write there; default: that of the login.
        license: as the hub spells it, such as "apache-2.0".
        message: of the commit.

    Returns:
        The address of the model's page.

    Raises:
        OptionError: for another kind of name, a model that cannot be saved, or where huggingface_hub is missing.
        RunError: where the hub cannot be reached, or refuses.
    """
    hub.require_repo(repo)
    library = hub.library()
    with tempfile.TemporaryDirectory() as temporary:
        folder = training.save(model, Path(temporary) / "model", ema)
        write_card(model if ema is None else ema, folder, name=repo, license=license)
        try:
            api = library.HfApi(token=token, library_name="fluvial")
            page = str(api.create_repo(repo, private=private, exist_ok=True))
            # Averaged weights of an earlier model would be taken for this one's.
            api.upload_folder(
                repo_id=repo,
                folder_path=str(folder),
                commit_message=message or "Upload a Fluvial model",
                delete_patterns=["ema.safetensors"],
            )
        except Exception as error:  # the hub's, and those of the libraries of its connection, which differ
            reason = textwrap.shorten(str(error), 160, placeholder=" …")
            raise RunError(
                f"{repo} could not be written on the hub ({type(error).__name__}: {reason}); expected a repository "
                "that this machine can reach, and a token that may write there: hf auth login, or token=…"
            ) from error
    return page
