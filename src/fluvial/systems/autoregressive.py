"""unCLIP's other prior: autoregressive, over quantised embeddings.

    P(c | y) = prod_k P(b_k | b_1 … b_{k-1}, y),    b_k the bucket of the k-th principal component of c

An embedding is turned to its principal components, the largest first; those that hold most of the variance are kept,
and each is cut into buckets of equal mass. A causal transformer, told the text, gives the probabilities of the
buckets of a component after those before it. Within a bucket all is equally likely, so that the whole is a map from
noise to embeddings, one inverse distribution function after the other:

    c_k = F_k^-1(Phi(noise_k) | b_1 … b_{k-1}, y),    Phi the normal distribution function

This makes it a flow map that jumps from noise to data, as one-step students do: seeded, saved and loaded like these.
Guidance is of the logits, null + scale * (cond - null), and told as cond={"guidance": (B,)}.

Source: Ramesh, Dhariwal, Nichol, Chu, Chen: Hierarchical text-conditional image generation with CLIP latents (2022),
https://arxiv.org/abs/2204.06125, section 2.2 (there the text is a sequence, and buckets are of equal width)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fluvial.errors import OptionError
from fluvial.flow_maps import FlowMap
from fluvial.guidance import CFG
from fluvial.model import Model
from fluvial.objectives import Objective
from fluvial.systems.unclip_networks import Conditions, require_shares
from fluvial.systems.unclip_training import Embedded, Folder
from fluvial.training import Run, train
from fluvial.training.settings import whole

HEADS = 4

Seen = tuple[Tensor, Tensor] | None  # keys and values (B, HEADS, n, ·)


class AutoregressivePrior(nn.Module):
    """A causal transformer over the buckets of an embedding's components, told the embedding of a text.

    Args:
        dim: D, numbers in an embedding.
        text: numbers in a text's embedding.
        components: K, how many of its D are kept.
        buckets: of each component.
        waves: how many cosines of a bucket's place stand for it, fewer than there are buckets: neighbours are alike.
        width: of the transformer, a multiple of its 4 heads.
        depth: its layers.
        dropout: of what each layer adds.
        drop: the share of samples in training whose text is left out.
        clip: the hash of the CLIP whose embeddings these are.

    Attributes:
        rotation: (K, D), the components' directions.
        edges: (K, buckets + 1), where each component's buckets begin and end.
    """

    rotation: Tensor
    edges: Tensor
    waves: Tensor

    def __init__(
        self,
        dim: int,
        text: int,
        components: int,
        buckets: int = 64,
        waves: int = 16,
        width: int = 64,
        depth: int = 3,
        dropout: float = 0.1,
        drop: float = 0.1,
        clip: str | None = None,
    ):
        super().__init__()
        for name, value, least in (("dim", dim, 1), ("text", text, 1), ("buckets", buckets, 2), ("waves", waves, 1)):
            whole(name, value, least)
        whole("depth", depth, 1)
        if not 1 <= components <= dim:
            raise OptionError(f"components are {components}; expected 1 to the {dim} that an embedding has")
        if width < HEADS or width % HEADS:
            raise OptionError(f"width is {width}; expected a multiple of {HEADS}, as there are so many heads")
        require_shares({"text": drop, "what a layer adds": dropout})
        self.conditions, self.drop, self.dropout, self.clip = {"text": text}, drop, dropout, clip
        self.label = Conditions(self.conditions, width, {"text": drop})
        self.token = nn.Linear(waves, width)
        self.place = nn.Parameter(0.02 * torch.randn(components, width))
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.norm, self.leave = nn.LayerNorm(width), nn.Linear(width, waves)
        # Untrained, all buckets are equally likely: each component as in the data, independent of the others.
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)
        self.register_buffer("rotation", torch.eye(components, dim))
        self.register_buffer("edges", torch.linspace(-3.0, 3.0, buckets + 1).expand(components, -1).clone())
        middles = (torch.arange(buckets) + 0.5) / buckets
        self.register_buffer("waves", (math.pi * torch.arange(1, waves + 1) * middles[:, None]).cos())

    @torch.no_grad()
    def fit(self, embeddings: Tensor) -> Self:
        """Sets rotation and edges by these (n, D): their principal components, and quantiles of each."""
        self.rotation.copy_(principal(embeddings)[0][: len(self.rotation)])
        shares = torch.linspace(0.0, 1.0, self.edges.shape[1], dtype=torch.float64)
        for k, values in enumerate((embeddings.double() @ self.rotation.double().T).T):
            self.edges[k] = values.quantile(shares)
        return self

    def forward(
        self, x: Tensor, t: Tensor | None = None, text: Tensor | None = None, guidance: Tensor | None = None
    ) -> Tensor:
        """The embedding that noise leads to; without a time, how unlikely an embedding is.

        Args:
            x: (B, D), noise where t is given, else embeddings, in the units that it was fitted in.
            t: (B,), all 0: there is no way between noise and data.
            text: (B, text), rows of zeros for none; None for all.
            guidance: (B,), scales; None for 1.

        Returns:
            Embeddings (B, D); without t, -log P of each component's bucket (B, K), in nats.

        Raises:
            OptionError: for another time.
        """
        label = self.label(({"text": text}, x))
        if t is None:
            buckets = self.quantised(x)
            logits = self.logits(buckets[:, :-1], label, [None] * len(self.blocks))[0].float()
            return F.cross_entropy(logits.movedim(-1, 1), buckets, reduction="none")
        if bool((t > 0.05).any()):
            raise OptionError(
                f"an autoregressive prior is asked about time {float(t.max()):.3g}; expected its one jump from noise, "
                'solver="jump" and steps=1'
            )
        if guidance is None or bool((guidance == 1).all()):
            return self.drawn(x, [label], None)
        return self.drawn(x, [label, self.label(({"text": None}, x))], guidance[:, None])

    def drawn(self, noise: Tensor, labels: list[Tensor], scale: Tensor | None) -> Tensor:
        """Embeddings (B, D) under the first label (B, width); with a scale (B, 1), guided away from the second one."""
        exact = torch.float32 if noise.device.type == "mps" else torch.float64
        edges, u = self.edges.to(exact), torch.special.ndtr(noise.to(exact))
        bucket, values = torch.empty(len(noise), 0, dtype=torch.long, device=noise.device), []
        seen: list[list[Seen]] = [[None] * len(self.blocks) for _ in labels]
        for k in range(len(self.rotation)):
            found = []
            for i, label in enumerate(labels):
                logits, seen[i] = self.logits(bucket, label if k == 0 else None, seen[i], k)
                found.append(logits[:, -1].to(exact))
            logits = found[0] if scale is None else found[1] + scale.to(exact) * (found[0] - found[1])
            at, share = quantile(logits.softmax(-1), u[:, k])
            values.append(torch.lerp(edges[k][at], edges[k][at + 1], share))
            bucket = at[:, None]
        return (torch.stack(values, 1) @ self.rotation.to(exact)).to(noise.dtype)

    def logits(
        self, buckets: Tensor, label: Tensor | None, seen: Sequence[Seen], first: int = 0
    ) -> tuple[Tensor, list[Seen]]:
        """Logits (B, n, buckets) of the component after each of n inputs: the label, if given, and buckets (B, ·).

        Args:
            seen: what the blocks keep of the `first` inputs before these; returned with these added.
        """
        start = [] if label is None else [label[:, None]]
        hidden = torch.cat([*start, self.token(self.waves[buckets])], 1)
        hidden = hidden + self.place[first : first + hidden.shape[1]]
        kept = []
        for block, before in zip(self.blocks, seen):
            hidden, now = block(hidden, before)
            kept.append(now)
        return self.leave(self.norm(hidden)) @ self.waves.T, kept

    def quantised(self, embeddings: Tensor) -> Tensor:
        """The buckets (B, K) of embeddings (B, D)."""
        values = embeddings.to(self.edges.dtype) @ self.rotation.T
        return torch.searchsorted(self.edges[:, 1:-1].contiguous(), values.T.contiguous(), right=True).T

    def config(self) -> dict[str, Any]:
        """What `from_config` needs to build the same architecture: JSON-able."""
        sizes = {"dim": self.rotation.shape[1], "text": self.conditions["text"], "components": len(self.rotation)}
        sizes |= {"buckets": len(self.waves), "waves": self.waves.shape[1]}
        sizes |= {"width": self.place.shape[1], "depth": len(self.blocks)}
        return sizes | {"dropout": self.dropout, "drop": self.drop, "clip": self.clip}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The architecture that `config()` described, with fresh weights."""
        return cls(**config)


