"""Cascades: a model of small images, and models that each make the images of the one before larger.

    p(high) = ∫ p(high | low) p(low)

Each stage is conditioned on what the stage below made, enlarged to its size: re-noised to a level of log-SNR that it is
told (conditioning augmentation), or the state at which the stage below was stopped early (truncated conditioning). The
levels are those it has seen in training.

Source: Ho, Saharia, Chan, Fleet, Norouzi, Salimans: Cascaded diffusion models for high fidelity image generation
(2021), https://arxiv.org/abs/2106.15282
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor

from fluvial import inputs, sampling
from fluvial.errors import OptionError, RunError, ShapeError
from fluvial.model import Model
from fluvial.systems import cascade_checks as checks
from fluvial.systems.base import Start, System, options_of
from fluvial.systems.cascade_lower import Image, Stopped, stopped_early
from fluvial.systems.upsampling import CLEAN, Augmentation, allowed

RESIZE = {"smaller": "area", "larger": "bilinear"}

# What a run starts from: of the first stage alone, unless it is given by stage.
_BEGINNINGS = ("init", "state", "strength")


class Cascade(System):
    """Models of images in a row, from the smallest to the largest.

        cascade = fl.systems.Cascade([base, up1, up2])
        x = fl.sample(cascade, 16, steps=18, cond={"label": labels}, seed=0)
        x = cascade.upscale(images, seed=0)

    The stages are called "base", "up1", "up2", …. An upper one is called as network(x, t, low=, level=, **cond), as an
    `Upsampler` is; it may be converted, straightened or distilled: a flow map makes its stage in one step.

    Sample i depends on (seed, i) alone, and its stages are independent: the base draws the noise of the seed itself, as
    if it were sampled by itself, those above that of seeds which follow from it.

    Args:
        models: two or more.
        levels: the log-SNR that lower images are corrupted to in sampling: a number for all upper stages, or by their
            names. Default: the middle of what a stage was trained under.
        augmentations: what upper stages were trained under, by their names, where their networks do not say it.

    Raises:
        OptionError, ShapeError: for models that do not fit on each other, or levels that they do not know; says which.
    """

    kind: ClassVar[str] = "cascade"

    def __init__(
        self,
        models: Sequence[Model],
        levels: float | Mapping[str, float] | None = None,
        augmentations: Mapping[str, Augmentation | None] | None = None,
    ) -> None:
        names = ["base", *(f"up{k}" for k in range(1, len(models)))]
        self.models = dict(zip(names, models))
        checks.require_chain(self.models)
        self.augmentations = checks.augmentations(self.models, augmentations or {})
        self.levels = {name: self._level(name, checks.of_stage(levels, name, names[1:], "level")) for name in names[1:]}
        self.shape, self.normalisation = models[-1].shape, models[-1].normalisation

    # Sampling

    def sample_with(self, start: Start | None = None, **options: Any) -> Any:
        return list(self.stages(start, **options).values())[-1]

    def upscale(self, images: Tensor, **options: Any) -> Any:
        """The largest images (B, C, H, W) of images of the size of any stage, by the stages above it.

        Args:
            images: (B, C, h, w), in the data's own units.
            options: as for `stages`. The first level is by default that of a clean image, where the stage knows it.
        """
        return self.sample_with(low=images, **options)

    def stages(
        self,
        start: Start | None = None,
        *,
        level: float | Mapping[str, float] | None = None,
        truncated: float | Mapping[str, float] | None = None,
        low: Tensor | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """The images of every stage (B, C, H, W) in the data's own units, by name; trajectories where record=True.

        Args:
            start: of the base, as for `fl.sample`.
            level: the log-SNR that lower images are corrupted to, for all upper stages or by their names; `math.inf`
                is clean. Default: `levels`.
            truncated: the time, on its own path, at which the stage below an upper one is stopped, for all of them or
                by the upper ones' names. Its state there is what the upper stage starts from, with the log-SNR of that
                time as the level; in place of its images stand the data that it then expected.
            low: images of the size of a stage, to start above it in place of `start`.
            options: as for `fl.sample`; see `System.stages`. `init`, `state`, `strength` and a noise tensor are the
                base's. A condition goes to the stages that have a null one for it, or to all where none has.

        Raises:
            OptionError, ShapeError: before any work, for levels that a stage does not know, and images of no stage.
        """
        names = list(self.models)
        stops = {name: checks.of_stage(truncated, name, names[1:], "truncated") for name in names[1:]}
        stops = {name: checks.stop(stop) for name, stop in stops.items() if stop is not None}
        begin = 0 if low is None else self._place(low, start, options) + 1
        levels = self._levels(level, stops, names[max(begin, 1) :], low is not None)
        seeds = self._seeds(options.pop("seed", None), names)
        for name in names[begin:-1]:
            checks.require_landing(name, options_of(name, options, names).get("times"))
        below = None if low is None else Image(low)
        made: dict[str, Any] = {}
        for k in range(begin, len(names)):
            name = names[k]
            own: dict[str, Any] = {**self._options(name, options), "seed": seeds[name]}
            if below is not None:
                cond = below.conditions(self.models[name], levels[name], seeds[name], own.get("first", 0))
                own["cond"] = {**own["cond"], **cond}
                shape = self.models[name].shape
                assert shape is not None
                noise = own.pop("noise", None)
                own |= {"noise": noise} if isinstance(noise, str) else {}
                start = noise if isinstance(noise, Tensor) else (len(cond["level"]), *shape)
                start = start if own.get("state") is None else None
            stop = stops.get(names[k + 1]) if k + 1 < len(names) else None
            made[name], below = self._sampled(self.models[name], start, own, stop)
        return made

    def _sampled(self, model: Model, start: Any, own: dict[str, Any], stop: float | None) -> tuple[Any, Any]:
        """What a stage made, and what the next one starts from."""
        if stop is not None:
            return stopped_early(model, start, own, stop)
        made = sampling.sample(model, start, **own)
        return made, Image(made.samples if isinstance(made, sampling.Trajectory) else made)

    def _options(self, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of one stage, its conditions among them."""
        names = list(self.models)
        if name != names[0]:
            options = {k: v for k, v in options.items() if k not in _BEGINNINGS or isinstance(v, Mapping)}
            if not isinstance(options.get("noise", ""), str | Mapping):
                options = {k: v for k, v in options.items() if k != "noise"}
        own = options_of(name, options, names)
        null = self.models[name].null or {}
        cond = {key: value for key, value in (own.get("cond") or {}).items() if key in null or key not in self.null}
        return {**own, "cond": cond}

    def _seeds(self, given: Any, names: Sequence[str]) -> dict[str, int]:
        """Each stage's seed: the base's is the one given, those above follow from it."""
        by_stage: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
        seed = inputs.checked_seed(None if isinstance(given, Mapping) else given)
        seeds = {}
        for name in names:
            digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
            own = seed if name == names[0] else int.from_bytes(digest, "little")
            seeds[name] = inputs.checked_seed(by_stage[name]) if name in by_stage else own
        return seeds

    def _place(self, low: Tensor, start: Any, options: Mapping[str, Any]) -> int:
        """The number of the stage whose size these images have."""
        of_base = {name: options.get(name) for name in (*_BEGINNINGS, "noise")}
        given = [name for name, value in of_base.items() if not isinstance(value, str | Mapping | None)]
        if start is not None or given:
            what = "start" if start is not None else given[0]
            raise OptionError(f"low and {what} are given; expected one of them, what the stages are to start from")
        shapes = [model.shape for model in self.models.values()][:-1]
        if not isinstance(low, Tensor) or tuple(low.shape[1:]) not in shapes:
            shape = tuple(low.shape) if isinstance(low, Tensor) else type(low).__name__
            known = " or ".join(f"(B, {', '.join(map(str, shape or ()))})" for shape in shapes)
            raise ShapeError(f"the images are {shape}; expected {known}: those of a stage that is not the last")
        return shapes.index(tuple(low.shape[1:]))

    # Levels

    def _levels(
        self, given: Any, stops: Mapping[str, float], names: Sequence[str], real: bool
    ) -> dict[str, float | None]:
        """The level of every stage that is run; None where its lower stage is stopped early and so has its own."""
        found: dict[str, float | None] = {}
        known, stages = list(self.models)[1:], list(self.models)
        for name in names:
            level = checks.of_stage(given, name, known, "level")
            if name not in stops:
                clean = real and name == names[0] and level is None and allowed(self.augmentations[name], CLEAN)
                found[name] = CLEAN if clean else self.levels[name] if level is None else self._level(name, level)
                continue
            if level is not None or (real and name == names[0]):
                what = f"level {level}" if level is not None else "low"
                raise OptionError(f"{name} has {what} and truncated {stops[name]}; expected one of them")
            lower = self.models[stages[stages.index(name) - 1]]
            self._level(name, Stopped.level_of(lower, self.models[name], stops[name]), f" at truncated {stops[name]}")
            found[name] = None
        return found

    def _level(self, name: str, level: float | None, where: str = "") -> float:
        """A level that a stage knows, or its default."""
        augmentation = self.augmentations[name]
        if level is None:
            return CLEAN if augmentation is None else augmentation.middle
        if not isinstance(level, int | float) or not allowed(augmentation, level):
            raise OptionError(
                f"level is {level}{where}; expected what {name} was trained under: {checks.said(augmentation)}"
            )
        return min(float(level), CLEAN)

    # What every system can

    def with_models(self, models: Mapping[str, Model]) -> Self:
        if list(models) != list(self.models):
            raise OptionError(f"the models are {', '.join(models)}; expected {', '.join(self.models)}")
        return type(self)(list(models.values()), self.levels, self.augmentations)

    def write_parts(self, folder: Path) -> dict[str, Any]:
        plain = {name: None if own is None else own.config() for name, own in self.augmentations.items()}
        return {"resize": RESIZE, "levels": self.levels, "augmentations": plain}

    @classmethod
    def read(cls, folder: Path, models: Mapping[str, Model], settings: Mapping[str, Any]) -> Self:
        if settings.get("resize") != RESIZE:
            raise RunError(f"{folder} resizes by {settings.get('resize')}; expected {RESIZE}, which is known here")
        try:
            given = settings["augmentations"].items()
            augmentations = {name: None if own is None else Augmentation(**own) for name, own in given}
            return cls(list(models.values()), settings["levels"], augmentations)
        except (OptionError, ShapeError, KeyError, TypeError, AttributeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise RunError(f"{folder}: the cascade cannot be put together: {reason}") from error
