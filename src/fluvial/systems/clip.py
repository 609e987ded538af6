"""CLIP: images and texts as unit vectors of one space, where an image lies near what it is called.

    clip = CLIP.load("openai/clip-vit-base-patch32")      # or a folder that `save` or transformers wrote
    clip.images(x), clip.texts(["a three"])               # (B, D), of length 1

The network is transformers' `CLIPModel`; here is how it is read, fed and saved, and the loss that one is trained with.

Source: Radford et al.: Learning transferable visual models from natural language supervision (2021),
https://arxiv.org/abs/2103.00020
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from fluvial.convention import Normalisation
from fluvial.errors import OptionError, RunError, ShapeError
from fluvial.training import atomic
from fluvial.training.building import weights_of

WEIGHTS, PIXELS, RANGE = "model.safetensors", "preprocessor_config.json", "fluvial.json"
# OpenAI's, for folders that do not say theirs.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_BATCH = 256


def contrastive(images: Tensor, texts: Tensor, same: Tensor, scale: Tensor) -> Tensor:
    """The symmetric InfoNCE loss (B,) of matching rows.

        s = scale images texts',   P = same / (row sums of same),   loss_i = -½ sum_j P_ij (log softmax_j s_ij + log softmax_j s_ji)

    An equal caption is no negative: captions that are the same share the target. Without duplicates P is the identity.

    Args:
        images, texts: (B, D), unit vectors.
        same: (B, B) bool, which captions are equal, the diagonal among them.
        scale: one over the temperature.
    """  # noqa: E501
    logits = scale * images @ texts.T
    shared = same.to(logits.dtype)
    target = shared / shared.sum(1, keepdim=True)
    return -0.5 * (target * (logits.log_softmax(1) + logits.T.log_softmax(1))).sum(1)


def equal_rows(tokens: Tensor) -> Tensor:
    """Which rows of tokens (B, L) are equal, (B, B) bool."""
    return (tokens[:, None] == tokens[None]).all(2)


class CLIP:
    """A frozen CLIP, with how it is fed.

    Args:
        model: transformers' CLIPModel.
        tokenizer: of its texts, transformers'.
        low, high: the range of the images that it is given, unless they come with their own.
        mean, std: of its images by channel, after that range is mapped to 0 … 1.

    Attributes:
        dim: D, numbers in an embedding.
        length: L, token ids in a text.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        low: float = 0.0,
        high: float = 1.0,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.low, self.high, self.mean, self.std = low, high, tuple(mean), tuple(std)
        self.dim = int(model.config.projection_dim)
        self.length = int(model.config.text_config.max_position_embeddings)
        words = int(model.config.text_config.vocab_size)
        if len(tokenizer) > words:
            raise OptionError(f"the tokenizer has {len(tokenizer)} words and CLIP {words}; expected its own tokenizer")

    # Embeddings

    def images(self, x: Tensor, normalisation: Normalisation | None = None) -> Tensor:
        """Images (B, C, H, W) -> unit vectors (B, D), float32 and on x's device.

        They are scaled to cover CLIP's square, and cut at its centre.

        Args:
            x: in the units of its data.
            normalisation: of the data, whose range then counts; default: CLIP's own range.

        Raises:
            ShapeError: for what are no images, or of channels that it cannot take.
        """
        return torch.cat([self._image(self.pixels(part, normalisation)).to(x.device) for part in x.split(_BATCH)])

    def pixels(self, x: Tensor, normalisation: Normalisation | None = None) -> Tensor:
        """What the network sees of images (B, C, H, W); arguments as for `images`."""
        vision = self.model.config.vision_config
        channels, side = vision.num_channels, vision.image_size
        if x.ndim != 4 or (channels != 1 and x.shape[1] not in (1, channels)):
            raise ShapeError(f"images have shape {tuple(x.shape)}; expected (B, {channels}, H, W), or one grey channel")
        low, high = self.low, self.high
        if normalisation is not None and normalisation.low is not None and normalisation.high is not None:
            low, high = normalisation.low, normalisation.high
        unit = ((x.to(self.model.device, torch.float32) - low) / ((high - low) or 1.0)).clamp(0.0, 1.0)
        unit = unit.mean(1, keepdim=True) if channels == 1 else unit.expand(-1, channels, -1, -1)
        if tuple(unit.shape[2:]) != (side, side):
            height, width = (max(side, round(n * side / min(unit.shape[2:]))) for n in unit.shape[2:])
            unit = F.interpolate(unit, (height, width), mode="bicubic", antialias=True).clamp(0.0, 1.0)
            top, left = (height - side) // 2, (width - side) // 2
            unit = unit[:, :, top : top + side, left : left + side]
        mean, std = (unit.new_tensor(value)[:, None, None] for value in (self.mean, self.std))
        return (unit - mean) / std

    def texts(self, texts: Sequence[str] | Tensor) -> Tensor:
        """Texts, or their token ids (B, L), -> unit vectors (B, D), float32; a row of zeros is no text, and stays one.

        Raises:
            ShapeError: for token ids of another length.
        """
        tokens = texts if isinstance(texts, Tensor) else self.tokens(texts)
        if tokens.ndim != 2 or tokens.shape[1] != self.length or tokens.is_floating_point():
            raise ShapeError(
                f"text is {tuple(tokens.shape)} of {tokens.dtype}; expected token ids (B, {self.length}), as "
                "clip.tokens(texts) gives them"
            )
        found = torch.cat([self._text(part.to(self.model.device)).to(tokens.device) for part in tokens.split(_BATCH)])
        return found * (tokens != 0).any(1, keepdim=True)

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """The token ids (B, L) of texts; what is too long is cut."""
        if isinstance(texts, str) or not len(texts):
            raise OptionError(f'texts are {texts!r}; expected a list of them, such as ["a three"]')
        made = self.tokenizer(list(texts), padding="max_length", truncation=True, max_length=self.length)
        return torch.tensor(made["input_ids"], dtype=torch.int64)

    @torch.no_grad()
    def _image(self, pixels: Tensor) -> Tensor:
        return embed_images(self.model, pixels.to(self.model.dtype)).float()

    @torch.no_grad()
    def _text(self, tokens: Tensor) -> Tensor:
        return embed_texts(self.model, tokens).float()

    @staticmethod
    def project(embeddings: Tensor) -> Tensor:
        """Vectors (B, D), brought to where embeddings are: to length 1."""
        return F.normalize(embeddings, dim=1)

    # Without training for it

    def zero_shot(self, images: Tensor, classes: Sequence[str | Sequence[str]]) -> Tensor:
        """Which class each image (B, C, H, W) is nearest to, (B,) long.

        Args:
            images: as for `images`.
            classes: what each is called; of several names the mean counts.
        """
        names = [[each] if isinstance(each, str) else list(each) for each in classes]
        means = torch.stack([self.texts(each).mean(0) for each in names])
        return (self.images(images) @ self.project(means).T.to(images.device)).argmax(1)

    def accuracy(self, images: Tensor, labels: Tensor, classes: Sequence[str | Sequence[str]]) -> float:
        """The share of images that `zero_shot` takes for their label (B,)."""
        return float((self.zero_shot(images, classes) == labels.to(images.device)).double().mean())

    # Folders

    @cached_property
    def hash(self) -> str:
        """Twelve hexadecimal digits that name its weights, its words and how it sees images."""
        digest = hashlib.sha256(json.dumps([self.mean, self.std]).encode())
        digest.update(json.dumps(self.tokenizer.get_vocab(), sort_keys=True).encode())
        for name, value in sorted(weights_of(self.model).items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:12]

    def to(self, device: torch.device | str) -> Self:
        """Moves the network, in place."""
        self.model.to(device)
        return self

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes a folder that `load` and transformers' `CLIPModel.from_pretrained` read; files there are replaced."""
        folder = Path(folder)
        with atomic.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self.model.config.architectures = [type(self.model).__name__]
            self.model.config.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            side = self.model.config.vision_config.image_size
            pixels = {"image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": side}}
            pixels |= {"crop_size": {"height": side, "width": side}, "image_mean": self.mean, "image_std": self.std}
            atomic.write_json(folder / PIXELS, pixels)
            atomic.write_json(folder / RANGE, {"clip": {"low": self.low, "high": self.high}})
            # The weights come last: a folder with them is whole.
            atomic.replace(folder / WEIGHTS, lambda file: atomic.write_tensors(file, weights_of(self.model)))
        return folder

    @classmethod
    def load(cls, name: str | os.PathLike[str]) -> Self:
        """The CLIP of a folder, or of that name on the hub, on the CPU; only JSON and safetensors are read.

        Raises:
            OptionError: where transformers is missing.
            RunError: for what is no CLIP, or cannot be read.
        """
        transformers = library()
        from transformers.utils.hub import cached_file

        name = str(name)
        try:
            with _quiet():
                config = transformers.AutoConfig.from_pretrained(name)
                if config.model_type != "clip":
                    raise RunError(f"{name} holds a {config.model_type}; expected a CLIP of transformers'")
                model, report = transformers.CLIPModel.from_pretrained(
                    name, use_safetensors=True, output_loading_info=True
                )
                tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            lacking = sorted(map(str, report["missing_keys"]))
            found = {
                file: cached_file(name, file, _raise_exceptions_for_missing_entries=False) for file in (PIXELS, RANGE)
            }
        except RunError:
            raise
        except Exception as error:  # the hub's, transformers' and safetensors', which share nothing
            reason = " ".join(str(error).split())
            raise RunError(f"{name} cannot be read as a CLIP of transformers': {reason[:200]}") from error
        if lacking:
            raise RunError(f"{name} lacks {len(lacking)} weights, such as {lacking[0]}; expected all those of a CLIP")
        pixels, given = ({} if path is None else atomic.read_json(Path(path)) for path in found.values())
        ends = given.get("clip", {})
        mean, std = pixels.get("image_mean", MEAN), pixels.get("image_std", STD)
        return cls(model, tokenizer, ends.get("low", 0.0), ends.get("high", 1.0), mean, std)


def embed_images(model: Any, pixels: Tensor) -> Tensor:
    """Pixels (B, C, S, S) -> unit vectors (B, D), with gradients."""
    # By hand: what `get_image_features` returns depends on the version of transformers.
    return F.normalize(model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output), dim=1)


def embed_texts(model: Any, tokens: Tensor) -> Tensor:
    """Token ids (B, L) -> unit vectors (B, D), with gradients."""
    # No mask: a text ends with its end mark, which is where it is read, and sees nothing behind it.
    return F.normalize(model.text_projection(model.text_model(input_ids=tokens).pooler_output), dim=1)


def library() -> Any:
    """transformers.

    Raises:
        OptionError: where it is missing.
    """
    try:
        import transformers
    except ImportError as error:
        raise OptionError("CLIP needs transformers; expected it installed: pip install fluvial[diffusers]") from error
    return transformers


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of transformers."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
