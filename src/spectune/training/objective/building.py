"""Build the objective of a training from its recipe: the noise, what is predicted, and the loss."""

from __future__ import annotations

from dataclasses import replace

import torch

from spectune.model.prediction import Flow, Prediction, make_prediction
from spectune.model.vae.encoding import encoder_of
from spectune.training.eps_to_flow.bridge import Bridge
from spectune.training.eps_to_flow.conversion import Conversion
from spectune.training.objective.cost import Cost
from spectune.training.objective.edm2 import LearnedWeighting, WeightingTrainer, weighting_optimizer
from spectune.training.objective.losses import HUBER_C, LOSSES, HuberThreshold
from spectune.training.objective.noising import NoiseOptions
from spectune.training.objective.objective import Objective
from spectune.training.objective.weightings import WEIGHTINGS, WeightingOptions
from spectune.training.recipe.recipe import Recipe
from spectune.training.run import RunModel


def build_objective(recipe: Recipe, model: RunModel, weighting: WeightingTrainer | None) -> Objective:
    """Return the objective of a run whose images are encoded."""
    section = recipe.objective
    conversion = None
    if section.converts:
        conversion = Conversion(has_teacher=section.teacher != "none", bridge_steps=section.bridge_steps)
    prediction, way = _prediction(recipe), recipe.vae.encode
    training, bridge = prediction, None
    if isinstance(prediction, Flow):
        training = replace(prediction, timesteps=section.flow_timestep)
    elif section.read_through == "bridge":
        training, bridge = section.flow, Bridge(prediction)
    assert way != "auto", "the images are not encoded"
    return Objective(
        denoiser=model.denoiser,
        injection=model.injection,
        prediction=prediction,
        training_prediction=training,
        noise=NoiseOptions(section.noise_offset, section.input_perturbation, section.flow_pairing),
        cost=_cost(recipe, training, None if weighting is None else weighting.weighting),
        seed=recipe.run.seed,
        encoder=model.sdxl if recipe.caches_latents else encoder_of(model.sdxl, way),
        conversion=conversion,
        bridge=bridge,
    )


def _prediction(recipe: Recipe) -> Prediction:
    """Return the prediction type of the file: flow models are sampled with continuous timesteps."""
    section = recipe.objective
    assert section.kind is not None, "the objective is not resolved"
    if section.kind == "flow":
        return section.flow
    return make_prediction(section.kind, zero_terminal_snr=bool(section.zero_terminal_snr))


def _cost(recipe: Recipe, prediction: Prediction, learned: LearnedWeighting | None) -> Cost:
    section = recipe.loss
    options = WeightingOptions(prediction.name, scale_v_like_noise=section.scale_v_like_noise)
    if section.min_snr_gamma is not None:
        options = replace(options, min_snr_gamma=section.min_snr_gamma)
    huber_c = HUBER_C if section.huber_c is None else section.huber_c
    return Cost(
        loss=LOSSES[section.kind],
        weighting=WEIGHTINGS[section.weighting],
        options=options,
        threshold=HuberThreshold(huber_c, section.huber_schedule),
        learned=learned,
        contrastive_weight=section.contrastive_weight,
    )


def build_weighting(recipe: Recipe, device: torch.device) -> WeightingTrainer | None:
    """Return the learned weighting of a recipe, None if it has none."""
    if recipe.loss.weighting != "edm2":
        return None
    settings = recipe.loss.edm2
    weighting = LearnedWeighting(settings.fourier_features, importance_gamma=settings.importance_gamma)
    weighting = weighting.to(device)
    return WeightingTrainer(weighting, weighting_optimizer(weighting, learning_rate=settings.learning_rate))
