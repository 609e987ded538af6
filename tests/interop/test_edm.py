"""EDM's and EDM2's checkpoints as models: each wrapping against its closed formula, sampling against their loop."""

from __future__ import annotations

import json
import math

import pytest
import torch
from edm_files import NETWORKS, content, dumps, filled, formula, pickled, their_names

import fluvial as fl
from fluvial import paths
from fluvial.convention import Clock, Convention, SigmaClock
from fluvial.errors import OptionError, RunError
from fluvial.guidance import CFG
from fluvial.interop import from_edm, in_words
from fluvial.interop.edm import EDMNetwork
from fluvial.predictions import Noise
from fluvial.solvers import Heun
from problems import one_line

SIGMAS = [0.021, 0.11, 0.5, 2.0, 17.0, 49.0]


def levels_of_iddpm(m, c1=0.001, c2=0.008):
    """u_M = 0 at the data … u_0, float32 as in the files; Karras et al. (2022), equation 182."""
    bar = [math.sin(math.pi / 2 * j / m / (1 + c2)) ** 2 for j in range(m + 1)]
    u = [0.0] * (m + 1)
    for j in range(m, 0, -1):
        u[j - 1] = math.sqrt((u[j] ** 2 + 1) / max(bar[j - 1] / bar[j], c1) - 1)
    return torch.tensor(u)


U = levels_of_iddpm(40)
WRAPPINGS = {
    "EDMPrecond": ("ddpmpp", {"sigma_min": 0.0, "sigma_max": float("inf"), "sigma_data": 0.6}),
    "Precond": ("edm2", {"sigma_data": 0.5, "encoder": "StabilityVAEEncoder"}),
    "VPPrecond": ("skips", {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5}),
    "VEPrecond": ("ncsnpp", {"sigma_min": 0.02, "sigma_max": 100}),
    "iDDPMPrecond": ("adm_variance", {"u": U, "M": 40}),
}


def checkpoint(path, wrapping, **changes):
    """A file of this wrapping around a filled network, and the network itself in float64."""
    name, settings = WRAPPINGS[wrapping]
    network = EDMNetwork(**NETWORKS[name])
    filled(network.model)
    path.write_bytes(pickled(network, wrapping, **{**settings, **changes}))
    return path, network.double().eval()


def denoised(wrapping, network, x, sigma, **cond):
    """D(x, sigma) of Karras et al. (2022), table 1, in float64; sigma a float."""
    settings = WRAPPINGS[wrapping][1]
    skip, out, into = 1.0, -sigma, 1.0 / math.sqrt(sigma**2 + 1)
    if wrapping in ("EDMPrecond", "Precond"):
        sd = settings["sigma_data"]
        skip, out = sd**2 / (sigma**2 + sd**2), sigma * sd / math.sqrt(sigma**2 + sd**2)
        into, clock = 1.0 / math.sqrt(sigma**2 + sd**2), math.log(sigma) / 4
    elif wrapping == "VPPrecond":
        d, low = settings["beta_d"], settings["beta_min"]
        clock = 999 * (math.sqrt(low**2 + 2 * d * math.log(1 + sigma**2)) - low) / d
    elif wrapping == "VEPrecond":
        out, into, clock = sigma, 1.0, math.log(sigma / 2)
    else:
        clock = len(U) - 2 - int((U - sigma).abs().argmin())
    f = network(into * x, torch.full((len(x),), clock, dtype=torch.float64), **cond)
    return skip * x + out * f


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_every_wrapping_is_its_formula(tmp_path, wrapping):
    file, network = checkpoint(tmp_path / "net.pkl", wrapping)
    model = from_edm(file)
    model.to(torch.float64)
    channels = (model.shape or (0,))[0]
    sigmas = U[[39, 38, 30, 17, 3, 0]].tolist() if wrapping == "iDDPMPrecond" else SIGMAS
    x = 2.0 * formula("state", (3, channels, 8, 8))
    cond = {"label": torch.tensor([1, 0, 2])} if model.null else {}
    batched = []
    with torch.no_grad():
        for sigma in sigmas:
            t = model.path.time(-2 * math.log(sigma))
            state = x * math.sqrt(1 + sigma**2)  # x = data + sigma noise
            expected = denoised(wrapping, network, state, sigma, **cond)
            seen = state * model.path(t).alpha
            found = model(seen, t, **cond)
            torch.testing.assert_close(found.data, expected, rtol=1e-9, atol=1e-9)
            # The noise is large where the level is small: (x - D)/sigma.
            torch.testing.assert_close(found.noise, (state - expected) / sigma, rtol=1e-6, atol=1e-6)
            batched.append((seen[:1], t, expected[:1]))
            if cond:
                none = denoised(wrapping, network, state, sigma)
                torch.testing.assert_close(model(seen, t).data, none, rtol=1e-9, atol=1e-9)
        states, times, expected = zip(*batched)
        one = {"label": torch.ones(len(times), dtype=torch.long)} if cond else {}
        found = model(torch.cat(states), torch.tensor(times, dtype=torch.float64), **one).data
        torch.testing.assert_close(found, torch.cat(expected), rtol=1e-8, atol=1e-8)


