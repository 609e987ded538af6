"""The autoregressive prior: a map of noise to embeddings, whose law is known where its network is."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from torch.nn import functional as F

import fluvial as fl
from fluvial import training
from fluvial.errors import OptionError
from fluvial.guidance import CFG, CFGZero
from fluvial.systems import AutoregressivePrior, UnCLIP, embedded, train_autoregressive_prior, train_clip
from fluvial.systems.autoregressive import principal, quantile
from problems import command

ROWS = {
    "data": torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(0)),
    "caption": ["a one", "a two", "the three"] * 4,
}
QUIET = {"progress": False, "batch_size": 8}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def prior_of(rows, components, buckets=16, stirred=0.0, **changes):
    """Fitted to these rows (n, D), its network as it begins, or stirred."""
    torch.manual_seed(0)
    given = {"text": 3, "width": 8, "depth": 2, **changes}
    made = AutoregressivePrior(rows.shape[1], components=components, buckets=buckets, **given).to(rows.dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(stirred * torch.randn(parameter.shape, generator=generator, dtype=rows.dtype))
    return made.fit(rows).eval()


def at_noise(x):
    return torch.zeros(len(x), dtype=x.dtype)


# The map


def test_quantiles_of_buckets_are_the_inverse_of_their_distribution_function():
    p = torch.tensor([[0.25, 0.5, 0.25], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    u = torch.tensor([0.5, 0.75, 0.25], dtype=torch.float64)
    bucket, share = quantile(p, u)
    assert bucket.tolist() == [1, 0, 2]
    torch.testing.assert_close(share, torch.tensor([0.5, 0.75, 0.25], dtype=torch.float64), rtol=0, atol=1e-15)
    ends = quantile(p[[0, 0, 1]], torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64))
    assert ends[0].tolist() == [0, 2, 2]
    assert ends[1].tolist() == [0.0, 1.0, 0.0], "the last bucket, which is empty, begins where the others end"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_untrained_it_draws_each_component_from_its_quantiles_in_the_data(dtype):
    """Noise at the normal's quantiles gives the data's quantiles, and nothing in the directions that were left out."""
    rows = normal(2000, 5) @ torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.1, 0.01], dtype=torch.float64))
    prior = prior_of(rows.to(dtype), 2, buckets=20)
    shares = torch.tensor([0.05, 0.25, 0.5, 0.8, 1.0], dtype=torch.float64)
    noise = torch.special.ndtri(shares.clamp(max=1 - 1e-16))[:, None].expand(-1, 5).to(dtype)
    with torch.no_grad():
        made = prior(noise, at_noise(noise))
    values = made @ prior.rotation.T
    for k in range(2):
        exact = (rows @ prior.rotation[k].double()).quantile(shares)
        torch.testing.assert_close(values[:, k].double(), exact, rtol=0, atol=2e-6)
    outside = made - values @ prior.rotation
    assert outside.abs().max() < 1e-5 if dtype == torch.float32 else 1e-14


def test_the_directions_are_those_of_most_variance():
    turn = torch.linalg.qr(normal(4, 4, seed=3))[0]
    rows = normal(50_000, 4) @ torch.diag(torch.tensor([1.0, 4.0, 2.0, 0.5], dtype=torch.float64)) @ turn
    found, shares = principal(rows)
    cosines = (found @ turn.T).abs()
    torch.testing.assert_close(cosines, torch.eye(4).double()[[1, 2, 0, 3]], rtol=0, atol=0.02)
    torch.testing.assert_close(shares, torch.tensor([16.0, 4.0, 1.0, 0.25]).double() / 21.25, rtol=0.02, atol=0)
    torch.testing.assert_close(found @ found.T, torch.eye(4).double(), rtol=0, atol=1e-12)
    assert (found.gather(1, found.abs().argmax(1, keepdim=True)) > 0).all()


@torch.no_grad()
def test_what_is_drawn_has_the_probabilities_that_are_trained():
    """By a network with random weights: shares of pairs of buckets against exp(-loss), over all pairs they add to 1."""
    prior = prior_of(normal(500, 2), 2, buckets=4, stirred=0.7)
    text = normal(1, 3, seed=5)
    middles = 0.5 * (prior.edges[:, 1:] + prior.edges[:, :-1])
    grid = torch.cartesian_prod(*middles) @ prior.rotation
    p = (-prior(grid, None, text.expand(16, -1)).double().sum(1)).exp()
    torch.testing.assert_close(p.sum(), torch.tensor(1.0).double(), rtol=0, atol=1e-6)
    n = 40_000
    noise = normal(n, 2, seed=6)
    drawn = prior.quantised(prior(noise, at_noise(noise), text.expand(n, -1)))
    share = torch.bincount(drawn @ torch.tensor([4, 1]), minlength=16) / n
    assert p.max() > 2 * p.min()
    torch.testing.assert_close(share.double(), p, rtol=0, atol=5 * math.sqrt(0.25 / n))


@torch.no_grad()
@pytest.mark.parametrize("components", [1, 2, 5])
def test_one_component_at_a_time_it_is_asked_what_it_is_trained_on(components):
    """The noise of what was drawn, found again by the whole sequence at once."""
    prior = prior_of(normal(300, 5), components, buckets=7, stirred=0.5)
    noise, text = normal(6, 5, seed=2), normal(6, 3, seed=3)
    text[2] = 0.0
    made = prior(noise, at_noise(noise), text)
    buckets = prior.quantised(made)
    logits, _ = prior.logits(buckets[:, :-1], prior.label(({"text": text}, made)), [None, None])
    p = logits.softmax(-1)
    own = p.gather(2, buckets[..., None])[..., 0]
    below = p.cumsum(-1).gather(2, buckets[..., None])[..., 0] - own
    values = made @ prior.rotation.T
    low = prior.edges.gather(1, buckets.T).T
    high = prior.edges.gather(1, buckets.T + 1).T
    back = torch.special.ndtri(below + own * (values - low) / (high - low))
    torch.testing.assert_close(back, noise[:, :components], rtol=0, atol=1e-9)


@torch.no_grad()
def test_guidance_is_of_the_logits():
    prior = prior_of(normal(500, 2), 1, buckets=8, stirred=0.7)
    text = normal(1, 3, seed=5)
    logits = {}
    for name, told in (("cond", text), ("null", None)):
        label = prior.label(({"text": told}, text))
        logits[name] = prior.logits(torch.empty(1, 0, dtype=torch.long), label, [None, None])[0][0, 0]
    p = (logits["null"] + 3.0 * (logits["cond"] - logits["null"])).softmax(0)
    n = 40_000
    noise = normal(n, 2, seed=6)
    drawn = prior(noise, at_noise(noise), text.expand(n, -1), torch.full((n,), 3.0))
    share = torch.bincount(prior.quantised(drawn)[:, 0], minlength=8) / n
    torch.testing.assert_close(share.double(), p, rtol=0, atol=5 * math.sqrt(0.25 / n))
    assert (p - logits["cond"].softmax(0)).abs().max() > 0.02
    one = prior(noise[:9], at_noise(noise[:9]), text.expand(9, -1), torch.ones(9))
    assert one.equal(prior(noise[:9], at_noise(noise[:9]), text.expand(9, -1)))


# Trained, and in unCLIP


@pytest.fixture(scope="module")
def clip():
    return train_clip(ROWS, steps=2, dim=8, width=32, layers=1, **QUIET)


@pytest.fixture(scope="module")
def data(clip):
    return embedded(ROWS, clip)


@pytest.fixture(scope="module")
def trained(clip):
    """Three texts, three embeddings: there is nothing else to draw."""
    rows = embedded(ROWS, clip)
    rows.embedding = F.normalize(normal(3, 8, dtype=torch.float32), dim=1).repeat(4, 1)
    return rows, train_autoregressive_prior(
        rows, steps=200, width=32, depth=1, lr=3e-3, warmup=20, ema_decay=0.9, progress=False, batch_size=64
    ).ema


def test_it_learns_which_embedding_a_text_has(trained):
    rows, model = trained
    assert model.network.rotation.shape == (2, 8), "three points about their mean lie in a plane"
    made = fl.sample(model, 6, cond={"text": rows.text[:6]}, seed=0)
    assert (made - rows.embedding[:6]).norm(dim=1).max() < 0.2
    swapped = fl.sample(model, 6, cond={"text": rows.text[[1, 2, 0] * 2]}, seed=0)
    assert (swapped - rows.embedding[[1, 2, 0] * 2]).norm(dim=1).max() < 0.2


def test_samples_depend_on_the_seed_and_their_number_alone(trained):
    rows, model = trained
    whole = fl.sample(model, 6, cond={"text": rows.text[:6]}, seed=4)
    part = fl.sample(model, 2, cond={"text": rows.text[4:6]}, seed=4, first=4)
    torch.testing.assert_close(part, whole[4:], rtol=0, atol=1e-6)
    noise = fl.random.normal(6, (8,), 4)
    torch.testing.assert_close(fl.sample(model, noise, cond={"text": rows.text[:6]}), whole, rtol=0, atol=1e-6)


def test_a_run_that_goes_on_ends_with_the_same_bits_and_loads(data, tmp_path):
    size = {"width": 8, "depth": 1, "seed": 3, **QUIET}
    train_autoregressive_prior(data, tmp_path / "whole", 4, **size)
    with pytest.raises(fl.errors.RunError, match="cosine"):
        train_autoregressive_prior(data, tmp_path / "whole", 6, **size)
    size["schedule"] = "constant"
    train_autoregressive_prior(data, tmp_path / "once", 4, **size)
    train_autoregressive_prior(data, tmp_path / "parts", 2, **size)
    run = train_autoregressive_prior(data, tmp_path / "parts", 4, **size)
    for weights in ("raw", "ema"):
        assert training.model_hash(tmp_path / "parts", weights) == training.model_hash(tmp_path / "once", weights)
    loaded, told = fl.load(tmp_path / "parts"), {"text": data.text[:3]}
    assert fl.sample(loaded, 3, cond=told, seed=1).equal(fl.sample(run.ema, 3, cond=told, seed=1))


def decoder_of(clip):
    from fluvial.systems.unclip_networks import decoder

    return fl.Model(decoder((1, 4, 4), {"embedding": 8}, 8, clip=clip.hash).eval(), "rectified", shape=(1, 4, 4))


def test_in_unclip_it_makes_one_jump_and_takes_the_scale(clip, trained, tmp_path):
    model = trained[1]
    system = UnCLIP(model, decoder_of(clip), clip)
    texts = {"text": clip.tokens(ROWS["caption"][:3])}
    told = {"text": clip.texts(ROWS["caption"][:3])}
    how = {"solver": "heun", "steps": 2, "seed": 5}
    made = system.stages(3, cond=texts, guidance={"prior": CFG(2.0), "decoder": CFG(1.5)}, **how)
    alone = fl.sample(model, 3, cond={**told, "guidance": torch.full((3,), 2.0)}, seed=5)
    torch.testing.assert_close(made["prior"], F.normalize(alone, dim=1), rtol=0, atol=1e-6)
    assert system.stages(3, **how)["prior"].isfinite().all()
    fl.save(system, tmp_path / "system")
    again = fl.load(tmp_path / "system")
    assert isinstance(again.models["prior"].network, AutoregressivePrior)
    assert again.stages(3, cond=texts, **how)["decoder"].equal(system.stages(3, cond=texts, **how)["decoder"])
    with pytest.raises(OptionError, match=r"prior's guidance is CFGZero.*expected CFG\(scale\)"):
        system.stages(3, cond=texts, guidance={"prior": CFGZero(2.0)}, **how)
    with pytest.raises(OptionError, match=r"prior's guidance is CFG.*expected CFG\(scale\)"):
        system.stages(3, cond=texts, guidance=CFG(2.0, interval=(0.0, 1.0)), **how)


def test_errors_by_name(data, trained):
    with pytest.raises(OptionError, match=r"asked about time 0\.5; expected its one jump from noise"):
        fl.sample(trained[1], 3, cond={"text": data.text[:3]}, solver="euler", steps=2)
    with pytest.raises(OptionError, match=r"kept is 0\.0; expected the share of the variance"):
        train_autoregressive_prior(data, kept=0.0)
    for given, text in (
        ({"components": 9}, "components are 9; expected 1 to the 8"),
        ({"width": 6}, "width is 6; expected a multiple of 4"),
        ({"buckets": 1}, "buckets is 1"),
        ({"drop": -0.1}, "drop of 'text' is -0.1"),
    ):
        with pytest.raises(OptionError, match=text):
            AutoregressivePrior(**{"dim": 8, "text": 8, "components": 2, **given})


def test_the_command_trains_one(clip, tmp_path, capsys):
    training_data = tmp_path / "rows.npz"
    numpy.savez(training_data, data=ROWS["data"].numpy(), caption=ROWS["caption"])
    clip.save(tmp_path / "clip")
    given = ["train-prior", str(training_data), str(tmp_path / "clip"), "--out", str(tmp_path / "run")]
    assert command(*given, "--steps", "2", "--batch-size", "4", "--autoregressive") == 0
    assert isinstance(fl.load(tmp_path / "run").network, AutoregressivePrior)
    assert command(*given, "--autoregressive", "--path", "vp") == 2
    assert "an autoregressive prior has none" in capsys.readouterr().err
