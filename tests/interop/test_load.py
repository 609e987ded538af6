"""One name in, one model out: runs, pipelines and single networks; and imported networks through everything else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers_pipelines as tiny
import numpy
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    SanaTransformer2DModel,
)

import fluvial as fl
from fluvial import interop, networks, training
from fluvial.errors import OptionError, RunError
from fluvial.flow_maps import FlowMap
from fluvial.interop import diffusers as fd
from fluvial.model import Model
from fluvial.solvers import Jump
from fluvial.training.checkpoints import load as load_own
from problems import command

# Channels stay where they are, because another order of the sums changes the last bit.
PLAIN = {"precision": "fp32", "channels_last": False, "progress": False, "sheet_every": None}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(n=12):
    return {"data": normal(n, 1, 8, 8, seed=4).clamp(-1, 1)}


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory):
    """A DDPM pipeline's folder."""
    folder = tmp_path_factory.mktemp("pipelines") / "ddpm"
    DDPMPipeline(tiny.unet(), DDPMScheduler(clip_sample=False)).save_pretrained(folder)
    return folder


def same(one, two, **cond):
    x = normal(2, *(one.shape or (4, 8, 8)))
    with torch.no_grad():
        return torch.equal(one.predict(x, 0.3, **cond), two.predict(x, 0.3, **cond))


def test_each_layout_is_the_same_model(ddpm, tmp_path):
    expected = fd.from_diffusers(DiffusionPipeline.from_pretrained(ddpm))
    beside = tmp_path / "beside"  # all in one folder, as the first released pipelines of one network have it
    shutil.copytree(ddpm / "unet", beside)
    shutil.copy(ddpm / "model_index.json", beside)
    shutil.copy(ddpm / "scheduler" / "scheduler_config.json", beside)
    alone = tmp_path / "alone"
    shutil.copytree(beside, alone, ignore=shutil.ignore_patterns("model_index.json"))
    sharded = tmp_path / "sharded"
    shutil.copytree(ddpm, sharded)
    (sharded / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    DiffusionPipeline.from_pretrained(ddpm).unet.save_pretrained(sharded / "unet", max_shard_size="20KB")
    assert len(list((sharded / "unet").glob("*-of-*.safetensors"))) > 1
    for source in (ddpm, str(ddpm), ddpm / "unet", beside, alone, sharded):
        model = fl.load(source)
        assert model.convention == expected.convention
        assert same(model, expected)
    assert fl.from_pretrained is fl.load
    (alone / "scheduler_config.json").unlink()
    with pytest.raises(OptionError, match="scheduler is missing"):
        fl.load(alone)
    assert same(fd.from_diffusers(alone, DDPMScheduler(clip_sample=False)), expected)


def test_latents_of_a_single_network_are_its_pipeline_s(tmp_path):
    pipe = tiny.stable_diffusion("", DDIMScheduler(clip_sample=False, steps_offset=1), tmp_path / "words")
    pipe.save_pretrained(tmp_path / "sd")
    whole, part = fl.load(tmp_path / "sd"), fl.load(tmp_path / "sd" / "unet")
    assert whole.convention == part.convention
    assert whole.normalisation.scale == (1 / pipe.vae.config.scaling_factor,)
    assert same(whole, part, encoder_hidden_states=normal(2, 5, 16))


def others():
    """Every network that diffusers adapts, with its scheduler and conditions."""
    text, pooled, flow = normal(2, 5, 16), normal(2, 32, seed=1), FlowMatchEulerDiscreteScheduler(shift=3.0)
    torch.manual_seed(0)
    dit = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8
    )
    sana = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )
    both = {"encoder_hidden_states": text, "pooled_projections": pooled}
    return {
        "unet": (tiny.unet(num_class_embeds=4), DDIMScheduler(), {"label": torch.tensor([1, 3])}),
        "text": (tiny.text_unet(), DDIMScheduler(), {"encoder_hidden_states": text}),
        "sd3": (tiny.sd3_transformer(), flow, both),
        "flux": (tiny.flux_transformer(), flow, {**both, "guidance": torch.tensor([3.5, 2.0])}),
        "dit": (dit.eval(), DDIMScheduler(), {"label": torch.tensor([1, 3])}),
        "sana": (sana.eval(), flow, {"encoder_hidden_states": text}),
        "consistency": (tiny.unet(), CMStochasticIterativeScheduler(), {}),
        "half": (tiny.unet().half(), DDIMScheduler(), {}),
    }


