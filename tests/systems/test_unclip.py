"""unCLIP: where everything is known in closed form, and how its parts are put together."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import fluvial as fl
from fluvial.errors import OptionError, RunError, ShapeError
from fluvial.guidance import CFG
from fluvial.systems import CLIP, Prior, UnCLIP, train_clip
from fluvial.systems.unclip import slerp
from fluvial.systems.unclip_networks import decoder as decoder_for
from fluvial.training import checkpoints
from problems import normal, one_line

PRIOR_STD, STD = 0.6, 0.3
MATRIX = torch.tensor([[1.0, -0.5], [0.3, 0.8], [-0.7, 0.4]])
TEXTS = torch.tensor([[0.5, -1.0], [0.0, 2.0]])
MEASURE = {"solver": "heun", "steps": 48}


def gaussian(name, matrix, std):
    """The exact model of Normal(matrix c, std² I) for the condition c (B, D), which is 0 where there is none."""

    def network(x, t, **cond):
        mean, t = cond[name].to(x) @ matrix.to(x).T, t[:, None].to(x)
        return mean + std**2 * t / (t**2 * std**2 + (1 - t) ** 2) * (x - t * mean)

    null = {name: torch.zeros(matrix.shape[1])}
    return fl.Model(network, "rectified", "data", null=null, shape=(len(matrix),))


@pytest.fixture
def known():
    """c ~ Normal(y, PRIOR_STD²), x ~ Normal(MATRIX c, STD²); texts are numbered, and their embeddings given."""
    clip = SimpleNamespace(dim=2, hash="exact", project=lambda c: c, texts=lambda tokens: TEXTS[tokens[:, 0]])
    return UnCLIP(gaussian("text", torch.eye(2), PRIOR_STD), gaussian("embedding", MATRIX, STD), clip)  # type: ignore[arg-type]


def text(n, which=1):
    return {"text": torch.full((n, 1), which)}


def test_samples_are_the_composition_in_closed_form(known):
    """The ODE of a Gaussian is linear: the sample of noise z is mean + std z, in each stage."""
    seed = {"prior": 3, "decoder": 4}
    made = known.stages(6, cond=text(6), seed=seed, **MEASURE)
    c = TEXTS[1] + PRIOR_STD * fl.random.normal(6, (2,), 3)
    x = c @ MATRIX.T + STD * fl.random.normal(6, (3,), 4)
    assert list(made) == ["prior", "decoder"]
    torch.testing.assert_close(made["prior"], c, rtol=0, atol=2e-3)
    torch.testing.assert_close(made["decoder"], x, rtol=0, atol=3e-3)


def test_the_stages_are_independent_and_their_covariance_is_right(known):
    n = 20_000
    made = known.stages(n, cond=text(n), seed=5, solver="heun", steps=12)
    joint = torch.cat([made["prior"], made["decoder"]], 1)
    cov_c = PRIOR_STD**2 * torch.eye(2)
    expected = torch.zeros(5, 5)
    expected[:2, :2], expected[2:, 2:] = cov_c, MATRIX @ cov_c @ MATRIX.T + STD**2 * torch.eye(3)
    expected[2:, :2] = MATRIX @ cov_c
    expected[:2, 2:] = expected[2:, :2].T
    # With one noise for both stages these would differ by PRIOR_STD STD = 0.18.
    torch.testing.assert_close(torch.cov(joint.T), expected, rtol=0, atol=0.02)
    mean = torch.cat([TEXTS[1], MATRIX @ TEXTS[1]])
    torch.testing.assert_close(joint.mean(0), mean, rtol=0, atol=0.025)


def test_guidance_by_stage_is_of_that_stage_alone(known):
    """Of Gaussians of one width, guidance multiplies the mean by its scale."""
    z = {"prior": 3, "decoder": 4}
    c0, x0 = fl.random.normal(4, (2,), 3), fl.random.normal(4, (3,), 4)
    for scales in ({"prior": 2.0}, {"decoder": 3.0}, {"prior": 2.0, "decoder": 3.0}, {}):
        guidance = {name: CFG(scale) for name, scale in scales.items()}
        made = known.stages(4, cond=text(4), seed=z, guidance=guidance, **MEASURE)
        c = scales.get("prior", 1.0) * TEXTS[1] + PRIOR_STD * c0
        torch.testing.assert_close(made["prior"], c, rtol=0, atol=4e-3)
        x = scales.get("decoder", 1.0) * made["prior"] @ MATRIX.T + STD * x0
        torch.testing.assert_close(made["decoder"], x, rtol=0, atol=4e-3)


def test_steps_and_noise_are_each_stage_s_own(known):
    x = fl.sample(known, 3, cond=text(3), seed=1, steps={"prior": 4, "decoder": 7})
    c = fl.sample(known.models["prior"], 3, cond={"text": TEXTS[[1] * 3]}, seed=1, steps=4)
    own = fl.sample(known.models["decoder"], 3, cond={"embedding": c}, seed=(1 + 0x9E3779B97F4A7C15), steps=7)
    torch.testing.assert_close(x, own, rtol=0, atol=0)
    noise = torch.randn(3, 2)
    made = known.stages(noise, cond=text(3), seed=1, steps=4)["prior"]
    again = known.stages(noise=noise, cond=text(3), seed=1, steps=4)["prior"]
    torch.testing.assert_close(made, again, rtol=0, atol=0)
    with pytest.raises(OptionError, match="unknown condition of unCLIP 'label'"):
        fl.sample(known, 3, cond={"label": torch.zeros(3)})
    with pytest.raises(OptionError, match="record is for single models"):
        fl.sample(known, 3, record=True)


# With networks.


@pytest.fixture(scope="module")
def clip():
    data = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    rows = {"data": data, "caption": ["a one", "a two", "the three"] * 4}
    return train_clip(rows, steps=1, dim=8, width=32, layers=1, batch_size=4, progress=False)


def stirred(network):
    """The network with random weights everywhere, also where it starts from zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def prior_of(of, **changes):
    given = {"dim": 8, "text": 8, "width": 16, "depth": 1, "clip": of.hash, **changes}
    return fl.Model(stirred(Prior(**given)), "rectified", shape=(given["dim"],))


