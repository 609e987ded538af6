"""Cascades: exact ones of Gaussian images, what they refuse, and that samples are functions of their numbers."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch

import fluvial as fl
from fluvial.convention import Normalisation
from fluvial.errors import OptionError, RunError, ShapeError
from fluvial.systems import CLEAN, Augmentation, Cascade, Upsampler, upsampler
from fluvial.systems.upsampling import enlarge, shrink
from problems import normal, one_line

# Gaussian images, where every conditional law is known.

HIGH = 4
WIDE = Augmentation(-4.0, 12.0)


def area(high: int, low: int) -> torch.Tensor:
    """(low², high²): the area average as a matrix."""
    return shrink(torch.eye(high * high, dtype=torch.float64).reshape(-1, 1, high, high), low).flatten(1).T


def covariance(size: int) -> torch.Tensor:
    """Of images of this size, averaged from those of the largest: neighbours alike, no two pixels the same."""
    place = torch.cartesian_prod(torch.arange(HIGH), torch.arange(HIGH)).double()
    full = 0.5 * torch.exp(-torch.cdist(place, place) / 2) + torch.diag(torch.linspace(0.05, 0.4, HIGH * HIGH)).double()
    return area(HIGH, size) @ full @ area(HIGH, size).T


class Exact:
    """E[data | x] of Gaussian images on the rectified path; of an upper stage, given the corrupted lower one too."""

    def __init__(self, size: int, low: int | None = None) -> None:
        self.size, self.low_size, self.own = size, low, covariance(size)

    def conditional(self, level: float) -> tuple[torch.Tensor, torch.Tensor]:
        """K and S: data given z = alpha low + sigma noise are Normal(K z, S)."""
        assert self.low_size is not None
        alpha, sigma = math.sqrt(1 / (1 + math.exp(-level))), math.sqrt(1 / (1 + math.exp(level)))
        sigma = 0.0 if level >= CLEAN else sigma
        down = alpha * area(self.size, self.low_size)
        z = down @ self.own @ down.T + sigma**2 * torch.eye(self.low_size**2)
        gain = self.own @ down.T @ torch.linalg.inv(z)
        return gain, self.own - gain @ down @ self.own

    def __call__(self, x, t, low=None, level=None):
        mean, own = torch.zeros_like(x.flatten(1)).double(), self.own
        if self.low_size is not None:
            assert low is not None
            assert level is not None
            assert len(set(level.tolist())) == 1
            gain, own = self.conditional(float(level[0]))
            units = torch.eye(self.low_size**2, dtype=torch.float64).reshape(-1, 1, self.low_size, self.low_size)
            back = torch.linalg.pinv(enlarge(units, self.size).flatten(1).T)
            mean = low.flatten(1).double() @ (gain @ back).T
        alpha = float(t[0])
        noisy = alpha**2 * own + (1 - alpha) ** 2 * torch.eye(len(own), dtype=torch.float64)
        found = mean + (x.flatten(1).double() - alpha * mean) @ torch.linalg.inv(noisy) * alpha @ own
        return found.reshape(x.shape).to(x.dtype)


class Below(Exact):
    """The first stage, which takes no lower image."""

    def __call__(self, x, t):
        return super().__call__(x, t)


def exact(*sizes: int, **options) -> Cascade:
    networks = [Below(sizes[0]), *(Exact(high, low) for low, high in pairwise(sizes))]
    models = [fl.Model(n, "rectified", "data", shape=(1, n.size, n.size)) for n in networks]
    return Cascade(models, augmentations={f"up{k}": WIDE for k in range(1, len(sizes))}, **options)


def shown(*images: torch.Tensor) -> torch.Tensor:
    """The covariance of these images of all samples, together."""
    return torch.cat([x.flatten(1).double() for x in images], 1).T.cov()


def require_law(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Every entry within 4.5 of its own standard errors."""
    spread = expected.diag()
    error = ((spread[:, None] * spread + expected.square()) / N).sqrt()
    assert float(((found - expected) / error).abs().max()) < 4.5


