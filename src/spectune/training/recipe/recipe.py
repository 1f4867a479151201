"""The recipe: its sections, the rules between them, and readable errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self, get_args

from pydantic import BaseModel, ValidationError, model_validator

from spectune.errors import InputError, did_you_mean, printable
from spectune.training.optim.kinds import OPTIMIZERS
from spectune.training.recipe.sections.base import Section
from spectune.training.recipe.sections.data import DataSection
from spectune.training.recipe.sections.model import ModelSection, VaeSection
from spectune.training.recipe.sections.objective import LossSection, ObjectiveSection
from spectune.training.recipe.sections.run import OptimizerSection, RunSection

EXAMPLES_HINT = "recipes/ contains examples of every section"


class Recipe(Section):
    """The complete description of a training run."""

    model: ModelSection
    vae: VaeSection = VaeSection()
    data: DataSection
    objective: ObjectiveSection = ObjectiveSection()
    loss: LossSection = LossSection()
    optimizer: OptimizerSection = OptimizerSection()
    run: RunSection

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = [
            *self._objective_problems(),
            *self._optimizer_problems(),
            *self._refresh_problems(),
            *self._full_problems(),
            *self._cache_problems(),
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _objective_problems(self) -> Iterator[str]:
        kind = self.objective.kind
        if self.objective.has_flow_loss and self.loss.weighting not in ("none", "edm2"):
            used = (
                "flow" if kind == "flow" else 'objective.read_through = "bridge", which has the loss of flow'
            )
            yield f'loss.weighting = "{self.loss.weighting}" is for eps and v: use none or edm2 for {used}'
        if self.objective.converts and self.model.form != "delta":
            yield (
                'objective.start, teacher and bridge_steps need model.form = "delta", which keeps the base '
                "weights"
            )
        if self.objective.converts and self.model.start is not None:
            yield (
                "objective.start, teacher and bridge_steps convert the base, but model.start continues from "
                "a tuned adapter: remove these keys"
            )
        yield from self._batch_problems()
        if self.model.is_full and self.objective.teacher != "none":
            yield (
                'objective.teacher needs the weights of the base, which model.rank = "full" changes: '
                "a second copy would take as much memory as the model; remove it, or train a rank"
            )
        if kind in ("eps", "flow") and self.loss.scale_v_like_noise:
            yield f'loss.scale_v_like_noise needs objective.kind = "v", not "{kind}"'
        elif self.objective.has_flow_loss and self.loss.scale_v_like_noise:
            yield "loss.scale_v_like_noise is not for the loss of flow: remove objective.read_through"

    def _batch_problems(self) -> Iterator[str]:
        pairs, contrasts = self.objective.differs("flow_pairing"), bool(self.loss.contrastive_weight)
        for name, used in (("objective.flow_pairing", pairs), ("loss.contrastive_weight", contrasts)):
            if used and self.run.batch == 1:
                yield f"{name} uses several images of a batch, but run.batch is 1: raise run.batch"
        if contrasts and self.objective.kind is not None and not self.objective.has_flow_loss:
            yield f'loss.contrastive_weight needs objective.kind = "flow", not "{self.objective.kind}"'
        if contrasts and self.objective.teacher != "none":
            yield (
                "loss.contrastive_weight contrasts the velocities of images, but objective.teacher replaces "
                "them: set only one"
            )

    def _optimizer_problems(self) -> Iterator[str]:
        name, traits = self.optimizer.name, self.optimizer.traits
        frozen = [part for part in self.optimizer.part_learning_rates if part not in self.model.parts]
        if frozen:
            yield f"optimizer.part_learning_rates names {frozen[0]}, which model.parts does not train"
        if self.run.ema_decay is not None and traits.schedule_free:
            yield f"run.ema_decay: {name} already averages its steps; remove run.ema_decay"
        rounds = traits.rounds_stochastically or (self.model.is_full and traits.tensorwise)
        if self.run.trained_precision == "bf16" and not rounds:
            stochastic = [
                other
                for other, kind in OPTIMIZERS.items()
                if kind.rounds_stochastically or (self.model.is_full and kind.tensorwise)
            ]
            yield (
                'run.trained_precision = "bf16" needs an optimizer with stochastic rounding, because plain '
                f"rounding loses small updates; {name} with these options has none, use "
                f"{', '.join(stochastic)}"
            )

    def _refresh_problems(self) -> Iterator[str]:
        if self.model.refresh_every_steps is None:
            return
        name, traits = self.optimizer.name, self.optimizer.traits
        if traits.schedule_free or traits.fixed_learning_rate is not None:
            does = "averages its steps" if traits.schedule_free else "finds its own step size"
            yield (
                f"model.refresh_every_steps restarts the optimizer, but {name} {does} since the start: use "
                "adamw, adamw8bit, lion or adafactor without relative steps"
            )
        if self.run.ema_decay is not None:
            yield (
                "run.ema_decay averages the trained tensors, whose meaning changes with "
                "model.refresh_every_steps: remove one of them"
            )
        if self.objective.teacher != "none":
            yield (
                f'objective.teacher = "{self.objective.teacher}" needs the weights of the base, which '
                "model.refresh_every_steps changes: remove one of them"
            )

    def _full_problems(self) -> Iterator[str]:
        if self.optimizer.step_in_backward and self.backward_obstacle:
            yield f"optimizer.step_in_backward = true does not work with {self.backward_obstacle}"
        if not self.model.is_full:
            return
        if self.optimizer.learning_rate is None and self.optimizer.traits.fixed_learning_rate is None:
            yield (
                'model.rank = "full" needs optimizer.learning_rate, because the default is for factors: '
                "start with 1e-5"
            )
        if self.run.precision not in (None, self.run.trained_precision):
            yield (
                'model.rank = "full" trains the weights of the model themselves: run.precision = '
                f'"{self.run.precision}" and run.trained_precision = "{self.run.trained_precision}" must be '
                'equal; set both to "bf16", which halves the memory, or to "fp32"'
            )
        if self.run.stream:
            yield 'run.stream is for frozen weights, and model.rank = "full" has none: remove it'

    @property
    def backward_obstacle(self) -> str:
        """What excludes a step in the backward pass; empty if nothing does."""
        run, optimizer = self.run, self.optimizer
        if not self.model.is_full:
            return 'a rank: only model.rank = "full" has so many gradients'
        if not optimizer.traits.tensorwise:
            able = [name for name, kind in OPTIMIZERS.items() if kind.tensorwise]
            return f"{optimizer.name}, whose step needs all gradients: use {', '.join(able)}"
        if run.accumulation > 1:
            return f"run.accumulation = {run.accumulation}, which adds up gradients: use 1"
        if optimizer.max_grad_norm:
            return (
                f"optimizer.max_grad_norm = {optimizer.max_grad_norm:g}, which needs the norm of all "
                "gradients: 0 turns clipping off"
            )
        return ""

    def _cache_problems(self) -> Iterator[str]:
        if "text" in self.run.offload and not self.caches_text:
            yield (
                'run.offload = ["text"] needs cached captions: freeze the text encoders, and turn caption '
                "shuffling, tag dropout, wildcards and random lines off"
            )
        if "vae" in self.run.offload and not self.data.caches_latents:
            yield 'run.offload = ["vae"] needs cached latents'
        trained = [part for part in self.model.parts if part != "unet"]
        if self.data.cache_text and trained:
            yield f"data.cache_text needs frozen text encoders, but model.parts trains {', '.join(trained)}"

    @property
    def caches_latents(self) -> bool:
        """Whether each image is encoded once, before the training."""
        return self.data.caches_latents

    @property
    def caches_text(self) -> bool:
        """Whether each caption is encoded once, before the training."""
        if self.data.cache_text is not None:
            return self.data.cache_text
        return self.model.parts == ("unet",) and not self.data.caption.varies


def parse_recipe(data: Mapping[str, Any], *, label: str = "recipe") -> Recipe:
    """Return a validated recipe from nested mappings; `label` names it in error messages.

    Raises:
        InputError: A key is unknown or missing, or a value is invalid.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        found = error.errors()
        problems = [problem_of(dict(details)) for details in found[:10]]
        more = f"; ... ({len(found) - 10} more)" if len(found) > 10 else ""
        raise InputError(f"{label}: {'; '.join(problems)}{more}", hint=EXAMPLES_HINT) from error


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section class in a field's annotation: `Section` or `tuple[Section, ...]`."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def problem_of(details: dict[str, Any]) -> str:
    """Return the message for one error of pydantic, with its section and key."""
    location = [str(part) for part in details["loc"]]
    if location[-2:] in (["rank", "rank"], ["rank", "full"]):  # pydantic adds the tag of RankOrFull
        location.pop()
    where = f"[{'.'.join(location[:-1])}] " if len(location) > 1 else ""
    key = location[-1] if location else ""
    message = f"{details['msg'][:1].lower()}{details['msg'][1:]}"
    match details["type"]:
        case "extra_forbidden":
            return f"{where}unknown key `{key}`{did_you_mean(key, _keys_of(location[:-1]))}"
        case "missing":
            return f"{where}key `{key}` is missing"
        case "unknown_name":
            return f"{where}`{key}`: {message}"
        case "value_error":
            place = f"[{'.'.join(location)}] " if location else ""
            return f"{place}{details['ctx']['error']}"
        case _:
            return f"{where}`{key}`: {message}, got {printable(repr(details['input']))}"


def _keys_of(location: Sequence[str]) -> list[str]:
    section: type[BaseModel] = Recipe
    for name in location:
        if name.isdecimal():
            continue  # the index in an array of tables
        below = section_of(section.model_fields[name].annotation)
        if below is None:
            return []
        section = below
    return list(section.model_fields)
