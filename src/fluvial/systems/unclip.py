"""unCLIP: an image from a text by way of its CLIP embedding.

    P(x | y) = P(x | c, y) P(c | y),    x the image, y the text, c the embedding of the image

The prior draws an embedding for a text, the decoder an image for an embedding. Each is a model like any other, with
its own path, solver, steps and guidance.

    system = UnCLIP(prior, decoder, clip)
    system.draw(["a three", "a cat"], guidance={"prior": CFG(2.0), "decoder": CFG(2.0)})
    system.variations(images, 4)

Source: Ramesh, Dhariwal, Nichol, Chu, Chen: Hierarchical text-conditional image generation with CLIP latents (2022),
https://arxiv.org/abs/2204.06125
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from fluvial import random, sampling
from fluvial.errors import OptionError, RunError, ShapeError, one_of
from fluvial.inputs import checked_seed
from fluvial.model import Model
from fluvial.systems import autoregressive
from fluvial.systems.base import Start, System, options_of
from fluvial.systems.clip import CLIP
from fluvial.systems.unclip_networks import with_null

PRIOR, DECODER = NAMES = ("prior", "decoder")
_ODD = 0x9E3779B97F4A7C15


class UnCLIP(System):
    """A prior over CLIP embeddings, and a decoder of them into images.

    Args:
        prior: draws an embedding (B, D) for the condition "text", a text's embedding (B, D). An autoregressive one does
            so in one jump, whatever solver and steps are named, and takes CFG(scale) as its guidance.
        decoder: draws an image (B, C, H, W) for the condition "embedding", and "text" where it was built to see it.
        clip: embeds texts and images.

    Sampled with cond={"text": token ids (B, L)}, as `clip.tokens` gives them; a row of zeros is no text. Guidance by
    stage strengthens each stage's own conditions, all of them together.

    Raises:
        ShapeError, OptionError: for parts that do not fit together; says which, and how.
    """

    kind: ClassVar[str] = "unclip"

    def __init__(self, prior: Model, decoder: Model, clip: CLIP) -> None:
        self.models, self.clip = {PRIOR: prior, DECODER: decoder}, clip
        self._check()
        self.shape, self.normalisation = decoder.shape, decoder.normalisation

    def _check(self) -> None:
        dim = self.clip.dim
        shape = self.models[PRIOR].shape
        if shape is not None and shape != (dim,):
            raise ShapeError(f"the prior makes samples {shape}; expected embeddings ({dim},), as this CLIP has them")
        for name, needed in ((PRIOR, "text"), (DECODER, "embedding")):
            network = self.models[name].network
            widths: Mapping[str, int] | None = getattr(network, "conditions", None)
            if widths is None:
                continue  # a network of the user's own, which does not say
            if needed not in widths:
                raise OptionError(f"the {name} is told {', '.join(widths)}; expected one that is told its {needed}")
            for condition, width in widths.items():
                if width != dim:
                    raise ShapeError(
                        f"the {name}'s {condition} has {width} numbers, and this CLIP's embeddings have {dim}; "
                        "expected the CLIP that it was trained with"
                    )
            known = getattr(network, "clip", None)
            if known not in (None, self.clip.hash):
                raise OptionError(
                    f"the {name} was trained on embeddings of CLIP {known}, and this is {self.clip.hash}; expected that"
                )

    # Sampling

    def stages(self, start: Start | None = None, **options: Any) -> dict[str, Tensor]:
        """The embeddings "prior" (B, D), brought to length 1, and the images "decoder" (B, C, H, W).

        Args:
            start: how many samples; or the prior's noise (B, D), or its shape.
            options: as for `fl.sample`, but for those that ask for more than samples; one given as a mapping by
                "prior" and "decoder" is for these alone. The stages draw from different seeds, made of the one given.

        Raises: as `fl.sample`.
        """
        noise = options.get("noise")
        if start is None and not isinstance(noise, str | Mapping):
            start = options.pop("noise", None)
        cond = dict(options.pop("cond", None) or {})
        tokens = cond.pop("text", None)
        for name in cond:
            raise one_of("condition of unCLIP", name, ["text"])
        options = self._by_stage(options)
        text = None if tokens is None else self.clip.texts(tokens)
        told = {} if text is None else {"text": text}
        own = options_of(PRIOR, options, NAMES)
        if isinstance(self.models[PRIOR].network, autoregressive.AutoregressivePrior):
            own, told = autoregressive.as_asked(own, told)
        found = sampling.sample(self._part(PRIOR), start, cond=told, **own)
        embedding = self.clip.project(found)
        return {PRIOR: embedding, DECODER: self._decoded(embedding, text, options)}

    def draw(self, texts: Sequence[str], **options: Any) -> Tensor:
        """An image (B, C, H, W) for each text; options as for `fl.sample`."""
        return self.sample_with(len(texts), cond={"text": self.clip.tokens(texts)}, **options)

    def decode(self, embedding: Tensor, text: Tensor | None = None, **options: Any) -> Tensor:
        """Images (B, C, H, W) of these embeddings (B, D).

        Args:
            embedding: unit vectors; a row of zeros is none.
            text: token ids (B, L), for a decoder that sees them.
            options: as for `fl.sample`; "noise" may be the decoder's own.
        """
        told = None if text is None else self.clip.texts(text)
        return self._decoded(embedding, told, self._by_stage(options))

    def _decoded(self, embedding: Tensor, text: Tensor | None, options: Mapping[str, Any]) -> Tensor:
        own = options_of(DECODER, options, NAMES)
        noise = own.get("noise")
        start = own.pop("noise") if isinstance(noise, Tensor) else len(embedding)
        model = self._part(DECODER)
        told = {"embedding": embedding} | ({} if text is None else {"text": text})
        widths = getattr(model.network, "conditions", {"embedding": self.clip.dim})
        return sampling.sample(model, start, cond={name: v for name, v in told.items() if name in widths}, **own)

    def _by_stage(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options, with a seed of its own for each stage: with one, their noises would be the same numbers."""
        if options.get("record"):
            raise OptionError("record is for single models; expected none, and system.models['decoder'] for its way")
        seed = options.get("seed")
        if isinstance(seed, Mapping):
            return dict(options)
        seed = checked_seed(seed)
        return {**options, "seed": {PRIOR: seed, DECODER: (seed + _ODD) % 2**64}}

    def _part(self, name: str) -> Model:
        return with_null(self.models[name])

    # From images

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in the decoder's data's units -> their embeddings (B, D)."""
        return self.clip.images(images, self.normalisation)

    def variations(self, images: Tensor, n: int, **options: Any) -> Tensor:
        """n images for each of these: what they have in common with it is what its embedding says.

        Args:
            images: (B, C, H, W), in the units of the decoder's data.
            options: as for `fl.sample`.

        Returns:
            (B, n, C, H, W).
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise OptionError(f"n is {n!r}; expected a whole number of variations, 1 or more")
        made = self.decode(self.embed(images).repeat_interleave(n, 0), **options)
        return made.reshape(len(images), n, *made.shape[1:])

    def interpolate(self, a: Tensor, b: Tensor, n: int, noise: str = "shared", **options: Any) -> Tensor:
        """n images from a to b, along the great circle between their embeddings.

        Args:
            a, b: (C, H, W), in the units of the decoder's data.
            n: 2 or more.
            noise: "shared", the same for all of them; or "encoded", on the great circle between the noises that the
                decoder's ODE turns into a and b themselves, so that the ends are those images.
            options: as for `fl.sample`; with "encoded", those of `fl.encode`.

        Returns:
            (n, C, H, W).
        """
        if noise not in ("shared", "encoded"):
            raise one_of("noise", noise, ("shared", "encoded"))
        if a.ndim != 3 or a.shape != b.shape:
            raise ShapeError(f"a and b have shapes {tuple(a.shape)} and {tuple(b.shape)}; expected (C, H, W) of both")
        if isinstance(n, bool) or not isinstance(n, int) or n < 2:
            raise OptionError(f"n is {n!r}; expected a whole number of images, 2 or more")
        share = torch.linspace(0.0, 1.0, n, dtype=torch.float64)
        device = self.models[DECODER].device
        ends = torch.stack([a, b]).to(device)
        embeddings = self.embed(ends)
        between = slerp(embeddings[:1], embeddings[1:], share)
        if noise == "encoded":
            own = options_of(DECODER, {key: v for key, v in options.items() if key != "seed"}, NAMES)
            z = sampling.encode(self._part(DECODER), ends, cond={"embedding": embeddings}, **own)
            return self.decode(between, noise=slerp(z[:1], z[1:], share), **options)
        seed = options_of(DECODER, self._by_stage(options), NAMES)["seed"]
        z = random.normal(1, a.shape, seed, device=device)
        return self.decode(between, noise=z.expand(n, *a.shape), **options)

    # The protocol

    def to(self, device: torch.device | str) -> Self:
        self.clip.to(device)
        return super().to(device)

    def with_models(self, models: Mapping[str, Model]) -> Self:
        return type(self)(models[PRIOR], models[DECODER], self.clip)

    def write_parts(self, folder: Path) -> dict[str, Any]:
        self.clip.save(folder / "clip")
        return {"clip": self.clip.hash}

    @classmethod
    def read(cls, folder: Path, models: Mapping[str, Model], settings: Mapping[str, Any]) -> Self:
        if set(models) != set(NAMES):
            raise RunError(f"{folder} has the models {', '.join(models) or 'none'}; expected {' and '.join(NAMES)}")
        clip = CLIP.load(folder / "clip")
        if clip.hash != settings.get("clip"):
            raise RunError(
                f"{folder / 'clip'} is CLIP {clip.hash}, and the system was saved with {settings.get('clip')}; "
                "expected that"
            )
        return cls(models[PRIOR], models[DECODER], clip)


def slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Between a and b along the great circle of their directions; the ends are exact.

        (sin((1 - s) w) a + sin(s w) b) / sin w,    w the angle between a and b

    Args:
        a, b: (1, …).
        share: s (n,), from 0 to 1.

    Returns:
        (n, …); the straight line where a and b have one direction.

    Source: Shoemake: Animating rotation with quaternion curves (1985), https://doi.org/10.1145/325334.325242
    """
    first, second = a.double().flatten(), b.double().flatten()
    cosine = (first @ second) / (first.norm() * second.norm()).clamp(min=torch.finfo(torch.float64).tiny)
    w = cosine.clamp(-1.0, 1.0).acos()
    s = share.to(a.device, torch.float64)
    if float(w.sin()) > 1e-6:
        of_a, of_b = ((1.0 - s) * w).sin() / w.sin(), (s * w).sin() / w.sin()
    else:
        of_a, of_b = 1.0 - s, s
    of_a, of_b = (c.reshape(-1, *[1] * (a.ndim - 1)) for c in (of_a, of_b))
    return (of_a * a.double() + of_b * b.double()).to(a.dtype)