@pytest.mark.parametrize("name", others())
def test_imported_networks_are_saved_and_come_back(name, tmp_path):
    net, scheduler, cond = others()[name]
    net.register_to_config(_name_or_path="/home/somebody/weights")
    model = fd.from_diffusers(net, scheduler)
    fl.save(model, tmp_path / "m")
    assert "somebody" not in (tmp_path / "m" / "config.json").read_text()
    back = fl.load(tmp_path / "m")
    assert type(back) is type(model)
    assert type(back.network.inner) is type(model.network.inner)
    assert next(iter(back.parameters())).dtype == next(iter(net.parameters())).dtype
    assert back.convention == model.convention
    assert same(back, model, **cond)
    assert set(cond) <= set(back.network.conditions) <= {*cond, "encoder_attention_mask"}
    assert training.model_hash(back) == training.model_hash(model) == training.model_hash(tmp_path / "m")
    assert same(load_own(tmp_path / "m"), model, **cond)
    fl.save(fl.convert(back, "rectified", "velocity"), tmp_path / "seen")
    assert same(fl.load(tmp_path / "seen"), fl.convert(model, "rectified", "velocity"), **cond)


class Own(tiny.unet().__class__):
    """A class of the user's own that calls itself by no other name."""


def test_a_changed_network_is_none_to_be_built(tmp_path):
    changed = tiny.unet()
    changed.conv_in = torch.nn.Conv2d(1, 8, 5, padding=2)
    for name, net in (("changed", changed), ("own", Own(**tiny.unet().config))):
        net.__class__.__name__ = "UNet2DModel"
        fl.save(model := fd.from_diffusers(net.eval(), DDIMScheduler()), tmp_path / name)
        with pytest.raises(RunError, match=r"changed since it was built.*network=") as caught:
            fl.load(tmp_path / name)
        assert "\n" not in str(caught.value)
        fresh = fd.from_diffusers(net, DDIMScheduler()).network
        assert same(fl.load(tmp_path / name, network=fresh), model)


def crash(model, calls):
    """Has the network fail at a call."""
    before, count = model.network.forward, 0

    def forward(*arguments, **options):
        nonlocal count
        count += 1
        if count == calls:
            raise MemoryError("power cut")
        return before(*arguments, **options)

    model.network.forward = forward


def test_training_an_imported_network_survives_a_crash(ddpm, tmp_path):
    options = {"steps": 6, "batch_size": 4, "seed": 2, "checkpoint_every": 2, **PLAIN}
    whole = fl.train(fl.load(ddpm), images(), **options, out=tmp_path / "a")
    broken = fl.load(ddpm)
    crash(broken, 5)
    with pytest.raises(MemoryError):
        fl.train(broken, images(), **options, out=tmp_path / "b")
    assert json.loads((tmp_path / "b" / "state" / "latest.json").read_text()) == {"step": 4}
    resumed = fl.train(fl.load(ddpm), images(), **options, out=tmp_path / "b")
    for weights, expected in (("ema", whole.ema), ("raw", whole.model)):
        assert same(fl.load(tmp_path / "b", weights=weights), expected)
    assert same(resumed.ema, whole.ema)
    assert not same(whole.model, fl.load(ddpm))


