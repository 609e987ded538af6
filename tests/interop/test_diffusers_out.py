"""diffusers out: a model's folder is run by diffusers alone, with the model's own samples; and it comes back."""

from __future__ import annotations

import subprocess
import sys

import diffusers_pipelines as tiny
import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler

import fluvial as fl
from fluvial import networks
from fluvial.errors import OptionError, RunError
from fluvial.flow_maps import FlowMap
from fluvial.interop import diffusers as fd
from fluvial.model import Clock, Model

TABLE = (1.0 - torch.linspace(1e-3, 0.05, 200, dtype=torch.float64)).cumprod(0)
MODELS = {
    "trained": (fl.paths.Rectified(), "velocity", Clock.noise_level()),
    "towards the data": (fl.paths.Rectified(), "velocity", Clock(1000.0)),
    "flow": (fl.paths.Rectified(), "flow", Clock(-1000.0, 1000.0)),
    "shorter clock": (fl.paths.Rectified(), "velocity", Clock(500.0, 20.0)),
    "vp": (fl.paths.VP(), "noise", Clock(1000.0)),
    "cosine": (fl.paths.Cosine(), "v", Clock(-1000.0, 1000.0)),
    "table": (fl.paths.Discrete(TABLE.tolist()), "data", Clock.steps(200)),
}
ALONE = """
import sys, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
assert not any(name.split(".")[0] == "fluvial" for name in sys.modules)
out = pipe(batch_size=3, num_inference_steps=8, generator=torch.Generator().manual_seed(1), output_type="np")
torch.save(torch.from_numpy(out.images), sys.argv[2])
"""


def network(num_classes=None, size=8):
    torch.manual_seed(0)
    net = networks.unet(1, size, num_classes=num_classes, width=16)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return net.eval()


def images(pipe, steps=8):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    out = pipe(batch_size=3, num_inference_steps=steps, generator=generator, output_type="np")
    return torch.from_numpy(out.images).permute(0, 3, 1, 2)


def ours(model, scheduler, steps=8, **options):
    """The images by `fl.sample` from the noise that the pipelines draw."""
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    solver = "euler" if isinstance(model.path, fl.paths.Rectified) else "ddim"
    return fl.sample(model, solver=solver, times=fd.sampling_times(scheduler, steps), state=noise, **options)


@pytest.mark.parametrize("name", MODELS)
def test_pipeline_draws_the_models_samples_and_comes_back(name, tmp_path):
    model = Model(network(), *MODELS[name])
    folder = fd.to_diffusers(model, tmp_path / "out")
    pipe = DiffusionPipeline.from_pretrained(folder)
    x = ours(model, pipe.scheduler)
    torch.testing.assert_close(images(pipe), (x / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)
    # The states, which the images clamp.
    pipe.scheduler.set_timesteps(8)
    y = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            y = pipe.scheduler.step(pipe.unet(y, t).sample, t, y).prev_sample
    torch.testing.assert_close(y, x, rtol=0, atol=1e-4 * max(1.0, float(x.abs().max())))
    back = fd.from_diffusers(folder)
    torch.testing.assert_close(ours(back, pipe.scheduler), x, rtol=0, atol=1e-4 * max(1.0, float(x.abs().max())))
    for t in (0.1, 0.6):
        state = torch.randn(3, 1, 8, 8)
        with torch.no_grad():
            a, b = (m(state, m.path.time(model.path.log_snr(t))).data for m in (model, back))
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3)