def together(blocks: list[list[torch.Tensor]]) -> torch.Tensor:
    return torch.cat([torch.cat(row, 1) for row in blocks])


N = 40_000
HOW = {"solver": "dpmpp_3m", "times": "log_snr", "steps": 24}


@pytest.mark.parametrize("level", [math.inf, 2.0, -1.0])
def test_joint_law_of_an_exact_cascade(level):
    """b ~ p(b), u | alpha b + noise, h | alpha u + noise: the law of each is that of the data, and so is the joint."""
    cascade = exact(1, 2, 4)
    made = cascade.stages(N, seed=1, level=level, **HOW)
    assert list(made) == ["base", "up1", "up2"]
    alpha = math.sqrt(1 / (1 + math.exp(-min(level, 700.0))))
    (k1, _), (k2, _) = (cascade.models[name].network.conditional(min(level, CLEAN)) for name in ("up1", "up2"))
    b, u, h = (covariance(size) for size in (1, 2, 4))
    ub, hu = alpha * k1 @ b, alpha * k2 @ u
    hb = alpha * k2 @ ub
    expected = together([[b, ub.T, hb.T], [ub, u, hu.T], [hb, hu, h]])
    require_law(shown(*made.values()), expected)
    # Lower images that are not told apart from clean ones would leave their noise in the joint law.
    if level == math.inf:
        down = shown(shrink(made["up2"], 2) - made["up1"])
        assert float(down.abs().max()) < 1e-3


def test_joint_law_with_the_lower_stage_stopped_early():
    cascade, t = exact(2, 4), 0.6
    states = []
    made = cascade.stages(N, seed=2, truncated=t, callback=lambda step: states.append((step.t, step.x)), **HOW)
    state = next(x for at, x in states if at == t and x.shape[-1] == 2)
    level = 2 * math.log(t / (1 - t))
    z = state / math.hypot(t, 1 - t)
    gain, _ = cascade.models["up1"].network.conditional(level)
    low, high = covariance(2), covariance(4)
    noisy = t**2 * low + (1 - t) ** 2 * torch.eye(4)
    zz = noisy / (t**2 + (1 - t) ** 2)
    expected = together([[zz, zz @ gain.T], [gain @ zz, high]])
    require_law(shown(z, made["up1"]), expected)
    # The usual steps up to the stop; and what stands for its images is what it expected of them in the last.
    nodes = [s for s in cascade.models["base"].times("log_snr", 24) if s < t]
    alone = fl.sample(cascade.models["base"], N, seed=2, solver="dpmpp_3m", times=[*nodes, t], record=True)
    assert torch.equal(alone.x[-1], state)
    assert torch.equal(alone.samples, made["base"])


def test_the_base_is_sampled_as_if_alone_and_the_stages_are_independent():
    cascade = exact(2, 4)
    made = cascade.stages(5, seed=3, level=4.0, steps=6)
    alone = fl.sample(cascade.models["base"], 5, seed=3, steps=6)
    assert torch.equal(made["base"], alone)
    again = cascade.stages(5, seed=4, level=4.0, steps=6)
    assert not torch.allclose(again["up1"], made["up1"])
    # From the same images, by the stage alone: its own seed is neither the base's nor another stage's.
    up = cascade.upscale(alone, level=4.0, seed=3, steps=6)
    assert torch.equal(up, made["up1"])
    own = cascade.stages(5, seed={"base": 3, "up1": 3}, level=4.0, steps=6)
    assert torch.equal(own["base"], alone)
    assert not torch.allclose(own["up1"], made["up1"])


# Trained ones, of networks with random weights.


def stirred(network, seed=0):
    """A network whose last layers are not zero."""
    with torch.no_grad():
        for k, parameter in enumerate(network.parameters()):
            if not parameter.any():
                parameter.copy_(0.05 * normal(*parameter.shape, seed=seed + k, dtype=torch.float32))
    return network


UNITS = Normalisation((8.0,), (8.0,), low=0.0, high=16.0)