def test_a_distilled_pipeline_is_loaded_and_goes_out(ddpm, tmp_path):
    options = {"batch_size": 4, **PLAIN}
    student = fl.distill.consistency(fl.load(ddpm), images(), 5, grid_steps=4, **options, out=tmp_path / "one")
    back = fl.load(tmp_path / "one")
    assert isinstance(back, FlowMap)
    noise = normal(3, 1, 8, 8, seed=1)
    x = fl.sample(student, noise, steps=1)
    assert torch.equal(fl.sample(back, noise, steps=1), x)
    assert torch.equal(fl.sample(back, noise, steps=3, seed=5), fl.sample(student, noise, steps=3, seed=5))
    pipe = DiffusionPipeline.from_pretrained(fd.to_diffusers(back, tmp_path / "out", steps=2))
    assert pipe.scheduler.config["prediction_type"] == "v_prediction"
    plain = fl.load(tmp_path / "out")
    levels = [student.path.time(plain.path.log_snr(t)) for t in fd.sampling_times(pipe.scheduler, 2)[:-1]]
    scale = (1 - 2 * levels[0] + 2 * levels[0] ** 2) ** 0.5  # of the rectified path, √(t² + (1 - t)²)
    y = fl.sample(student, state=noise * scale, solver=Jump(0.0), times=[*levels, 1.0])
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(3, torch.Generator().manual_seed(1), num_inference_steps=2, output_type="np").images
    own = student.normalisation.apply(y)
    torch.testing.assert_close(
        torch.from_numpy(drawn).permute(0, 3, 1, 2), (own / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4
    )


def test_a_straightened_pipeline_is_loaded_and_goes_out(ddpm, tmp_path):
    teacher = fl.load(ddpm)
    pairs = fl.straighten.make_pairs(teacher, n=16, solver="ddim", steps=4, out=tmp_path / "pairs", seed=0)
    straight = fl.straighten.reflow(teacher, pairs, steps=3, batch_size=8, out=tmp_path / "s", **PLAIN)
    back, noise = fl.load(tmp_path / "s"), normal(3, 1, 8, 8, seed=1)
    assert not back.independent
    assert torch.equal(fl.sample(back, noise, steps=2), fl.sample(straight, noise, steps=2))
    out = [fd.to_diffusers(model, tmp_path / name) for name, model in (("x", straight), ("y", back))]
    assert same(fl.load(out[0]), fl.load(out[1]))


def test_the_command_line_takes_any_folder(ddpm, tmp_path, capsys):
    assert command("info", ddpm) == 0
    said = " ".join(capsys.readouterr().out.split())
    for words in ("predicts the noise on a table of 1000 steps, time: 999 at the noise, 0 at the data", "1 x 8 x 8"):
        assert words in said
    numbers = sum(parameter.numel() for parameter in fl.load(ddpm).parameters())
    assert f"UNet2DModel, {numbers:,} parameters" in said
    assert "DDPMPipeline of diffusers" in said
    assert command("convert", ddpm, "--path", "rectified", "--prediction", "velocity", "--out", tmp_path / "r") == 0
    assert same(fl.load(tmp_path / "r"), fl.convert(fl.load(ddpm), "rectified", "velocity"))
    given = ["-n", 2, "--solver", "ddim", "--steps", 3, "--seed", 7]
    for folder in (ddpm, tmp_path / "r"):
        assert command("sample", folder, *given, "--out", tmp_path / "s.png", "--npz", tmp_path / "s.npz") == 0
        expected = fl.sample(fl.load(folder), 2, solver="ddim", steps=3, seed=7)
        assert numpy.array_equal(numpy.load(tmp_path / "s.npz")["samples"], expected.numpy())
    capsys.readouterr()
    assert command("info", tmp_path / "r") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "predicts the noise on a table of 1000 steps" in said
    assert "velocity on Rectified()" in said


def test_what_is_no_model_is_one_clear_error(ddpm, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, text in (("other", {"architectures": ["CLIP"]}), ("stranger", {"_class_name": "os.system"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(text))
    for name, said in (
        ("nothing", "does not exist"),
        ("file", "is a file"),
        ("empty", r"has no model_index.json or config.json"),
        ("other", "has no convention"),
        ("stranger", "unknown diffusers network 'os.system'"),
    ):
        with pytest.raises((RunError, OptionError), match=said) as caught:
            fl.load(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(OptionError, match="expected one of ema, raw"):
        fl.load(ddpm, weights="latest")
    with pytest.raises(OptionError, match="network is given"):
        fl.load(ddpm, network=torch.nn.Linear(1, 1))
    with pytest.raises(OptionError, match="revision is 'main'"):
        fl.load(ddpm, revision="main")
    fl.save(Model(networks.mlp(2, width=8), "rectified"), tmp_path / "own")
    with pytest.raises(OptionError, match=r"expected fl.load"):
        fd.from_diffusers(tmp_path / "own")
    assert Path(interop.describe(tmp_path / "own")["network"]).name
