"""A model as a folder that diffusers alone loads and runs.

What diffusers cannot say of a network is written into its weights, where that is exact: the time features are waves, so
that a clock that starts elsewhere or runs the other way is a rotation of them, taken over by the layer that reads them;
a network that counts towards the data has the signs of its last layer changed; and one label is a part of the bias that
the labels are added to.

A flow map that is told no r goes out too: its jumps without fresh noise are the natural Euler steps of the pair that
its network implies, which is what `euler` and `ddim` make, on the times that it was trained for.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fluvial.errors import OptionError, RunError
from fluvial.flow_maps import FlowMap
from fluvial.interop.diffusers_networks import BoundaryNetwork, DiffusersNetwork
from fluvial.model import Clock, Converted, Model
from fluvial.networks import UNet
from fluvial.paths import EDM, Discrete, Rectified

_TABLE_PREDICTIONS = {"noise": "epsilon", "v": "v_prediction", "data": "sample"}
_DIRECTIONS = {"flow": 1.0, "velocity": -1.0}


class _Told(NamedTuple):
    """A scheduler, and how the model's network differs from the one that it expects.

    The network's own time is start + direction * timestep; its output is sign times what is expected.
    """

    scheduler: Any
    start: float
    direction: float
    sign: float


def to_diffusers(
    model: Model,
    folder: str | os.PathLike[str],
    *,
    label: int | None = None,
    pipe: Any = None,
    steps: int | None = None,
) -> Path:
    """Writes a model as a diffusers pipeline; `DiffusionPipeline.from_pretrained(folder)` runs it without Fluvial.

    A rectified flow goes out with a FlowMatchEulerDiscreteScheduler, whose steps are this library's `euler`; a variance
    preserving path as a table with a DDIMScheduler, whose steps are `ddim`; on the times of
    `sampling_times(scheduler, steps)` the states are equal. The pipeline's images are x/2 + 1/2, clamped, of states x
    in path units: it fits models whose path units run from -1 to 1. The model is left as it is.

    A converted model, such as a straightened table, goes out in the notation of its network, where `ddim` makes the
    same samples at the same noise levels.

    A flow map goes out for a number of steps, which the pipeline is then to be given, pipe(num_inference_steps=steps):
    its images are those of `fl.sample(model, solver="jump", renoise=0)` at the same times, and the folder comes back as
    a plain model whose Euler steps these are. Where its network knows the rectified path the times are k/steps; where
    a table, "trailing" entries. A consistency model that came from a CMStochasticIterativeScheduler goes back to one.

    Args:
        model: around `fl.networks.UNet`, or a network that came in by `from_diffusers`.
        folder: a new or empty one.
        label: the class it is to draw, which the unconditional pipelines of diffusers cannot be told; None is the null
            class.
        pipe: a pipeline to put the network into, with all its other parts, such as the text encoders and autoencoder
            it came with. None: an unconditional one.
        steps: of a flow map: those that it is to be sampled in. Default 1; of kind "euler" those of its own grid.

    Returns:
        The folder.

    Raises:
        OptionError: for what cannot be said there: other networks, paths, predictions and clocks; flow maps that are
            told where to lead, or whose steps lie between a table's entries; sides that the network pads.
        RunError: for a folder that holds something.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} is not empty; expected a new folder to write the pipeline in")
    kind = model.kind if isinstance(model, FlowMap) else None
    steps = _steps(kind, steps)
    model = model.inner if isinstance(model, FlowMap) else model
    model = model.source if isinstance(model, Converted) else model
    network, sign = _network(model.network)
    told = _told(model, kind, steps)
    _bake(network, told._replace(sign=told.sign * sign), label)
    if pipe is not None:
        name = "unet" if "unet" in pipe.components else "transformer"
        whole = type(pipe)(**{**pipe.components, name: network, "scheduler": told.scheduler})
    else:
        whole = _unconditional(network, told.scheduler)
    whole.save_pretrained(folder)
    return folder


def _unconditional(network: Any, scheduler: Any) -> Any:
    from diffusers.pipelines.consistency_models.pipeline_consistency_models import ConsistencyModelPipeline
    from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
    from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline

    if type(network).__name__ != "UNet2DModel":
        raise OptionError(f"a {type(network).__name__} needs a pipeline with its other parts; expected pipe=…")
    pipelines = {"DDIMScheduler": DDIMPipeline, "CMStochasticIterativeScheduler": ConsistencyModelPipeline}
    return pipelines.get(type(scheduler).__name__, DDPMPipeline)(network, scheduler)


