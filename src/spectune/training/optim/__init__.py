"""Optimizers by name, and learning rate schedules.

kinds: the table of optimizers. Add a new optimizer there.
options: the options of each optimizer.
groups: build an optimizer over the parts of the model.
modes: switch between the two sets of weights of schedule-free optimizers.
schedules: learning rates as functions of progress.
adafactor, eight_bit: changed versions of library classes.
stacked_prodigy_plus: ProdigyPlus on many tensors at once.
"""