@pytest.fixture(scope="module")
def trio():
    torch.manual_seed(0)
    null = {"label": 3}
    base = fl.Model(stirred(fl.networks.unet(1, (3, 4), 3, 8)), "rectified", null=null, shape=(1, 3, 4))
    first = fl.Model(stirred(upsampler(1, (5, 8), (3, 4), 3, 8)), "vp", "noise", null=null, shape=(1, 5, 8))
    second = upsampler(1, (11, 13), (5, 8), None, 8, augmentation=Augmentation(-2.0, 6.0, clean=0.0))
    second = fl.Model(stirred(second), "rectified", shape=(1, 11, 13))
    clock = fl.model.Clock.noise_level()
    return Cascade([m.under(clock=clock, normalisation=UNITS) for m in (base, first, second)], {"up1": 3.0})


LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def test_samples_do_not_depend_on_the_batch(trio):
    how = {"steps": 2, "seed": 9, "truncated": {"up2": 0.8}}
    whole = trio.stages(6, cond={"label": LABELS}, **how)
    part = trio.stages(2, cond={"label": LABELS[4:]}, first=4, **how)
    assert [tuple(x.shape[1:]) for x in whole.values()] == [(1, 3, 4), (1, 5, 8), (1, 11, 13)]
    for name, x in whole.items():
        torch.testing.assert_close(part[name], x[4:], rtol=0, atol=1e-4)
    assert torch.equal(fl.sample(trio, 6, cond={"label": LABELS}, **how), whole["up2"])
    other = trio.stages(6, cond={"label": LABELS.flip(0)}, **how)
    assert not torch.allclose(other["base"], whole["base"])


def test_options_of_one_stage_and_of_all(trio):
    calls = []
    told = {"callback": lambda step: calls.append((tuple(step.x.shape[1:]), step.nfe)), "cond": {"label": LABELS[:2]}}
    trio.stages(2, seed=0, steps={"base": 3, "up1": 2, "up2": 1}, solver="euler", **told)
    assert [shape[0] for shape, _ in calls] == [1] * 6
    assert [nfe for _, nfe in calls] == [1, 2, 3, 1, 2, 1]
    guided = trio.stages(2, seed=0, steps=1, solver="euler", guidance={"up1": fl.guidance.CFG(3.0)}, **told)
    plain = trio.stages(2, seed=0, steps=1, solver="euler", **told)
    assert torch.equal(guided["base"], plain["base"])
    assert not torch.allclose(guided["up1"], plain["up1"])
    runs = trio.stages(2, seed=0, steps=1, solver="euler", record=True, cond={"label": LABELS[:2]})
    assert all(isinstance(run, fl.Trajectory) for run in runs.values())
    torch.testing.assert_close(runs["up2"].samples, plain["up2"], rtol=0, atol=1e-4)
    noise = normal(2, 1, 3, 4, dtype=torch.float32)
    begun = trio.stages(noise, seed=0, steps=1, solver="euler", cond={"label": LABELS[:2]})
    assert not torch.allclose(begun["base"], plain["base"])
    one = trio.stages(noise[1:].double(), seed=0, first=1, steps=1, solver="euler", cond={"label": LABELS[1:2]})
    assert one["base"].dtype == torch.float64
    for name, x in one.items():
        torch.testing.assert_close(x, begun[name][1:], rtol=0, atol=1e-3, check_dtype=False)
    few = trio.stages(2, seed=0, nfe=2, truncated={"up2": 0.75}, cond={"label": LABELS[:2]})
    assert bool(few["up2"].isfinite().all())