def _steps(kind: str | None, steps: int | None) -> int:
    """How many steps the folder is for; 0 leaves it to the pipeline."""
    if kind is None:
        if steps is not None:
            raise OptionError(f"steps is {steps} and the model is no flow map; expected none: its pipeline is told")
        return 0
    if kind == "average":
        raise OptionError(
            "the model is a flow map of kind 'average', whose network is told the time to lead to, as no scheduler of "
            "diffusers' tells it; expected one of kind 'consistency' or 'euler'"
        )
    if steps is None and kind == "euler":
        raise OptionError("a flow map of kind 'euler' knows one grid; expected steps=, those that it was distilled for")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise OptionError(f"steps is {steps!r}; expected a whole number, 1 or more")
    return steps or 1


def _network(network: Callable[..., Tensor]) -> tuple[Any, float]:
    """A copy of the diffusers network in it, and its sign."""
    if isinstance(network, BoundaryNetwork):
        network = network.inner
    if isinstance(network, DiffusersNetwork):
        return copy.deepcopy(network.inner), network.sign
    if type(network) is not UNet:  # subclasses see more than the state
        raise OptionError(
            f"the network is a {type(network).__name__}; expected fl.networks.UNet, or one that came from diffusers"
        )
    if network.numbers or network.blur:
        what = f"is told {', '.join(network.numbers)}" if network.numbers else "reads blurred times"
        raise OptionError(f"the network {what}, as no UNet2DModel of diffusers; expected one of fl.networks.unet(…)")
    if any(network._padding):
        raise OptionError(
            f"the network pads images of {network.size}, and a pipeline would draw the padded ones; expected sides "
            f"that {2 ** (len(network.multipliers) - 1)} divides"
        )
    return copy.deepcopy(network.unet), 1.0


def _told(model: Model, kind: str | None, steps: int) -> _Told:
    if isinstance(model.network, BoundaryNetwork):
        return _Told(_boundary(model, kind, steps), 0.0, 1.0, 1.0)
    clock = model.convention.clock or Clock()
    name = type(model.path).__name__
    if not isinstance(clock, Clock) or model.convention.scale_input is not None:
        raise OptionError("the clock or the input's scale is a function; expected a fl.model.Clock and no scale")
    if not clock.scale or not float(clock.scale).is_integer() or abs(clock.scale) < 2:
        raise OptionError(f"the clock counts {clock.scale:g} from noise to data; expected a whole number, like 1000")
    counted = int(abs(clock.scale))
    direction = -math.copysign(1.0, clock.scale)
    start = clock(1.0)
    if isinstance(model.path, Rectified):
        scheduler = _flow(model, counted, steps)
        return _Told(scheduler, start, direction, _DIRECTIONS[model.prediction.name])
    c = model.path.table([k / 8 for k in range(9)])
    if any(abs(each.alpha**2 + each.sigma**2 - 1.0) > 1e-9 for each in c):
        raise OptionError(
            f"diffusers has no pipeline for the path {name}; expected Rectified, or one with alpha² + sigma² = 1"
        )
    if not steps:
        return _Told(_table(model, counted + 1), start, direction, 1.0)
    if kind == "euler" and steps > 1:
        raise OptionError(
            f"the flow map's {steps} steps lie between the entries of its network's table, the path {name}; expected "
            "steps=1, or a flow map whose network knows the rectified path"
        )
    # The entry without noise would make one too many for the steps to divide, and none of them visits it.
    clean = model.path(1.0).sigma == 0.0
    scheduler = _table(model, counted + 1, skipped=int(clean), spacing="trailing")
    entries = scheduler.config["num_train_timesteps"]
    if entries % steps:
        raise OptionError(f"steps is {steps} for a table of {entries} entries; expected a number that divides it")
    return _Told(scheduler, start + direction * clean, direction, 1.0)


def _boundary(model: Model, kind: str | None, steps: int) -> Any:
    from diffusers.schedulers.scheduling_consistency_models import CMStochasticIterativeScheduler

    settings = model.network.settings  # type: ignore[attr-defined]
    path = EDM(settings["sigma_min"], settings["sigma_max"], settings["rho"])
    if kind != "consistency" or model.path != path or model.prediction.name != "data":
        raise OptionError(
            f"the network keeps a consistency model's boundary, and the model is another ({model!r}); expected the "
            "flow map that came from diffusers"
        )
    if steps > 1:
        raise OptionError(
            f"steps is {steps} for a consistency model's own scheduler; expected none: its pipeline is told"
        )
    return CMStochasticIterativeScheduler(clip_denoised=False, **settings)


