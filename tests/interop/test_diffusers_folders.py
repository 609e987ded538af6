"""What diffusers wrote, read from its folder; what is damaged, hostile or not known, refused with one clear error."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time

import diffusers_pipelines as tiny
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from safetensors.torch import load_file, save_file

from fluvial.errors import OptionError, RunError
from fluvial.interop import diffusers as fd
from fluvial.interop.diffusers_schedule import settings_of


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_pipeline_and_folder(tmp_path):
    pipe = tiny.stable_diffusion_3("", FlowMatchEulerDiscreteScheduler(shift=3.0), tmp_path / "words")
    pipe.save_pretrained(tmp_path / "pipe")
    x, cond = normal(2, 4, 8, 8), {"encoder_hidden_states": normal(2, 5, 16), "pooled_projections": normal(2, 32)}
    outs = []
    for source in (pipe, tmp_path / "pipe"):
        model = fd.from_diffusers(source)
        with torch.no_grad():
            outs.append(model.predict(x, 0.3, **cond))
        # What the pipeline decodes is latents / scaling_factor + shift_factor.
        factor = pipe.vae.config.scaling_factor
        torch.testing.assert_close(model.normalisation.invert(x), x / factor + 0.06)
    assert torch.equal(*outs)


class Hostile:
    """What a pickle runs as it is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def altered(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_damaged_and_hostile_folders_give_one_error_and_run_nothing(tmp_path):
    good, mark = tmp_path / "good", tmp_path / "mark"
    DDIMPipeline(tiny.unet(), DDIMScheduler()).save_pretrained(good)
    weights, index = "unet/diffusion_pytorch_model.safetensors", "model_index.json"
    scheduler, evil = "scheduler/scheduler_config.json", pickle.dumps(Hostile(mark))

    def pickled(folder):
        (folder / weights).unlink()
        (folder / "unet/diffusion_pytorch_model.bin").write_bytes(evil)

    def sharded(folder, name):
        pickled(folder)
        names = dict.fromkeys(load_file(good / weights), name)
        (folder / f"{weights}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))

    def checkpoint_alone(folder):
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "sd.ckpt").write_bytes(evil)

    def one_less(folder):
        tensors = load_file(folder / weights)
        tensors.pop("conv_in.weight")
        save_file(tensors, folder / weights)

    cases = {
        "pickle": pickled,
        "pickle by its name": lambda f: (f / weights).write_bytes(evil),
        "cut short": lambda f: (f / weights).write_bytes((good / weights).read_bytes()[:1000]),
        "a weight less": one_less,
        "other shapes": lambda f: altered(f / "unet/config.json", block_out_channels=[16, 16]),
        "no JSON": lambda f: (f / index).write_text("{"),
        "a list": lambda f: (f / index).write_text("[1]"),
        "a path": lambda f: altered(f / index, unet=["../../x", "Hostile"]),
        "another class": lambda f: altered(f / index, unet=["diffusers", "DiffusionPipeline"]),
        "no number": lambda f: altered(f / scheduler, num_train_timesteps="many"),
        "too many": lambda f: altered(f / scheduler, num_train_timesteps=10**12),
        "no beta": lambda f: altered(f / scheduler, beta_start="x"),
        "no scheduler": lambda f: (f / scheduler).unlink(),
        "very wide": lambda f: altered(f / "unet/config.json", block_out_channels=[10**6, 10**6]),
        "wider than numbers are": lambda f: altered(f / "unet/config.json", block_out_channels=[2**60, 2**60]),
        "without end": lambda f: altered(f / "unet/config.json", layers_per_block=10**12),
        "a nest": lambda f: (f / index).write_text("[" * 100_000),
        "shards elsewhere": lambda f: sharded(f, "../../good/unet/diffusion_pytorch_model.safetensors"),
        "an absolute shard": lambda f: sharded(f, str(good / weights)),
        "shards in a pickle": lambda f: sharded(f, "diffusion_pytorch_model.bin"),
        "no shard": lambda f: sharded(f, "diffusion_pytorch_model-00001-of-00002.safetensors"),
        "shards in a list": lambda f: sharded(f, ["diffusion_pytorch_model.safetensors"]),
        "no weights": lambda f: (f / weights).unlink(),
        "one precision alone": lambda f: (f / weights).rename(f / weights.replace(".s", ".fp16.s")),
        "a checkpoint alone": checkpoint_alone,
    }
    said: dict[str, str] = {}
    for name, damage in cases.items():
        folder = shutil.copytree(good, tmp_path / name)
        damage(folder)
        begun = time.perf_counter()
        with pytest.raises((OptionError, RunError)) as raised:
            fd.from_diffusers(folder)
        said[name] = str(raised.value)
        assert "\n" not in said[name], name
        assert time.perf_counter() - begun < 5, name
    assert not mark.exists()
    assert all("a pickle, which can run code" in said[name] for name in ("pickle", "a checkpoint alone"))
    assert all("names other files than safetensors beside it" in said[n] for n in said if n.startswith("shards "))
    assert "has diffusion_pytorch_model.fp16.safetensors alone" in said["one precision alone"]
    assert "numbers" in said["very wide"]


def test_what_is_not_known_is_refused_by_name(tmp_path):
    net = tiny.unet()
    for source, scheduler, message in (
        (net, LCMScheduler(), "unknown diffusers scheduler 'LCMScheduler'; expected"),
        (net, LCMScheduler().config, "unknown diffusers scheduler 'LCMScheduler'; expected"),
        (net, {"colour": 3}, "names no _class_name"),
        (net, 7, "scheduler is a int; expected"),
        (net, None, "scheduler is missing"),
        (torch.nn.Linear(1, 1), DDIMScheduler(), "unknown diffusers network 'Linear'"),
        (object(), DDIMScheduler(), "has no unet or transformer"),
        (net, EulerDiscreteScheduler(timestep_type="continuous"), "a clock of its own"),
        (net, FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas"),
        (net, {**settings_of(DDIMScheduler()), "beta_schedule": "x"}, "unknown beta_schedule 'x'"),
        (net, {**settings_of(DDIMScheduler()), "prediction_type": "x"}, "unknown prediction_type of a table 'x'"),
    ):
        with pytest.raises(OptionError, match=message):
            fd.from_diffusers(source, scheduler)
    with pytest.raises(OptionError, match="no flow scheduler"):
        fd.from_diffusers(net, DDIMScheduler(), mu=0.5)
    with pytest.raises(RunError, match="no model_index"):
        fd.from_diffusers(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDIMPipeline", "unet": ["diffusers", "UNet2DModel"]}')
    with pytest.raises(RunError, match="cannot be opened"):
        fd.from_diffusers(tmp_path)
    scheduler = DDIMScheduler()
    for arguments, message in (
        ({}, "nothing was given"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 3, "timesteps": [5, 1]}, "expected them to agree"),
        ({"timesteps": [5, 1], "sigmas": [5.0, 1.0]}, "timesteps and sigmas"),
        ({"timesteps": [1, 5]}, "fall strictly"),
        ({"timesteps": [1000]}, "timesteps reach 1000"),
        ({"sigmas": [3.0, -1.0]}, "not positive"),
        ({"steps": 1001}, "at most 1000"),
    ):
        with pytest.raises(OptionError, match=message):
            fd.sampling_times(scheduler, **arguments)
