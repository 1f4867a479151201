"""Optimizers by name, and learning rate schedules.

kinds: the table of optimizers. Add a new optimizer there.
options: the options of each optimizer.
groups: build an optimizer over the parts of the model.
modes: the average of schedule-free optimizers.
schedules: learning rates as functions of progress.
adafactor, eight_bit: adapted classes.
"""

from spectune.training.optim.groups import build_optimizer, groups_by_part, learning_rates, step_sizes
from spectune.training.optim.kinds import OPTIMIZERS, OptimizerKind, Traits, check_options, traits_of
from spectune.training.optim.modes import finished_weights, set_mode
from spectune.training.optim.options import Options
from spectune.training.optim.schedules import SCHEDULES, rate_factor

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