def test_levels_decide_what_the_upper_stage_is_told(trio):
    images, told = 8 + 4 * normal(3, 1, 3, 4, dtype=torch.float32), []
    seen = trio.models["up1"].with_network(_Told(trio.models["up1"].network, told))
    spied = Cascade([trio.models["base"], seen, trio.models["up2"]], {"up1": 3.0}, {"up1": trio.augmentations["up1"]})
    how = {"seed": 0, "steps": 1, "solver": "euler"}
    spied.upscale(images, **how)
    spied.upscale(images, level={"up1": 5.5}, **how)
    spied.stages(3, **how)
    (clean, noisy, default) = told
    assert [set(told["level"].tolist()) for told in (clean, noisy, default)] == [{CLEAN}, {5.5}, {3.0}]
    expected = enlarge((images - 8) / 8, (5, 8))
    torch.testing.assert_close(clean["low"], expected, rtol=0, atol=1e-6)
    off = noisy["low"] - expected * math.sqrt(1 / (1 + math.exp(-5.5)))
    assert 0.02 < float(off.std()) < 0.07  # sigma 0.064, less what enlarging averages away
    from_third = trio.upscale(8 + normal(2, 1, 5, 8, dtype=torch.float32), **how)
    assert from_third.shape == (2, 1, 11, 13)
    bytes_ = trio.upscale(torch.zeros(2, 1, 5, 8, dtype=torch.uint8), **how)
    assert torch.equal(bytes_, trio.upscale(torch.zeros(2, 1, 5, 8), **how))


class _Told:
    """A network that keeps what it was told of the lower image."""

    def __init__(self, network, told):
        self.network, self.told = network, told

    def __call__(self, x, t, low=None, level=None, **cond):
        self.told.append({"low": low, "level": level})
        return self.network(x, t, low=low, level=level, **cond)


def test_saved_loaded_and_converted_it_is_the_same(trio, tmp_path):
    folder = fl.save(trio, tmp_path / "trio")
    settings = json.loads((folder / "system.json").read_text())
    assert settings["models"] == ["base", "up1", "up2"]
    assert settings["settings"]["levels"] == {"up1": 3.0, "up2": 2.0}
    assert settings["settings"]["augmentations"]["up2"] == {"lowest": -2.0, "highest": 6.0, "clean": 0.0}
    assert settings["settings"]["resize"] == {"smaller": "area", "larger": "bilinear"}
    again = fl.load(folder)
    assert isinstance(again, Cascade)
    assert isinstance(again.models["up1"].network, Upsampler)
    assert again.models["up2"].network.augmentation == Augmentation(-2.0, 6.0, 0.0)
    how = {"steps": 2, "seed": 1, "cond": {"label": LABELS[:2]}}
    assert torch.equal(fl.sample(again, 2, **how), fl.sample(trio, 2, **how))
    seen = fl.convert(trio, path="cosine", prediction="v")
    assert [model.prediction.name for model in seen.models.values()] == ["v"] * 3
    assert (seen.levels, seen.augmentations) == (trio.levels, trio.augmentations)
    x, t = normal(2, 1, 5, 8), 0.4
    cond = {"low": normal(2, 1, 5, 8, seed=1).float(), "level": torch.full((2,), 3.0)}
    own = trio.models["up1"]
    s = own.path.time(seen.models["up1"].path.log_snr(t))
    y = x * math.hypot(*own.path(s)[:2]) / math.hypot(*seen.models["up1"].path(t)[:2])
    torch.testing.assert_close(seen.models["up1"](x, t, **cond).data, own(y, s, **cond).data, rtol=1e-4, atol=1e-4)
    for broken, said in (({"resize": "cubic"}, "resizes by"), ({"levels": {"up1": 9.0}}, "together: level is 9.0")):
        changed = {**settings["settings"], **broken}
        (folder / "system.json").write_text(json.dumps({**settings, "settings": changed}))
        with pytest.raises(RunError, match=said):
            fl.load(folder)


def image_model(*shape: int, network=None) -> fl.Model:
    return fl.Model(network or (lambda x, t: x), "rectified", shape=shape)


def lifted(*shape: int) -> fl.Model:
    return image_model(*shape, network=lambda x, t, low, level: x)


