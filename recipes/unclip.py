"""Images from words by way of CLIP embeddings: does the detour pay, and what does it keep?

    python recipes/unclip.py --out unclip                                   # the digits inside scikit-learn, 8x8
    python recipes/unclip.py --out unclip --mnist mnist.npz                 # train_x train_y test_x test_y, to 14x14
    python recipes/unclip.py --out unclip --tiles tiles.npz                 # rgba, caption and path of each, to 16x16

Of each data set: a small CLIP, a prior of each kind and a decoder, and beside them a decoder that sees the text alone,
of the same size and as many steps. Digits are captioned by their labels, some combinations of words being kept for the
test; a tenth of the tiles is kept for it. Measured: CLIP without training for it (zero-shot); whether a classifier that
knows nothing of captions recognises what was asked for, and the squared Fréchet distance on its features, for several
guidances; whether variations keep the class. Parts that are finished are not trained again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

import fluvial as fl
from fluvial import measure, sheets, systems, training
from fluvial.guidance import CFG
from fluvial.systems.captions import DIGITS, caption_labels, on_white, phrases
from fluvial.systems.unclip import UnCLIP

SCALES = ((1.0, 1.0), (2.0, 1.0), (1.0, 2.0), (2.0, 2.0))
SEEN = ("a {}", "the digit {}", "the handwritten {}", "number {}", "{}")
NEW = ("handwritten number {}", "digit {}")  # known words, in an order that no training caption has
HOW: dict[str, Any] = {"solver": "heun", "steps": 10}


@dataclass
class Problem:
    """A captioned data set, what of it is kept for the test, and how long to train.

    Attributes:
        source: to train on.
        images, labels: kept for the test, (n, C, H, W) and (n,).
        prompts: what each class is called, for CLIP without training for it.
        asked: captions to draw and the class each means, by where they come from.
        steps: of CLIP, the prior, each decoder, and the autoregressive prior.
        clip, decoder: their sizes.
    """

    name: str
    source: systems.Captioned
    train_labels: Tensor
    images: Tensor
    labels: Tensor
    prompts: list[list[str]]
    asked: dict[str, tuple[list[str], Tensor]]
    steps: tuple[int, int, int, int]
    clip: dict[str, Any]
    decoder: dict[str, Any]


def digits(mnist: str | None, side: int, n: int) -> Problem:
    """MNIST, shrunk to this side, or scikit-learn's digits; captions by the labels."""
    if mnist is None:
        source = training.open_source("digits")
        order = fl.random.permutation(len(source), seed=0)
        kept = [source.batch(part) for part in (order[:1500], order[1500:])]
        train, test = ((rows["data"] / 16, rows["label"]) for rows in kept)
    else:
        with numpy.load(mnist) as file:
            arrays = [torch.from_numpy(file[name]) for name in ("train_x", "train_y", "test_x", "test_y")]
        pixels = [F.adaptive_avg_pool2d(x[:, None].float() / 255, side) for x in (arrays[0], arrays[2])]
        train, test = (pixels[0], arrays[1].long()), (pixels[1][:2000], arrays[3][:2000].long())
    # Of two combinations of words that mean the same one is for training and one for the test.
    seen = phrases(DIGITS, SEEN)
    held = [[words[i] for i in (2, 7)] for words in seen]
    learned = [[word for word in words if word not in kept] for words, kept in zip(seen, held)]
    told = training.open_source({"data": train[0]})
    label = torch.arange(n) % 10
    kinds = {"as in training": learned, "combinations kept for the test": held, "new phrases": phrases(DIGITS, NEW)}
    asked = {name: (caption_labels(label, words, seed=9), label) for name, words in kinds.items()}
    small = mnist is None
    steps = (600, 4000, 1500, 1500) if small else (1500, 6000, 4000, 3000)
    source = systems.Captioned(told, caption_labels(train[1], learned), name="digits" if small else f"mnist {side}")
    return Problem(source.name, source, train[1], *test, learned, asked, steps, {}, {"width": 32})