def _flow(model: Model, counted: int, steps: int) -> Any:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    if model.prediction.name not in _DIRECTIONS:
        raise OptionError(f"the prediction is {model.prediction.name} on a rectified path; expected velocity or flow")
    # Stretched so far the spacing of this scheduler, which would end at 1/counted, is k/steps.
    stretched: dict[str, Any] = {"shift_terminal": 1.0 / steps} if steps > 1 else {}
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=counted, **stretched)


def _table(model: Model, entries: int, skipped: int = 0, spacing: str = "leading") -> Any:
    """The table of the path, without its `skipped` cleanest entries."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    if model.prediction.name not in _TABLE_PREDICTIONS:
        raise OptionError(f"the prediction is {model.prediction.name} on a table; expected noise, v or data")
    path = model.path
    if isinstance(path, Discrete) and len(path.alphas_cumprod) == entries:
        table = torch.tensor(path.alphas_cumprod, dtype=torch.float64)
    else:
        table = path(torch.linspace(1.0, 0.0, entries, dtype=torch.float64)).alpha.square()
    table = table[skipped:]
    betas = 1.0 - table / torch.cat([torch.ones(1, dtype=torch.float64), table[:-1]])
    return DDIMScheduler(
        num_train_timesteps=entries - skipped,
        timestep_spacing=spacing,  # type: ignore[arg-type]
        trained_betas=betas.tolist(),
        clip_sample=False,
        steps_offset=int(betas[0] == 0.0),  # DDIMScheduler divides by the noise of the entries that it visits
        prediction_type=_TABLE_PREDICTIONS[model.prediction.name],  # type: ignore[arg-type]
    )


@torch.no_grad()
def _bake(network: Any, told: _Told, label: int | None) -> None:
    """Writes the clock, the sign and the label into the weights."""
    if told.start != 0.0 or told.direction != 1.0:
        _turn(network, told.start, told.direction)
    if told.sign != 1.0:
        last = getattr(network, "conv_out", None)
        if not isinstance(last, nn.Conv2d):
            kind = type(network).__name__
            raise OptionError(f"the output of a {kind} has the other sign; expected the prediction 'flow'")
        for parameter in last.parameters():
            parameter.mul_(told.sign)
    if type(network).__name__ == "UNet2DModel":
        _one_label(network, label)
    elif label is not None:
        raise OptionError(f"label is {label}, and a {type(network).__name__} is told its own; expected none")


def _turn(network: Any, start: float, direction: float) -> None:
    """Lets the layer that reads the waves of `start + direction * timestep` read those of the timestep."""
    config = network.config
    if config.get("time_embedding_type") != "positional" or not hasattr(network, "time_embedding"):
        raise OptionError(
            f"the clock of a {type(network).__name__} does not count its scheduler's timesteps; expected one that does"
        )
    first = network.time_embedding.linear_1
    half = first.weight.shape[1] // 2
    speeds = torch.arange(half, dtype=torch.float64) * (-math.log(10_000) / (half - config["freq_shift"]))
    angle = speeds.exp().to(first.weight.device) * start
    halves = first.weight.double().split(half, dim=1)
    cosine, sine = halves if config["flip_sin_to_cos"] else halves[::-1]
    turned = (cosine * angle.cos() + sine * angle.sin(), direction * (sine * angle.cos() - cosine * angle.sin()))
    first.weight.copy_(torch.cat(turned if config["flip_sin_to_cos"] else turned[::-1], dim=1))


def _one_label(network: Any, label: int | None) -> None:
    """Leaves one class: its embedding is added to all times."""
    classes = network.config["num_class_embeds"]
    if classes is None:
        if label is not None:
            raise OptionError(f"label is {label}, and the network was built without classes; expected none")
        return
    if label is not None and not 0 <= label < classes:
        raise OptionError(f"label is {label}; expected 0 to {classes - 1}, the last for none")
    row = network.class_embedding.weight[classes - 1 if label is None else label]
    network.time_embedding.linear_2.bias.add_(row)
    network.class_embedding = None
    network.register_to_config(num_class_embeds=None)