def decoder_of(of, **changes):
    given = {"shape": (1, 8, 8), "conditions": {"embedding": 8, "text": 8}, "width": 8, "clip": of.hash, **changes}
    network = stirred(decoder_for(**given))
    clock, n = fl.model.Clock.noise_level(), fl.model.Normalisation((0.5,), (0.5,), 0.0, 1.0)
    return fl.Model(network, "rectified", clock=clock, shape=(1, 8, 8), normalisation=n)


@pytest.fixture(scope="module")
def system(clip):
    torch.manual_seed(0)
    return UnCLIP(prior_of(clip), decoder_of(clip), clip)


def call(network, **cond):
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([100.0, 700.0])
    with torch.no_grad():
        return network(x, t, **cond)


def test_each_condition_has_a_null_of_its_own(system):
    network, c, y = system.models["decoder"].network, normal(2, 8, seed=3).float(), normal(2, 8, seed=4).float()
    none, whole = torch.zeros(2, 8), call(network, embedding=c, text=y)
    for name, kept in (("embedding", {"text": y}), ("text", {"embedding": c})):
        without = call(network, **kept)
        torch.testing.assert_close(call(network, **kept, **{name: none}), without, rtol=0, atol=0)
        assert (without - whole).abs().amax() > 1e-3
    mixed = call(network, embedding=torch.stack([c[0], none[0]]), text=y)
    torch.testing.assert_close(mixed[0], whole[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(mixed[1], call(network, text=y)[1], rtol=0, atol=1e-6)
    with pytest.raises(ShapeError, match=r"'embedding' has shape \(2, 7\); expected \(2, 8\)"):
        call(network, embedding=c[:, :7])
    with pytest.raises(OptionError, match="without 'text'"):
        call(stirred(decoder_for((1, 8, 8), {"embedding": 8}, 8)), text=y)


def test_training_leaves_each_condition_out_by_its_own_share(clip):
    c, y = normal(2, 8, seed=3).float(), normal(2, 8, seed=4).float()
    network = stirred(decoder_for((1, 8, 8), {"embedding": 8, "text": 8}, 8, {"embedding": 0.0, "text": 1.0}))
    expected = call(network, embedding=c)
    torch.testing.assert_close(call(network.train(), embedding=c, text=y), expected, rtol=0, atol=1e-6)
    assert decoder_for((1, 8, 8), {"embedding": 8, "text": 8}, 8).drop == {"embedding": 0.1, "text": 0.5}
    conditions = network.unet.class_embedding
    conditions.drop = {"embedding": 0.25}
    torch.manual_seed(0)
    out = conditions(({"embedding": normal(4000, 8, seed=5).float()}, torch.zeros(4000)))
    absent = conditions.absent["embedding"] + conditions.absent["text"]
    share = (out == absent).all(1).double().mean()
    assert abs(float(share) - 0.25) < 0.03
    with pytest.raises(OptionError, match="a share from 0 to 1"):
        Prior(8, 8, drop=1.5)


def test_guidance_of_a_stage_is_against_rows_of_zeros(system, clip):
    c = F.normalize(normal(3, 8, seed=3).float(), dim=1)
    found = system.decode(c, seed=1, steps=2, solver="euler", guidance={"decoder": CFG(2.5)})
    plain = system.models["decoder"]
    none = {"embedding": torch.zeros(3, 8), "text": torch.zeros(3, 8)}

    def mixed(x, t, **cond):
        with torch.no_grad():
            null, told = (plain.network(x, t, **each) for each in (none, {"embedding": c}))
        return null + 2.5 * (told - null)

    by_hand = fl.sample(plain.with_network(mixed), 3, seed=(1 + 0x9E3779B97F4A7C15), steps=2, solver="euler")
    torch.testing.assert_close(found, by_hand, rtol=0, atol=1e-5)


def test_no_text_is_the_prior_s_null(system, clip):
    with_zeros = system.stages(3, cond={"text": torch.zeros(3, clip.length, dtype=torch.long)}, seed=1, steps=2)
    without = system.stages(3, seed=1, steps=2)
    torch.testing.assert_close(with_zeros["decoder"], without["decoder"], rtol=0, atol=1e-6)
    torch.testing.assert_close(without["prior"].norm(dim=1), torch.ones(3), rtol=0, atol=1e-6)
    told = system.draw(["a one"] * 3, seed=1, steps=2)
    assert (told - without["decoder"]).abs().amax() > 1e-3
    with pytest.raises(ShapeError, match=rf"token ids \(B, {clip.length}\)"):
        fl.sample(system, 2, cond={"text": torch.zeros(2, clip.length + 2, dtype=torch.long)})


def test_parts_that_do_not_fit_are_named(clip):
    good = {"prior": prior_of(clip), "decoder": decoder_of(clip)}
    for name, part, said in [
        ("prior", prior_of(clip, dim=6), r"the prior makes samples \(6,\); expected embeddings \(8,\)"),
        ("prior", prior_of(clip, text=5), "the prior's text has 5 numbers, and this CLIP's embeddings have 8"),
        ("prior", prior_of(clip, clip="0123"), "the prior was trained on embeddings of CLIP 0123, and this is"),
        ("decoder", decoder_of(clip, conditions={"embedding": 6}), "the decoder's embedding has 6 numbers"),
        ("decoder", decoder_of(clip, conditions={"text": 8}), "the decoder is told text; expected one .* embedding"),
        ("decoder", decoder_of(clip, clip="0123"), "the decoder was trained on embeddings of CLIP 0123"),
    ]:
        with pytest.raises((ShapeError, OptionError), match=said) as caught:
            UnCLIP(**{**good, name: part}, clip=clip)
        one_line(caught.value)


def test_saved_and_loaded_it_is_the_same(system, tmp_path):
    folder = fl.save(system, tmp_path / "system")
    assert sorted(path.name for path in folder.iterdir()) == ["clip", "decoder", "prior", "system.json"]
    again = fl.load(folder)
    assert isinstance(again, UnCLIP)
    how = {"seed": 2, "steps": 3, "guidance": {"prior": CFG(2.0), "decoder": CFG(1.5)}}
    how["cond"] = {"text": system.clip.tokens(["a two", "the three"])}
    for one, other in zip(system.stages(2, **how).values(), again.stages(2, **how).values()):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    drawn = [each.draw(["a two"], seed=0, steps=2) for each in (system, again)]
    torch.testing.assert_close(*drawn, rtol=0, atol=0)
    assert CLIP.load(folder / "clip").hash == system.clip.hash
    assert checkpoints.read_config(folder / "prior")["network"]["config"]["clip"] == system.clip.hash
    index = folder / "system.json"
    index.write_text(index.read_text().replace(system.clip.hash, "0123"))
    with pytest.raises(RunError, match=f"CLIP {system.clip.hash}, and the system was saved with 0123"):
        fl.load(folder)


def test_networks_can_be_told_numbers_and_answer_as_before(system):
    c = normal(2, 8, seed=3).float()
    for name, cond, x in (
        ("decoder", {"embedding": c}, torch.randn(2, 1, 8, 8)),
        ("prior", {"text": c}, torch.randn(2, 8)),
    ):
        plain = system.models[name].network
        told, t = fl.networks.told(plain, ["r"]), torch.tensor([0.2, 0.7])
        with torch.no_grad():
            torch.testing.assert_close(told(x, t, r=t + 0.1, **cond), plain(x, t, **cond), rtol=0, atol=1e-6)
        built = type(told).from_config(told.config())
        assert {k: v.shape for k, v in built.state_dict().items()} == {k: v.shape for k, v in told.state_dict().items()}


def test_converted_it_samples_from_the_same_estimates(system):
    converted = fl.convert(system, path="vp", prediction="noise")
    assert converted.models["prior"].prediction.name == "noise"
    x, c = torch.randn(2, 1, 8, 8), normal(2, 8, seed=3).float()
    own, seen = system.models["decoder"], converted.models["decoder"]
    t = float(seen.path.time(own.path.log_snr(0.4)))
    a, b = own.path(0.4), seen.path(t)
    norm = ((a.alpha**2 + a.sigma**2) / (b.alpha**2 + b.sigma**2)) ** 0.5
    with torch.no_grad():
        torch.testing.assert_close(
            seen(x / norm, t, embedding=c).data, own(x, 0.4, embedding=c).data, rtol=1e-4, atol=1e-4
        )
    assert converted.stages(2, seed=0, steps=2)["decoder"].isfinite().all()


# From images.


def test_slerp_keeps_the_sphere_and_its_ends_are_exact():
    a, b = F.normalize(normal(2, 8, seed=1).float(), dim=1).split(1)
    share = torch.linspace(0, 1, 5, dtype=torch.float64)
    between = slerp(a, b, share)
    assert between[0].equal(a[0])
    assert between[-1].equal(b[0])
    torch.testing.assert_close(between.norm(dim=1), torch.ones(5), rtol=0, atol=1e-6)
    angles = (between[:-1] * between[1:]).sum(1).acos()
    torch.testing.assert_close(angles, angles[:1].expand(4), rtol=0, atol=1e-4)
    one, two = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    torch.testing.assert_close(slerp(one, two, share[2:3]), torch.tensor([[0.5, 0.5]]).sqrt(), rtol=0, atol=1e-7)
    torch.testing.assert_close(slerp(one, 3 * one, share[1:2]), 1.5 * one, rtol=0, atol=1e-7)


def test_variations_are_decodings_of_the_image_s_embedding(system):
    images = torch.rand(2, 1, 8, 8)
    made = system.variations(images, 3, seed=4, steps=2)
    assert made.shape == (2, 3, 1, 8, 8)
    each = system.clip.images(images, system.normalisation).repeat_interleave(3, 0)
    torch.testing.assert_close(made.flatten(0, 1), system.decode(each, seed=4, steps=2), rtol=0, atol=0)
    for n in (0, 1.5):
        with pytest.raises(OptionError, match="whole number of variations"):
            system.variations(images, n)


def test_interpolation_shares_its_noise_or_begins_and_ends_with_the_images(system):
    a, b = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    made = system.interpolate(a, b, 4, seed=1, steps=2)
    ends = system.variations(torch.stack([a, b]), 1, seed=1, steps=2)[:, 0]
    torch.testing.assert_close(made[0], ends[0], rtol=0, atol=1e-6)  # the first variation has the same noise
    assert (made[3] - ends[1]).abs().amax() > 1e-3  # the second has another
    encoded = system.interpolate(a, b, 3, noise="encoded", steps=24)
    torch.testing.assert_close(encoded[0], a, rtol=0, atol=2e-2)
    torch.testing.assert_close(encoded[2], b, rtol=0, atol=2e-2)
    with pytest.raises(OptionError, match="unknown noise 'same'"):
        system.interpolate(a, b, 3, noise="same")
    with pytest.raises(ShapeError, match="of both"):
        system.interpolate(a, b[:, :4], 3)
    with pytest.raises(OptionError, match="2 or more"):
        system.interpolate(a, b, 1)