def tiles(path: str, side: int, n: int) -> Problem:
    """Pixel art with the words of its file names; classes are the commonest folders, the test a tenth of all."""
    with numpy.load(path, allow_pickle=False) as file:
        data = F.adaptive_avg_pool2d(on_white(torch.from_numpy(file["rgba"]).movedim(-1, 1)).float() / 255, side)
        captions, places = file["caption"].astype(str).tolist(), [str(p).split("/")[0] for p in file["path"]]
    names, counts = numpy.unique(places, return_counts=True)
    # What lies in "UNUSED" has nothing in common to be seen.
    known = [str(name) for name in names[numpy.argsort(-counts)] if name != "UNUSED"][:6]
    label = torch.tensor([known.index(p) if p in known else -1 for p in places])
    rows = (label >= 0).nonzero()[:, 0]
    rows = rows[fl.random.permutation(len(rows), seed=0)]
    cut = len(rows) // 10
    train, test = rows[cut:], rows[:cut]
    source = systems.Captioned(
        training.open_source({"data": data[train]}), [captions[i] for i in train.tolist()], name="tiles"
    )
    chosen = {"as in training": train[:n], "captions kept for the test": test.repeat(-(-n // len(test)))[:n]}
    asked = {kind: ([captions[i] for i in at.tolist()], label[at]) for kind, at in chosen.items()}
    sizes = {"dim": 128, "width": 128}
    # A class is called what some of its tiles are.
    prompts = [[captions[i] for i in train[label[train] == k][:50].tolist()] for k in range(len(known))]
    steps = (3000, 12_000, 5000, 3000)
    return Problem("tiles", source, label[train], data[test], label[test], prompts, asked, steps, sizes, {"width": 48})


def judge_of(problem: Problem) -> measure.Classifier:
    """A classifier of the images, which knows nothing of captions."""
    rows = fl.random.permutation(len(problem.source), seed=1)[:12_000]
    return measure.train_classifier(problem.source.batch(rows)["data"], problem.train_labels[rows], epochs=8)


def trained(problem: Problem, out: Path, share: float, batch: int) -> tuple[dict[str, UnCLIP], Any]:
    """unCLIP under either prior, and the decoder that sees the text alone."""
    first, second, third, fourth = (max(2, round(steps * share)) for steps in problem.steps)
    clip = systems.train_clip(problem.source, out / "clip", first, **problem.clip)
    data = systems.embedded(problem.source, clip)
    prior = systems.train_prior(data, out / "prior", second)
    how: dict[str, Any] = {"batch_size": batch, **problem.decoder}
    decoder = systems.train_decoder(data, out / "decoder", third, **how)
    plain = systems.train_decoder(data, out / "text-only", third, sees=("text",), **how)
    chain = systems.train_autoregressive_prior(data, out / "autoregressive", fourth)
    both = {"prior and decoder": UnCLIP(prior.ema, decoder.ema, clip)}
    both["autoregressive prior and decoder"] = UnCLIP(chain.ema, decoder.ema, clip)
    return both, systems.with_null(plain.ema)


def in_parts(n: int, draw: Callable[[slice], Tensor]) -> Tensor:
    """Images that are drawn 250 at a time."""
    return torch.cat([draw(slice(at, min(at + 250, n))) for at in range(0, n, 250)])


def measured(
    problem: Problem, both: dict[str, UnCLIP], plain: Any, judge: measure.Classifier, out: Path
) -> dict[str, Any]:
    """All figures of a data set; writes the sheets."""
    system = both["prior and decoder"]
    low, high = float(problem.images.min()), float(problem.images.max())
    real = judge.features(problem.images)
    rows = fl.random.permutation(len(problem.source), seed=2)[: len(problem.images)]
    floor = measure.frechet(judge.features(problem.source.batch(rows)["data"]), real)
    clip, found = system.clip, []

    def row(name: str, kind: str, x: Tensor, labels: Tensor, **scales: float) -> None:
        x = x.clamp(low, high)
        recognised = measure.share_recognised(judge, x, labels)
        found.append({"arm": name, "captions": kind, **scales, "recognised": recognised})
        found[-1]["frechet"] = measure.frechet(judge.features(x), real)
        print(found[-1], flush=True)

    for number, (kind, (texts, labels)) in enumerate(problem.asked.items()):
        for (name, arm), (prior, decoder) in product(both.items(), SCALES if number == 0 else SCALES[-1:]):
            guide = {"prior": CFG(prior), "decoder": CFG(decoder)}

            def draw(part: slice, arm: UnCLIP = arm, guide: Any = guide, texts: list[str] = texts) -> Tensor:
                return arm.draw(texts[part], guidance=guide, seed=1, first=part.start, **HOW)

            row(name, kind, in_parts(len(texts), draw), labels, prior=prior, decoder=decoder)
        for scale in (1.0, 2.0) if number == 0 else (2.0,):

            def alone(part: slice, scale: float = scale, texts: list[str] = texts) -> Tensor:
                told = {"text": clip.texts(texts[part])}
                how: dict[str, Any] = {"seed": 1, "first": part.start, **HOW}
                return fl.sample(plain, len(told["text"]), cond=told, guidance=CFG(scale), **how)

            row("text alone", kind, in_parts(len(texts), alone), labels, decoder=scale)
    right = judge.predict(problem.images) == problem.labels
    images, labels = problem.images[right][:100], problem.labels[right][:100]
    variations = system.variations(images, 4, seed=2, **HOW)
    kept = measure.share_recognised(judge, variations.flatten(0, 1).clamp(low, high), labels.repeat_interleave(4))
    draw_sheets(problem, system, plain, variations, images, out)
    return {
        "judge": judge.description,
        "clip": {"zero-shot, images kept for the test": clip.accuracy(problem.images, problem.labels, problem.prompts)},
        "floor": floor,
        "variations keep the class": kept,
        "rows": found,
    }


def draw_sheets(problem: Problem, system: UnCLIP, plain: Any, variations: Tensor, images: Tensor, out: Path) -> None:
    """Text to image, variations and interpolations, as PNG."""
    how: dict[str, Any] = {"normalisation": system.normalisation}
    guide = {"prior": CFG(2.0), "decoder": CFG(2.0)}
    info: dict[str, Any] = {"recipe": "unclip", "data": problem.name, "clip": system.clip.hash}
    kind = list(problem.asked)[1]
    texts = list(dict.fromkeys(problem.asked[kind][0]))[:10]
    repeated = [text for text in texts for _ in range(8)]
    ours = system.draw(repeated, guidance=guide, seed=3, **HOW)
    told = {"text": system.clip.texts(repeated)}
    theirs = fl.sample(plain, len(repeated), cond=told, guidance=CFG(2.0), seed=3, **HOW)
    pictures = [sheets.sheet(ours, columns=8, labels=texts, **how), sheets.sheet(theirs, columns=8, **how)]
    titles = ["prior and decoder, guidance 2 and 2", "text alone, guidance 2"]
    sheets.save(sheets.beside(pictures, titles), out / "text.png", info | {"captions": kind})
    first = torch.cat([images[:10, None], variations[:10]], 1).flatten(0, 1)
    pictures = [sheets.sheet(first, columns=5, **how)]
    sheets.save(sheets.beside(pictures, ["the image, 4 variations"]), out / "variations.png", info)
    ways = [
        [system.interpolate(images[2 * k], images[2 * k + 1], 8, noise, seed=4, steps=18) for k in range(5)]
        for noise in ("shared", "encoded")
    ]
    pictures = [sheets.sheet(torch.cat(way), columns=8, **how) for way in ways]
    sheets.save(sheets.beside(pictures, ["one noise", "the images' own noises"]), out / "between.png", info)


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = ["| arm | captions | guidance of prior, decoder | recognised | Fréchet |", "|---|---|---|---|---|"]
    for row in found["rows"]:
        scales = ", ".join(f"{row[name]:g}" for name in ("prior", "decoder") if name in row)
        cells = [row["arm"], row["captions"], scales, f"{row['recognised']:.1%}", f"{row['frechet']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    zero = next(iter(found["clip"].values()))
    return "\n".join([
        *lines,
        "",
        f"Zero-shot {zero:.1%}; variations keep the class {found['variations keep the class']:.1%}; "
        f"real to real {found['floor']:.3f}. Judge: {found['judge']}.",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mnist")
    parser.add_argument("--side", type=int, help="of the images, shrunk: 14 of MNIST's, 16 of tiles")
    parser.add_argument("--tiles")
    parser.add_argument("--share", type=float, default=1.0, help="of the training steps")
    parser.add_argument("--batch-size", type=int, default=128, help="of the decoders")
    parser.add_argument("-n", type=int, default=500, help="samples behind every figure")
    given = parser.parse_args()
    problems = [tiles(given.tiles, given.side or 16, given.n)] if given.tiles else []
    if given.mnist or not problems:
        problems.insert(0, digits(given.mnist, given.side or 14, given.n))
    for problem in problems:
        out = given.out / problem.name.replace(" ", "-")
        both, plain = trained(problem, out, given.share, given.batch_size)
        found = measured(problem, both, plain, judge_of(problem), out)
        (out / "figures.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(table(found), flush=True)
        fl.save(both["prior and decoder"], out / "system")


if __name__ == "__main__":
    main()