class Block(nn.Module):
    """Causal attention and an MLP, each added to what comes in."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, seen: Seen) -> tuple[Tensor, Seen]:
        """x (B, n, width), and keys and values of what came before; n is 1 where something did."""
        q, k, v = (part.unflatten(-1, (HEADS, -1)).movedim(-2, 1) for part in self.qkv(self.before(x)).chunk(3, -1))
        if seen is not None:
            k, v = torch.cat([seen[0], k], 2), torch.cat([seen[1], v], 2)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=seen is None)
        x = x + self.dropout(self.out(attended.movedim(1, -2).flatten(-2)))
        return x + self.dropout(self.mlp(self.between(x))), (k, v)


def principal(x: Tensor) -> tuple[Tensor, Tensor]:
    """The directions (D, D) of the rows of x (n, D) about 0, and the shares of their squares (D,), largest first."""
    values, vectors = torch.linalg.eigh(x.double().T @ x.double() / len(x))
    found = vectors.T.flip(0)
    # Of the two signs the one whose largest number is positive.
    sign = found.gather(1, found.abs().argmax(1, keepdim=True)).sign()
    values = values.flip(0).clamp(min=0.0)
    return found * sign, values / values.sum()


def quantile(p: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Of probabilities p (B, n), the number (B,) of the bucket that holds the quantile u (B,), and where in it."""
    upto = p.cumsum(-1)
    upto = upto / upto[:, -1:]
    bucket = torch.searchsorted(upto, u[:, None].contiguous(), right=True).clamp(max=p.shape[1] - 1)
    p = p.gather(1, bucket)
    share = (u[:, None] - upto.gather(1, bucket) + p) / p.clamp(min=torch.finfo(p.dtype).tiny)
    return bucket[:, 0], share.clamp(0.0, 1.0)[:, 0]