def test_in_a_fresh_process_with_diffusers_alone(tmp_path):
    model = Model(network(), *MODELS["towards the data"])
    fd.to_diffusers(model, tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "out"), str(tmp_path / "x.pt")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-500:]
    drawn = torch.load(tmp_path / "x.pt", weights_only=True).permute(0, 3, 1, 2)
    x = ours(model, FlowMatchEulerDiscreteScheduler())
    torch.testing.assert_close(drawn, (x / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("label", [None, 0, 2])
def test_one_label_is_written_in(label, tmp_path):
    model = Model(network(num_classes=3), *MODELS["trained"], null={"label": 3})
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    pipe = DiffusionPipeline.from_pretrained(fd.to_diffusers(model, tmp_path / "out", label=label))
    cond = None if label is None else {"label": torch.full((3,), label)}
    x = ours(model, pipe.scheduler, cond=cond)
    torch.testing.assert_close(images(pipe), (x / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)
    after = model.network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_into_the_pipeline_it_came_from(tmp_path):
    pipe = tiny.stable_diffusion("", DDIMScheduler(clip_sample=False, steps_offset=1), tmp_path / "words")
    model = fd.from_diffusers(pipe)
    # What is trained on is another convention around the same network: a rectified flow on the table's clock.
    flow = Model(model.network, fl.paths.Rectified(), "velocity", Clock(1000.0))
    folder = fd.to_diffusers(flow, tmp_path / "out", pipe=pipe)
    back = fd.from_diffusers(folder)
    assert back.prediction.name == "flow"
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    with torch.no_grad():
        a, b = (m(x, 0.3, encoder_hidden_states=text).data for m in (flow, back))
    torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
    assert back.normalisation == model.normalisation
    assert type(DiffusionPipeline.from_pretrained(folder)) is type(pipe)


def test_a_straightened_table_goes_out_and_comes_back(tmp_path):
    table = fd.from_diffusers(tiny.unet(), DDIMScheduler(clip_sample=False))
    pairs = fl.straighten.make_pairs(table, n=32, solver="ddim", steps=4, out=tmp_path / "pairs", seed=0)
    straight = fl.straighten.reflow(table, pairs, steps=2, batch_size=16)
    assert isinstance(straight.path, fl.paths.Rectified)
    back = fd.from_diffusers(fd.to_diffusers(straight, tmp_path / "out"))
    times = fd.sampling_times(DDIMScheduler(), 6)
    levels = [straight.path.time(back.path.log_snr(t)) for t in times[:-1]]
    x = torch.randn(2, 1, 8, 8)
    scale = [(c.alpha**2 + c.sigma**2) ** 0.5 for c in (straight.path(levels[0]), back.path(times[0]))]
    ours = fl.sample(straight, solver="ddim", times=[*levels, 1.0], state=x * scale[0])
    theirs = fl.sample(back, solver="ddim", times=times, state=x * scale[1])
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4 * float(ours.abs().max()))


STUDENTS = [
    ("consistency", "trained", 1),
    ("consistency", "towards the data", 3),
    ("consistency", "flow", 2),
    ("consistency", "vp", 1),
    ("consistency", "vp", 4),
    ("consistency", "cosine", 5),
    ("consistency", "table", 4),
    ("euler", "trained", 1),
    ("euler", "towards the data", 4),
    ("euler", "vp", 1),
]


@pytest.mark.parametrize(("kind", "name", "steps"), STUDENTS)
def test_a_flow_map_goes_out_for_its_steps(kind, name, steps, tmp_path):
    student = FlowMap(Model(network(), *MODELS[name]), kind)
    folder = fd.to_diffusers(student, tmp_path / "out", steps=steps)
    pipe, back = DiffusionPipeline.from_pretrained(folder), fd.from_diffusers(folder)
    times = [student.path.time(back.path.log_snr(t)) for t in fd.sampling_times(pipe.scheduler, steps)[:-1]]
    if isinstance(student.path, fl.paths.Rectified):
        assert times == pytest.approx([k / steps for k in range(steps)], abs=1e-7)
        times = [k / steps for k in range(steps)]
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    x = fl.sample(student, state=noise, solver=fl.solvers.named("jump", renoise=0.0), times=[*times, 1.0])
    torch.testing.assert_close(images(pipe, steps), (x / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)
    solver = "euler" if isinstance(student.path, fl.paths.Rectified) else "ddim"
    again = fl.sample(back, state=noise, solver=solver, times=fd.sampling_times(pipe.scheduler, steps))
    torch.testing.assert_close(again, x, rtol=0, atol=1e-4 * max(1.0, float(x.abs().max())))


def test_a_consistency_model_goes_back_to_its_own_scheduler(tmp_path):
    settings = {"sigma_min": 0.01, "sigma_max": 40.0, "sigma_data": 0.6, "rho": 6.0}
    student = fd.from_diffusers(network().unet, CMStochasticIterativeScheduler(**settings))
    pipe = DiffusionPipeline.from_pretrained(fd.to_diffusers(student, tmp_path / "out"))
    assert type(pipe).__name__ == "ConsistencyModelPipeline"
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    x = fl.sample(student, noise, steps=1)
    torch.testing.assert_close(images(pipe, 1), (x / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)
    for other, steps in ((student.inner, None), (student.under(path=fl.paths.EDM()), None), (student, 2)):
        with pytest.raises(OptionError, match=r"boundary|own scheduler"):
            fd.to_diffusers(other, tmp_path / "no", steps=steps)


def test_what_cannot_go_out_is_refused_by_name(tmp_path):
    net, rectified = network(), fl.paths.Rectified()
    trained = Model(net, *MODELS["trained"])
    for model, message in (
        (FlowMap(trained, "average"), "told the time to lead to"),
        (FlowMap(trained, "euler"), "expected steps="),
        (Model(lambda x, t: x, rectified), "the network is a function"),
        (Model(networks.mlp(2), rectified), "the network is a MLP"),
        (Model(networks.told(net, ["r"]), *MODELS["trained"]), "is told r"),
        (Model(network(size=9), *MODELS["trained"]), "pads images"),
        (Model(net, rectified), "counts 1 from noise to data"),
        (Model(net, rectified, clock=lambda t: t), "is a function"),
        (Model(net, rectified, "noise", Clock(1000.0)), "prediction is noise on a rectified path"),
        (Model(net, fl.paths.VP(), "velocity", Clock(1000.0)), "prediction is velocity on a table"),
        (Model(net, fl.paths.EDM(), "noise", Clock(1000.0)), "path EDM"),
        (fd.from_diffusers(tiny.sd3_transformer(), FlowMatchEulerDiscreteScheduler()), "expected pipe="),
    ):
        with pytest.raises(OptionError, match=message):
            fd.to_diffusers(model, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(OptionError, match="built without classes"):
        fd.to_diffusers(trained, tmp_path / "out", label=1)
    with pytest.raises(OptionError, match="expected 0 to 3"):
        fd.to_diffusers(Model(network(3), *MODELS["trained"]), tmp_path / "out", label=4)
    vp = Model(net, *MODELS["vp"])
    for model, steps, message in (
        (trained, 4, "is no flow map"),
        (FlowMap(trained), 0, "steps is 0"),
        (FlowMap(trained), 1.5, "steps is 1.5"),
        (FlowMap(vp), 3, "a table of 1000 entries"),
        (FlowMap(vp, "euler"), 2, "between the entries"),
    ):
        with pytest.raises(OptionError, match=message):
            fd.to_diffusers(model, tmp_path / "out", steps=steps)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(RunError, match="not empty"):
        fd.to_diffusers(trained, tmp_path / "full")
