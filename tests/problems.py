"""Problems that the tests share: paths, mixtures, networks, and the oracle's answers, written without the library.

`pair` is the closed form of E[data | x] and E[noise | x] for a mixture of isotropic Gaussians (the tests of `exact`
check it against quadrature); `weights` is the table of what each prediction is a functional of. Everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fluvial import cli, paths
from fluvial.exact import GaussianMixture
from fluvial.paths import Coefficients, Path
from fluvial.predictions import EDM, Data, Noise, Prediction, Score, V, Velocity


def ddpm_table(n: int = 1000) -> Tensor:
    """alphas_cumprod of DDPM: beta linear from 1e-4 to 0.02."""
    return (1.0 - torch.linspace(1e-4, 0.02, n, dtype=torch.float64)).cumprod(0)


def zero_snr_table(n: int = 1000) -> Tensor:
    """DDPM's table rescaled to end at SNR 0 (Lin et al. 2023, algorithm 1)."""
    root = ddpm_table(n).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return root.square()


PATHS: dict[str, Path] = {
    "rectified": paths.Rectified(),
    "cosine": paths.Cosine(),
    "vp": paths.VP(),
    "subvp": paths.SubVP(),
    "ve": paths.VE(),
    "edm": paths.EDM(),
    "discrete": paths.Discrete(ddpm_table().tolist()),
    "zero_snr": paths.Discrete(zero_snr_table(50).tolist()),
    "shifted": paths.Rectified().shifted(3.0),
    "shifted_vp": paths.VP().shifted(0.5),
    "affine": paths.Affine(lambda t: t * (3 - t) / 2, lambda t: (1 - t) * (1 + t / 2)),
}

PREDICTIONS: dict[str, Prediction] = {
    "data": Data(),
    "noise": Noise(),
    "velocity": Velocity(),
    "v": V(),
    "score": Score(),
    "edm": EDM(0.7),
}


def weights(name: str, c: Coefficients, sigma_data: float = 0.7) -> tuple[float, float]:
    """(p, q) of a prediction at float coefficients: the table of the mathematics, infinite where it is undefined."""
    a, s = c.alpha, c.sigma
    if name == "edm":
        n = math.hypot(s, a * sigma_data)
        return s / (sigma_data * n), -a * sigma_data / n
    return {
        "data": (1.0, 0.0),
        "noise": (0.0, 1.0),
        "velocity": (c.dalpha, c.dsigma),
        "v": (-s, a),
        "score": (0.0, -1.0 / s if s else -math.inf),
    }[name]


def mixture() -> GaussianMixture:
    """Three unequal components in the plane."""
    means = torch.tensor([[1.5, 0.0], [-1.0, 1.0], [-0.5, -1.5]], dtype=torch.float64)
    return GaussianMixture(means, torch.tensor([0.3, 0.5, 0.2]), torch.tensor([0.5, 0.3, 0.2]))


def odd_mixture() -> GaussianMixture:
    """Two components of samples shaped (3, 1, 2)."""
    means = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).reshape(2, 3, 1, 2)
    return GaussianMixture(means, torch.tensor([0.4, 0.8]), torch.tensor([0.25, 0.75]))


def gaussian(mean: float = 0.0, std: float = 0.5) -> GaussianMixture:
    """One Gaussian on the line."""
    return GaussianMixture(torch.tensor([[mean]]), torch.tensor([std], dtype=torch.float64), torch.ones(1))


MIXTURES: dict[str, Callable[[], GaussianMixture]] = {"plane": mixture, "odd": odd_mixture}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers from torch's own generator, so that a fault of ours cannot hide in both places."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def state(problem: GaussianMixture, path: Path, t: float | Tensor, n: int = 16, seed: int = 0) -> Tensor:
    """n states (n, *shape) of this problem on the path at time t (float, or (n,))."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.multinomial(problem.weights, n, replacement=True, generator=generator)
    std = column(problem.stds[label], problem.means.ndim)
    data = problem.means[label] + std * normal(n, *problem.shape, seed=seed + 1)
    c = path(t)
    alpha, sigma = (column(torch.as_tensor(v, dtype=torch.float64), data.ndim) for v in c[:2])
    return alpha * data + sigma * normal(n, *problem.shape, seed=seed + 2)


def column(value: Tensor, ndim: int) -> Tensor:
    """A (B,) or () tensor shaped to multiply one of `ndim` dimensions."""
    return value.reshape(-1, *[1] * (ndim - 1))


def pair(problem: GaussianMixture, x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
    """E[data | x] and E[noise | x] for x = alpha data + sigma noise."""
    means, flat = problem.means.flatten(1), x.flatten(1)
    off = flat[:, None] - alpha * means  # (B, K, D)
    variance = alpha**2 * problem.stds.square() + sigma**2  # (K,)
    logits = problem.weights.log() - off.square().sum(-1) / (2 * variance) - flat.shape[1] / 2 * variance.log()
    r = logits.softmax(-1)[..., None]
    data = (r * (means + (alpha * problem.stds.square() / variance)[:, None] * off)).sum(1)
    noise = (r * (sigma / variance)[:, None] * off).sum(1)
    return data.reshape(x.shape), noise.reshape(x.shape)


def log_density(problem: GaussianMixture, x: Tensor, alpha: float, sigma: float) -> Tensor:
    """log p(x) of x = alpha data + sigma noise, (B,), by torch's own distributions."""
    means = alpha * problem.means.flatten(1)
    std = (alpha**2 * problem.stds.square() + sigma**2).sqrt()
    parts = torch.distributions.Independent(torch.distributions.Normal(means, std[:, None].expand_as(means)), 1)
    mix = torch.distributions.Categorical(problem.weights)
    return torch.distributions.MixtureSameFamily(mix, parts).log_prob(x.flatten(1))


def common_time(path: Path, log_snr: float) -> float:
    """The time of this log_snr on the path, which must have it."""
    assert path.log_snr(0.0) <= log_snr <= path.log_snr(1.0)
    return path.time(log_snr)


class Net(nn.Module):
    """A small network of random weights on points (B, D); counts its calls."""

    def __init__(self, width: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.inner = nn.Linear(width + 2, 32)
        self.outer = nn.Linear(32, width)
        with torch.no_grad():
            for k, parameter in enumerate(self.parameters()):
                # Large enough that samples of different notations would differ, were the conversion wrong.
                parameter.copy_(0.5 * normal(*parameter.shape, seed=seed + k))
        self.to(dtype)
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        time = torch.stack([t, t.square()], dim=1).to(x.dtype)
        return self.outer(torch.tanh(self.inner(torch.cat([x, time], dim=1))))


class Counter:
    """A plain callable that counts its calls and remembers the times it was asked at."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function, self.calls, self.times = function, 0, []

    def __call__(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        self.calls += 1
        self.times.append(float(t[0]))
        return self.function(x, t, **cond)


def one_line(error: BaseException) -> str:
    """The message of an error, which must be one line and not empty."""
    message = str(error)
    assert message, error
    assert "\n" not in message, message
    return message


def command(*arguments: object) -> int:
    """The exit code of one command of the command line."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return ended.value.code  # type: ignore[return-value]
