"""Training the two models of unCLIP, on what CLIP makes of captioned images.

data = embedded(source, clip)
prior = train_prior(data, out="runs/prior")
decoder = train_decoder(data, out="runs/decoder")
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fluvial.errors import DataError, OptionError
from fluvial.systems.captions import Captioned, open_captioned
from fluvial.systems.clip import CLIP
from fluvial.systems.unclip_networks import Prior, decoder
from fluvial.training import Run, model_for, open_source, train
from fluvial.training.source import Source, Tensors

Folder = str | os.PathLike[str]


class Embedded:
    """Images with what a CLIP makes of them and of their captions, kept in memory.

    Attributes:
        images: the source of the images.
        embedding: (n, D) of the images.
        text: (n, D) of the captions; None for images without.
        clip: the hash of the CLIP.
    """

    def __init__(self, images: Source, embedding: Tensor, text: Tensor | None, clip: str) -> None:
        self.images, self.embedding, self.text, self.clip = images, embedding, text, clip

    @property
    def dim(self) -> int:
        return self.embedding.shape[1]

    def prior(self) -> Tensors:
        """What a prior learns from: an image's embedding as the data, its caption's as the condition "text".

        Embeddings are standardised number by number, as all that is no image: the prior's data have unit variance.

        Raises:
            DataError: for images without captions.
        """
        if self.text is None:
            raise DataError(f"{self.images.name} has no captions, which a prior learns from; expected captioned images")
        source = Tensors(self._name("embeddings"), {"data": self.embedding, "text": self.text})
        source.kept = source.conditions  # the network leaves them out by itself
        return source

    def decoder(self, sees: Sequence[str] = ("embedding",)) -> Captioned:
        """What a decoder learns from: images, and of "embedding" and "text" what it sees.

        Raises:
            OptionError: for another name.
            DataError: for the text of images without captions.
        """
        known = {"embedding": self.embedding, "text": self.text}
        if not sees or not set(sees) <= set(known):
            raise OptionError(f"a decoder sees {', '.join(sees) or 'nothing'}; expected embedding, text, or both")
        told = {name: value for name in sees if (value := known[name]) is not None}
        if len(told) < len(sees):
            raise DataError(f"{self.images.name} has no captions; expected a decoder that sees the embedding alone")
        captions = self.images.captions if isinstance(self.images, Captioned) else [""] * len(self.embedding)
        images = self.images.images if isinstance(self.images, Captioned) else self.images
        return Captioned(images, captions, told, self._name("images"))

    def _name(self, what: str) -> str:
        return f"{what} of {self.images.name} (CLIP {self.clip})"


def embedded(source: Any, clip: CLIP, batch_size: int = 256) -> Embedded:
    """All images of a source and their captions, as CLIP embeds them.

    Args:
        source: a `Captioned` source, or what `open_captioned` takes; or any other source of images, which has no text.
        clip: whose embeddings they are.
        batch_size: images at once.

    Raises:
        DataError: for a stream, whose images cannot be counted.
    """
    source = source if isinstance(source, Source) else open_captioned(source)
    source = open_source(source)
    if source.size is None:
        raise DataError(f"{source.name} is a stream; expected images that can be counted")
    parts = torch.arange(source.size).split(batch_size)
    found = torch.cat([clip.images(source.batch(part)["data"], source.normalisation) for part in parts])
    if not isinstance(source, Captioned):
        return Embedded(source, found, None, clip.hash)
    # Few captions are many images': each is embedded once.
    different = {caption: i for i, caption in enumerate(dict.fromkeys(source.captions))}
    text = clip.texts(list(different))[[different[caption] for caption in source.captions]]
    return Embedded(source, found, text, clip.hash)


def train_prior(
    data: Embedded,
    out: Folder | None = None,
    steps: int = 4000,
    *,
    width: int = 256,
    depth: int = 4,
    drop: float = 0.1,
    path: Any = "rectified",
    prediction: Any = "velocity",
    seed: int = 0,
    **options: Any,
) -> Run:
    """Trains a prior: an image's embedding from its caption's.

    Args:
        data: what `embedded` gave.
        out, steps, seed: as for `fl.train`; run again on the same folder, it goes on.
        width, depth: of the network, a `Prior`.
        drop: the share of samples whose text is left out, for guidance.
        path, prediction: as for `fl.training.model_for`.
        options: of `fl.train`.

    Raises: as `fl.train`.
    """
    source = data.prior()
    assert data.text is not None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = Prior(data.dim, data.text.shape[1], width, depth, drop, data.clip)
    model = model_for(source, path, prediction, network)
    return train(model, source, steps=steps, out=out, seed=seed, drop_cond=0.0, **{"sheet_every": None, **options})


def train_decoder(
    data: Embedded,
    out: Folder | None = None,
    steps: int = 4000,
    *,
    sees: Sequence[str] = ("embedding",),
    width: int = 32,
    drop: Mapping[str, float] | None = None,
    path: Any = "rectified",
    prediction: Any = "velocity",
    seed: int = 0,
    **options: Any,
) -> Run:
    """Trains a decoder: an image from its embedding, and its caption's where `sees` has "text".

    Args:
        data: what `embedded` gave.
        out, steps, seed: as for `fl.train`; run again on the same folder, it goes on.
        sees: "embedding", "text" or both; of text alone it is no part of unCLIP, but what that is compared with.
        width: of the network, a `Decoder`.
        drop: see `unclip_networks.decoder`.
        path, prediction: as for `fl.training.model_for`.
        options: of `fl.train`.

    Raises: as `fl.train`.
    """
    source = data.decoder(sees)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = decoder(source.shape, dict.fromkeys(sees, data.dim), width, drop, data.clip)
    model = model_for(source, path, prediction, network)
    return train(model, source, steps=steps, out=out, seed=seed, drop_cond=0.0, **options)
