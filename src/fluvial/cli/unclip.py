"""`fluvial train-clip`, `train-prior`, `train-decoder`, `unclip` and `draw`: images from words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fluvial import __version__, interop, sheets, solvers, systems, training
from fluvial.cli.app import app
from fluvial.cli.common import interruptible, on_device, say
from fluvial.errors import OptionError
from fluvial.guidance import CFG
from fluvial.sampling import DEFAULT_SOLVER, DEFAULT_STEPS
from fluvial.training import atomic

Data = Annotated[
    str, typer.Argument(help="digits, file.npz with captions, a folder with cat.txt beside cat.png, or labelled data.")
]
Words = Annotated[
    str | None, typer.Option(help="What the classes of labelled data are called, one/1,two/2,…; default: their names.")
]
Size = Annotated[int | None, typer.Option(help="Resize and crop images to this.")]
Steps = Annotated[int, typer.Option(help="Training steps.")]
Batch = Annotated[int, typer.Option(help="Samples per step.")]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn.")]
Clip = Annotated[str, typer.Argument(help="A folder of train-clip, one of transformers', or owner/name on the hub.")]
OutRun = Annotated[Path, typer.Option(help="The run folder; an existing one is resumed.")]
Rate = Annotated[float | None, typer.Option(help="Learning rate.")]
PATHS = "rectified, cosine, vp, subvp, ve, edm"
Path_ = Annotated[str, typer.Option("--path", help=f"{PATHS}.")]


def _source(data: str, words: str | None, image_size: int | None) -> systems.Captioned:
    return systems.open_captioned(data, None if words is None else words.split(","), image_size=image_size)


@app.command("train-clip")
def train_clip(
    data: Data,
    out: Annotated[Path, typer.Option(help="The folder to write; an interrupted one is resumed.")],
    steps: Steps = 2000,
    batch_size: Batch = 256,
    seed: Seed = 0,
    dim: Annotated[int, typer.Option(help="Numbers in an embedding.")] = 64,
    width: Annotated[int, typer.Option(help="Of both transformers, a multiple of 32.")] = 64,
    layers: Annotated[int, typer.Option(help="Of each transformer.")] = 3,
    lr: Rate = None,
    words: Words = None,
    image_size: Size = None,
) -> None:
    """Train a small CLIP on captioned images. The same command resumes."""
    source = _source(data, words, image_size)
    options: dict[str, Any] = {"seed": seed, "dim": dim, "width": width, "layers": layers}
    options |= {} if lr is None else {"lr": lr}
    with interruptible():
        clip = systems.train_clip(source, out, steps, batch_size, **options)
    say(f"{out}: CLIP {clip.hash}, {len(clip.tokenizer)} words, embeddings of {clip.dim} numbers.")


@app.command("train-prior")
def train_prior(
    data: Data,
    clip: Clip,
    out: OutRun,
    steps: Steps = 4000,
    batch_size: Batch = 128,
    seed: Seed = 0,
    lr: Rate = None,
    path: Annotated[str | None, typer.Option(help=f"{PATHS}. Default: rectified.")] = None,
    autoregressive: Annotated[
        bool, typer.Option("--autoregressive", help="A transformer over quantised embeddings, in place of diffusion.")
    ] = False,
    words: Words = None,
    image_size: Size = None,
) -> None:
    """Train unCLIP's prior: from a text to the embedding of an image. The same command resumes."""
    if autoregressive and path is not None:
        raise OptionError(f"--path is {path}, and an autoregressive prior has none; expected one of the two options")
    options: dict[str, Any] = {"batch_size": batch_size, "seed": seed} | ({} if lr is None else {"lr": lr})
    found = systems.embedded(_source(data, words, image_size), on_device(systems.CLIP.load(clip)))
    with interruptible():
        if autoregressive:
            systems.train_autoregressive_prior(found, out, steps, **options)
        else:
            systems.train_prior(found, out, steps, path=path or "rectified", **options)
    _done(out, steps)