def test_what_a_checkpoint_says_of_itself(tmp_path):
    models = {name: from_edm(checkpoint(tmp_path / "net.pkl", name)[0]) for name in WRAPPINGS}
    assert models["EDMPrecond"].path == paths.EDM(0.002, 80.0, 7.0)
    assert models["EDMPrecond"].null == {"label": 2}
    assert models["EDMPrecond"].shape == (3, 8, 8)
    assert (models["EDMPrecond"].normalisation.low, models["EDMPrecond"].normalisation.high) == (-1.0, 1.0)
    assert models["Precond"].shape == (4, 8, 8)
    assert models["Precond"].normalisation == fl.model.Normalisation()  # latents
    assert models["VPPrecond"].path == paths.VP(0.1, 20.0)
    assert models["VPPrecond"].convention.clock == Clock.noise_level(999.0)
    assert models["VEPrecond"].path == paths.VE(0.02, 100.0)
    assert models["VEPrecond"].null is None
    assert in_words(models["VEPrecond"].convention).endswith("time: 1 log(sigma/2)")
    table = models["iDDPMPrecond"]
    assert table.convention.clock == Clock.steps(40)
    assert table.path(0.0).sigma / table.path(0.0).alpha == pytest.approx(float(U[0]), rel=1e-9)
    assert table.path(1.0).sigma / table.path(1.0).alpha == pytest.approx(float(U[39]), rel=1e-9)
    narrow = from_edm(checkpoint(tmp_path / "net.pkl", "EDMPrecond", sigma_min=0.01, sigma_max=50)[0])
    assert narrow.path == paths.EDM(0.01, 50.0)
    for model in models.values():
        assert not model.network.training
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    plain = from_edm(checkpoint(tmp_path / "net.pkl", "Precond", encoder="StandardRGBEncoder")[0])
    assert plain.normalisation.low == -1.0


def test_weights_of_half_precision_are_read_in_full(tmp_path):
    network = EDMNetwork(**NETWORKS["edm2"])
    filled(network.model).half()
    (tmp_path / "net.pkl").write_bytes(pickled(network, "Precond", sigma_data=0.5))
    model = from_edm(tmp_path / "net.pkl")
    for name, value in network.state_dict().items():
        assert torch.equal(model.network.state_dict()[name], value.float())


# Sampling


