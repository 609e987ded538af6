"""A model as a folder that diffusers alone loads and runs.

What diffusers cannot say of a network is written into its weights, where that is exact: the time features are waves, so
that a clock that starts elsewhere or runs the other way is a rotation of them, taken over by the layer that reads them;
a network that counts towards the data has the signs of its last layer changed; and one label is a part of the bias that
the labels are added to.
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
from fluvial.interop.diffusers_networks import DiffusersNetwork
from fluvial.model import Clock, Converted, Model
from fluvial.networks import UNet
from fluvial.paths import Discrete, Rectified

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


def to_diffusers(model: Model, folder: str | os.PathLike[str], *, label: int | None = None, pipe: Any = None) -> Path:
    """Writes a model as a diffusers pipeline; `DiffusionPipeline.from_pretrained(folder)` runs it without Fluvial.

    A rectified flow goes out with a FlowMatchEulerDiscreteScheduler, whose steps are this library's `euler`; a variance
    preserving path as a table with a DDIMScheduler, whose steps are `ddim`; on the times of
    `sampling_times(scheduler, steps)` the states are equal. The pipeline's images are x/2 + 1/2, clamped, of states x
    in path units: it fits models whose path units run from -1 to 1. The model is left as it is.

    A converted model, such as a straightened table, goes out in the notation of its network, where `ddim` makes the
    same samples at the same noise levels.

    Args:
        model: around `fl.networks.UNet`, or a network that came in by `from_diffusers`.
        folder: a new or empty one.
        label: the class it is to draw, which the unconditional pipelines of diffusers cannot be told; None is the null
            class.
        pipe: a pipeline to put the network into, with all its other parts, such as the text encoders and autoencoder
            it came with. None: an unconditional one.

    Returns:
        The folder.

    Raises:
        OptionError: for what cannot be said there: other networks, paths, predictions and clocks; flow maps; sides
            that the network pads.
        RunError: for a folder that holds something.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} is not empty; expected a new folder to write the pipeline in")
    if isinstance(model, FlowMap):
        raise OptionError("a flow map has no scheduler of diffusers'; expected a model")
    if isinstance(model, Converted):
        model = model.source
    network, sign = _network(model.network)
    told = _told(model)
    _bake(network, told._replace(sign=told.sign * sign), label)
    if pipe is not None:
        name = "unet" if "unet" in pipe.components else "transformer"
        whole = type(pipe)(**{**pipe.components, name: network, "scheduler": told.scheduler})
    else:
        whole = _unconditional(network, told.scheduler)
    whole.save_pretrained(folder)
    return folder


def _unconditional(network: Any, scheduler: Any) -> Any:
    from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
    from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline

    if type(network).__name__ != "UNet2DModel":
        raise OptionError(f"a {type(network).__name__} needs a pipeline with its other parts; expected pipe=…")
    if type(scheduler).__name__ == "DDIMScheduler":
        return DDIMPipeline(network, scheduler)
    return DDPMPipeline(network, scheduler)


def _network(network: Callable[..., Tensor]) -> tuple[Any, float]:
    """A copy of the diffusers network in it, and its sign."""
    if isinstance(network, DiffusersNetwork):
        return copy.deepcopy(network.inner), network.sign
    if not isinstance(network, UNet):
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


def _told(model: Model) -> _Told:
    clock = model.convention.clock or Clock()
    name = type(model.path).__name__
    if not isinstance(clock, Clock) or model.convention.scale_input is not None:
        raise OptionError("the clock or the input's scale is a function; expected a fl.model.Clock and no scale")
    if not clock.scale or not float(clock.scale).is_integer() or abs(clock.scale) < 2:
        raise OptionError(f"the clock counts {clock.scale:g} from noise to data; expected a whole number, like 1000")
    steps = int(abs(clock.scale))
    direction = -math.copysign(1.0, clock.scale)
    start = clock(1.0)
    if isinstance(model.path, Rectified):
        scheduler = _flow(model, steps)
        return _Told(scheduler, start, direction, _DIRECTIONS[model.prediction.name])
    c = model.path.table([k / 8 for k in range(9)])
    if any(abs(each.alpha**2 + each.sigma**2 - 1.0) > 1e-9 for each in c):
        raise OptionError(
            f"diffusers has no pipeline for the path {name}; expected Rectified, or one with alpha² + sigma² = 1"
        )
    return _Told(_table(model, steps + 1), start, direction, 1.0)


def _flow(model: Model, steps: int) -> Any:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    if model.prediction.name not in _DIRECTIONS:
        raise OptionError(f"the prediction is {model.prediction.name} on a rectified path; expected velocity or flow")
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=steps)


def _table(model: Model, entries: int) -> Any:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    if model.prediction.name not in _TABLE_PREDICTIONS:
        raise OptionError(f"the prediction is {model.prediction.name} on a table; expected noise, v or data")
    path = model.path
    if isinstance(path, Discrete) and len(path.alphas_cumprod) == entries:
        table = torch.tensor(path.alphas_cumprod, dtype=torch.float64)
    else:
        table = path(torch.linspace(1.0, 0.0, entries, dtype=torch.float64)).alpha.square()
    betas = 1.0 - table / torch.cat([torch.ones(1, dtype=torch.float64), table[:-1]])
    return DDIMScheduler(
        num_train_timesteps=entries,
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
