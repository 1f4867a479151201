"""Optimisers by name, each with its checked options, and learning rate schedules as functions of progress."""

from spectune.train.optim.groups import build_optimizer, groups_by_part, learning_rates, step_sizes
from spectune.train.optim.kinds import OPTIMIZERS, OptimizerKind, Traits, check_options, traits_of
from spectune.train.optim.modes import finished_weights, set_mode
from spectune.train.optim.options import Options
from spectune.train.optim.schedules import SCHEDULES, rate_factor

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "OptimizerKind",
    "Options",
    "Traits",
    "build_optimizer",
    "check_options",
    "finished_weights",
    "groups_by_part",
    "learning_rates",
    "rate_factor",
    "set_mode",
    "step_sizes",
    "traits_of",
]
