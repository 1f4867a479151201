"""Optimizers by name, and learning rate schedules.

kinds: the table of optimizers. Add a new optimizer there.
options: the options of each optimizer.
groups: build an optimizer over the parts of the model.
modes: switch between the two sets of weights of schedule-free optimizers.
schedules: learning rates as functions of progress.
stacks: step on many tensors at once.
tensorwise: step on one tensor at a time, in the backward pass.
adafactor, eight_bit, prodigy, stacked_prodigy_plus: changed versions of library classes.
"""