BASE = image_model(1, 4, 4)
CHAINS = {
    "one": ([BASE], "expected a base and one above"),
    "no model": ([BASE, "up"], "up1 is a str"),
    "points": ([image_model(4), lifted(1, 8, 8)], r"base is of samples \(4,\)"),
    "no shape": ([BASE, lifted(1, 8, 8).under(shape=None)], "up1 is of samples None"),
    "channels": ([BASE, lifted(3, 8, 8)], "base has 1 channels, and up1 has 3"),
    "same size": ([BASE, lifted(1, 4, 4)], r"base makes images \(1, 4, 4\), and up1 \(1, 4, 4\)"),
    "smaller": ([BASE, lifted(1, 8, 3)], "expected each stage to be larger"),
    "base takes low": ([lifted(1, 4, 4), lifted(1, 8, 8)], "base starts from a lower image"),
    "upper takes none": ([BASE, image_model(1, 8, 8)], "up1's function takes no lower image"),
    "plain U-Net above": ([BASE, image_model(1, 8, 8, network=fl.networks.unet(1, 8, None, 8))], "UNet takes no lower"),
    "other lower size": ([BASE, image_model(1, 8, 8, network=upsampler(1, 8, 3, None, 8))], r"images of \(3, 3\)"),
    "unsaid": ([BASE, lifted(1, 8, 8)], "does not say what it was trained under"),
}


@pytest.mark.parametrize(("models", "said"), CHAINS.values(), ids=CHAINS.keys())
def test_models_that_do_not_chain_are_named(models, said):
    with pytest.raises((OptionError, ShapeError), match=said) as caught:
        Cascade(models)
    one_line(caught.value)


ASKED = {
    "level out of range": ({"level": 9.0}, "level is 9.0; expected what up1 was trained under: 0 to 8, or clean"),
    "clean, unknown": ({"level": {"up2": math.inf}}, "level is inf; expected what up2 was trained under: -2 to 6"),
    "no number": ({"level": "high"}, "level is high"),
    "no such stage": ({"level": {"up3": 2.0}}, "unknown stage of level 'up3'"),
    "stopped too late": ({"truncated": {"up2": 0.9999}}, "at truncated 0.9999; expected what up2"),
    "stopped at no time": ({"truncated": 1.0}, "truncated is 1.0; expected a time between 0 and 1"),
    "both": ({"truncated": {"up1": 0.8}, "level": {"up1": 3.0}}, "expected one of them"),
    "two beginnings": ({"low": torch.zeros(2, 1, 3, 4)}, "low and start are given"),
    "times that end early": ({"times": {"base": [0.0, 0.5]}}, "base's times end at 0.5; expected 1, or truncated="),
}


@pytest.mark.parametrize(("asked", "said"), ASKED.values(), ids=ASKED.keys())
def test_what_a_stage_does_not_know_is_refused_before_any_work(trio, asked, said):
    calls = []
    with pytest.raises(OptionError, match=said) as caught:
        fl.sample(trio, 2, callback=calls.append, **asked)
    one_line(caught.value)
    assert not calls


def test_images_of_no_stage_are_refused(trio):
    with pytest.raises(ShapeError, match=r"the images are \(2, 1, 11, 13\); expected \(B, 1, 3, 4\) or \(B, 1, 5, 8\)"):
        trio.upscale(torch.zeros(2, 1, 11, 13))
    for name in ("noise", "init", "state"):
        with pytest.raises(OptionError, match=f"low and {name} are given"):
            trio.upscale(torch.zeros(2, 1, 3, 4), **{name: torch.zeros(2, 1, 3, 4)})
    with pytest.raises(OptionError, match="low and truncated"):
        trio.upscale(torch.zeros(2, 1, 3, 4), truncated=0.8)
    with pytest.raises(OptionError, match="expected base, up1, up2"):
        trio.with_models({"base": trio.models["base"]})
    with pytest.raises(OptionError, match="unknown upper stage 'base'"):
        Cascade(list(trio.models.values()), augmentations={"base": None})
    with pytest.raises(OptionError, match="an Upsampler needs the lower image"):
        fl.sample(trio.models["up1"], 2, steps=1)