@app.command("train-decoder")
def train_decoder(
    data: Data,
    clip: Clip,
    out: OutRun,
    steps: Steps = 4000,
    batch_size: Batch = 128,
    seed: Seed = 0,
    lr: Rate = None,
    sees: Annotated[str, typer.Option(help="embedding; embedding,text; or text alone, to compare with.")] = "embedding",
    width: Annotated[int, typer.Option(help="Of its U-Net, a multiple of 8.")] = 32,
    path: Path_ = "rectified",
    words: Words = None,
    image_size: Size = None,
) -> None:
    """Train unCLIP's decoder: from the embedding of an image to the image. The same command resumes."""
    options: dict[str, Any] = {"width": width, "sees": tuple(sees.split(","))}
    options |= {} if lr is None else {"lr": lr}
    found = systems.embedded(_source(data, words, image_size), on_device(systems.CLIP.load(clip)))
    with interruptible():
        systems.train_decoder(found, out, steps, batch_size=batch_size, seed=seed, path=path, **options)
    _done(out, steps)


def _done(out: Path, steps: int) -> None:
    from fluvial.show.run_report import write

    if training.is_main_process():
        say(f"{out}: {steps} steps done. Report: {write(out)}")


@app.command()
def unclip(
    prior: Annotated[str, typer.Argument(help="A run of train-prior.")],
    decoder: Annotated[str, typer.Argument(help="A run of train-decoder.")],
    clip: Clip,
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    weights: Annotated[str, typer.Option(help="ema or raw.")] = "ema",
) -> None:
    """Put a prior, a decoder and their CLIP together, in one folder that loads as one."""
    parts = [interop.load(run, weights=weights) for run in (prior, decoder)]
    training.save(systems.UnCLIP(*parts, systems.CLIP.load(clip)), out)  # type: ignore[arg-type]
    say(f'{out}: draw from it with fluvial draw {out} "a three"')


@app.command()
def draw(
    folder: Annotated[str, typer.Argument(help="A folder of unclip.")],
    texts: Annotated[list[str], typer.Argument(help="What to draw, each in quotes.")],
    n: Annotated[int, typer.Option("-n", help="How many images of each.")] = 8,
    solver: Annotated[str, typer.Option(help=f"Of the decoder: {', '.join(solvers.names())}.")] = DEFAULT_SOLVER,
    steps: Annotated[int, typer.Option(help="Of the decoder's solver.")] = DEFAULT_STEPS,
    guidance: Annotated[float, typer.Option(help="The decoder's scale; 1 is none.")] = 1.0,
    prior_guidance: Annotated[float, typer.Option(help="The prior's scale; 1 is none.")] = 1.0,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="The sheet to write.")] = Path("samples.png"),
) -> None:
    """Draw images of texts: a row of the sheet for each. The file says how it was made."""
    if n < 1:
        raise OptionError(f"-n is {n}; expected 1 or more images")
    system = interop.load(folder)
    if not isinstance(system, systems.UnCLIP):
        raise OptionError(f"{folder} holds no unCLIP; expected a folder of fluvial unclip")
    scales = {"prior": prior_guidance, "decoder": guidance}
    options: dict[str, Any] = {"solver": {"decoder": solver}, "steps": {"decoder": steps}, "seed": seed}
    options["guidance"] = {name: CFG(scale) for name, scale in scales.items() if scale != 1.0}
    x = on_device(system).draw([text for text in texts for _ in range(n)], **options).cpu()
    parts = {name: training.model_hash(model) for name, model in system.models.items()} | {"clip": system.clip.hash}
    info = {"fluvial": __version__, "run": folder, "model": parts, "texts": texts, "solver": solver, "steps": steps}
    info |= {"guidance": scales, "seed": seed}
    with atomic.writing(out):
        picture = sheets.sheet(x, columns=n, normalisation=system.normalisation, labels=texts)
        sheets.save(picture, out, info)
    say(f"{len(texts)} x {n} images: {out}")