@pytest.mark.parametrize("wrapping", ["EDMPrecond", "Precond", "VEPrecond"])
def test_heun_in_sigma_is_edms_own_sampler(tmp_path, wrapping):
    """Karras et al. (2022), algorithm 1, 18 steps, written out in float64."""
    file, network = checkpoint(tmp_path / "net.pkl", wrapping)
    model = from_edm(file)
    model.to(torch.float64)
    low, high, rho, steps = 0.02, 80.0, 7, 18
    if wrapping == "VEPrecond":
        model = fl.convert(model, paths.EDM(low, high))
    else:
        low = 0.002
    noise = formula("noise", (2, *(model.shape or ()))) * math.sqrt(3)
    cond = {"label": torch.tensor([0, 1])} if model.null else {}
    with torch.no_grad():
        sigmas = [
            (high ** (1 / rho) + i / (steps - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(steps)
        ]
        x = noise * high
        for now, after in zip(sigmas, [*sigmas[1:], 0.0]):
            slope = (x - denoised(wrapping, network, x, now, **cond)) / now
            ahead = x + (after - now) * slope
            if after:
                end = (ahead - denoised(wrapping, network, ahead, after, **cond)) / after
                ahead = x + (after - now) * (slope + end) / 2
            x = ahead
        solver = Heun(along=paths.EDM(low, high, rho=1))
        found = fl.sample(model, noise, solver=solver, times="karras", steps=steps, cond=cond)
    assert (found - x).norm() < 1e-9 * x.norm()
    if wrapping == "Precond":
        return  # these weights put out numbers near 100, which float32 follows to four digits only
    with torch.no_grad():
        model.to(torch.float32)
        single = fl.sample(model, noise.float(), solver=solver, times="karras", steps=steps, cond=cond)
    assert (single - x).norm() < 1e-5 * x.norm()


@pytest.mark.parametrize("wrapping", ["EDMPrecond", "Precond"])
def test_guidance_by_the_class_left_out(tmp_path, wrapping):
    file, network = checkpoint(tmp_path / "net.pkl", wrapping)
    model = from_edm(file)
    model.to(torch.float64)
    x, sigma, label = 2.0 * formula("state", (2, *(model.shape or ()))), 0.7, torch.tensor([0, 1])
    with torch.no_grad():
        none, told = (denoised(wrapping, network, x, sigma, **cond) for cond in ({}, {"label": label}))
        guided = CFG(2.5)(model)(x, model.path.time(-2 * math.log(sigma)), label=label).data
    assert (told - none).abs().max() > 1e-3
    torch.testing.assert_close(guided, none + 2.5 * (told - none), rtol=1e-9, atol=1e-9)
    with pytest.raises(OptionError, match="values from 0 to 3; expected 0 to 1, or 2 for none"):
        fl.sample(model, x, steps=1, cond={"label": torch.tensor([0, 3])})


# Saving


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_checkpoint_is_saved_and_loaded(tmp_path, wrapping):
    model = from_edm(checkpoint(tmp_path / "net.pkl", wrapping)[0])
    folder = fl.save(model, tmp_path / "saved")
    again = fl.load(folder)
    assert again.convention == model.convention
    x = torch.randn(2, *(model.shape or ()), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for t in (0.1, 0.9):
            assert torch.equal(again(x, t).data, model(x, t).data)


def test_a_clock_of_levels_is_saved_and_a_linear_one_as_it_was():
    ve = paths.VE(0.02, 100.0)
    for clock in (SigmaClock(ve, 1.0, 2.0), SigmaClock(paths.EDM(), 0.25), SigmaClock(paths.Rectified().shifted(2.0))):
        convention = Convention(ve, Noise(), clock)
        config = json.loads(json.dumps(convention.config()))
        assert config["clock"]["kind"] == "sigma"
        assert Convention.from_config(config) == convention
    config = Convention(ve, Noise(), Clock.steps(1000)).config()
    assert config["clock"] == {"scale": -999.0, "offset": 999.0}
    assert Convention.from_config(config).clock == Clock.steps(1000)
    assert Convention(ve, Noise()).config()["clock"] is None
    with pytest.raises(OptionError, match="unknown kind of clock 'sundial'; expected one of sigma"):
        Convention.from_config({**config, "clock": {"kind": "sundial"}})


def test_the_unit_of_a_level():
    path = paths.VE(0.02, 100.0)
    level = path(0.3).sigma
    assert SigmaClock(path, unit=2.0)(0.3) == pytest.approx(level / 2, rel=1e-12)
    assert SigmaClock(path, 1.0, 2.0)(0.3) == pytest.approx(math.log(level / 2), rel=1e-12)
    t = torch.tensor([0.1, 0.3], dtype=torch.float64)
    torch.testing.assert_close(SigmaClock(path, 0.25, 2.0)(t), (path(t).sigma / 2).log() / 4, rtol=1e-12, atol=0)
    for unit in (0.0, -1.0, math.nan):
        with pytest.raises(OptionError, match="expected the noise level that counts as 1"):
            SigmaClock(path, unit=unit)


# Networks that are not theirs


def changed(change, wrapping="EDMPrecond"):
    name, settings = WRAPPINGS[wrapping]
    with their_names():
        whole = content(EDMNetwork(**NETWORKS[name]), wrapping, **settings)
        ema = whole["ema"]
        change(ema, ema.state["_modules"]["unet" if wrapping == "Precond" else "model"])
        return dumps(whole)


def set_in(place, name, value):
    place[name] = value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda ema, net: setattr(ema, "kind", "FlowPrecond"), "holds 'FlowPrecond' as its ema"),
        (lambda ema, net: setattr(net, "kind", "UViT"), "model is a 'UViT'"),
        (lambda ema, net: setattr(net.state["_modules"]["map_layer0"], "kind", "LoRA"), "map_layer0 is a 'LoRA'"),
        (lambda ema, net: set_in(net.state["_init_kwargs"], "rope", True), "unknown option of a SongUNet 'rope'"),
        (lambda ema, net: set_in(net.state["_init_kwargs"], "num_blocks", 10**9), "num_blocks is 1000000000"),
        (lambda ema, net: set_in(net.state["_init_kwargs"], "model_channels", 60_000), "does not fit the EDMNetwork"),
        (lambda ema, net: set_in(net.state["_init_kwargs"], "model_channels", 2), "cannot be built"),
        (lambda ema, net: set_in(net.state["_init_kwargs"], "num_blocks", 2), "is missing"),
        (lambda ema, net: set_in(net.state, "_init_kwargs", None), "cannot be built"),
        (lambda ema, net: set_in(ema.state, "_modules", {}), "cannot be built"),
        (lambda ema, net: set_in(ema.state, "sigma_data", "0.5"), "sigma_data is '0.5', not a number"),
        (lambda ema, net: set_in(ema.state, "sigma_data", 0.0), "sigma_data is 0.0"),
        (lambda ema, net: set_in(ema.state, "sigma_max", math.nan), "sigma_max is nan"),
        (lambda ema, net: set_in(ema.state, "sigma_max", 0.001), "sigma_max 0.001"),
        (lambda ema, net: ema.state.pop("sigma_data"), "cannot be built"),
        (lambda ema, net: set_in(net.state["_modules"]["map_layer0"].state["_parameters"], "weight", [1]), "is a list"),
        (lambda ema, net: set_in(net.state["_modules"]["map_layer0"].state["_parameters"], "weight", None), "missing"),
        (
            lambda ema, net: set_in(net.state["_modules"]["map_layer0"].state["_parameters"], "more", torch.ones(1)),
            "more",
        ),
    ],
)
def test_networks_that_are_not_known(tmp_path, change, words):
    (tmp_path / "net.pkl").write_bytes(changed(change))
    with pytest.raises(RunError) as caught:
        from_edm(tmp_path / "net.pkl")
    assert words in one_line(caught.value)


def test_a_network_larger_than_its_file(tmp_path):
    """One tensor of each shape that stands for all weights of this shape."""
    network = EDMNetwork(**{**NETWORKS["ncsnpp"], "num_blocks": 14})
    with their_names():
        whole = content(network, "EDMPrecond", **WRAPPINGS["EDMPrecond"][1])
        shared, waiting = {}, [whole["ema"]]
        while waiting:
            each = waiting.pop()
            state = each.__dict__ if isinstance(each, torch.nn.Module) else each.state
            for group in ("_parameters", "_buffers"):
                for name, value in state[group].items():
                    state[group][name] = None if value is None else shared.setdefault(value.shape, value)
            waiting += [part for part in state["_modules"].values() if part is not None]
        (tmp_path / "net.pkl").write_bytes(dumps(whole))
    with pytest.raises(RunError, match="fewer bytes than its network numbers"):
        from_edm(tmp_path / "net.pkl")