@dataclass(frozen=True)
class Likelihood(Objective):
    """Mean of -log P over the components of each embedding, in nats."""

    target: str = "data"

    def draw_times(self, model: Model, index: Tensor, seed: int) -> Tensor:
        """It has no time: all are in the middle."""
        return torch.full((len(index),), 0.5, dtype=torch.float64, device=index.device)

    def __call__(self, model: Model, data: Tensor, cond: Any = None, *batch: Any, **more: Any) -> Tensor:
        """The loss of each embedding (B,); arguments as for `Objective`."""
        network: Any = model.network
        return network(data, None, **(cond or {})).mean(1)

    def described(self) -> dict[str, Any]:
        return {"target": "the next bucket"}


def train_autoregressive_prior(
    data: Embedded,
    out: Folder | None = None,
    steps: int = 2000,
    *,
    kept: float = 0.95,
    buckets: int = 64,
    waves: int = 16,
    width: int = 64,
    depth: int = 3,
    dropout: float = 0.1,
    drop: float = 0.1,
    seed: int = 0,
    **options: Any,
) -> Run:
    """Trains an autoregressive prior: an image's embedding from its caption's, component by component.

    Args:
        data: what `embedded` gave.
        out, steps, seed: as for `fl.train`; run again on the same folder, it goes on.
        kept: as many components as hold this share of the variance. Each is drawn after those before it, so that a tail
            of small ones costs time and teaches little.
        buckets, waves, width, depth, dropout: of the network, an `AutoregressivePrior`.
        drop: the share of samples whose text is left out, for guidance.
        options: of `fl.train`.

    Raises: as `fl.train`.
    """
    if not 0.0 < kept <= 1.0:
        raise OptionError(f"kept is {kept}; expected the share of the variance to keep, above 0 and up to 1")
    source = data.prior()
    assert data.text is not None
    embeddings = source.normalisation.apply(data.embedding)
    shares = principal(embeddings)[1].cumsum(0)
    sizes = {"components": min(data.dim, 1 + int((shares < kept - 1e-12).sum()))}
    sizes |= {"buckets": buckets, "waves": waves, "width": width, "depth": depth}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = AutoregressivePrior(data.dim, data.text.shape[1], **sizes, dropout=dropout, drop=drop, clip=data.clip)
    network.fit(embeddings)
    inner = Model(network, "rectified", "data", null={"guidance": 1.0}, normalisation=source.normalisation)
    settings: dict[str, Any] = {"sheet_every": None, "schedule": "cosine", **options}
    return train(FlowMap(inner), source, Likelihood(), steps, out=out, seed=seed, drop_cond=0.0, **settings)


def as_asked(options: Mapping[str, Any], told: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Options and conditions of `fl.sample` as this prior takes them: it makes one jump, and is told its guidance.

    Raises:
        OptionError: for guidance other than CFG with a scale alone.
    """
    own = {key: value for key, value in options.items() if key not in ("solver", "steps", "nfe", "times")}
    guidance = own.pop("guidance", None)
    if guidance is None:
        return own, dict(told)
    if not isinstance(guidance, CFG) or guidance != CFG(guidance.scale, guidance.batched):
        raise OptionError(f"the prior's guidance is {guidance}; expected CFG(scale), which acts on its logits")
    if "text" not in told:
        return own, {}  # with or without, it draws from the null model
    return own, {**told, "guidance": torch.full((len(told["text"]),), guidance.scale)}
