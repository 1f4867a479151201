"""The sections of a recipe: typed, frozen, with units in the names. Unknown keys are errors.

base: the base class of all sections.
model: [model] and [vae].
data: [data], [data.bucket] and [[data.sets]].
captions: [data.caption].
objective: [objective], [loss] and [loss.edm2].
run: [optimizer] and [run].
"""
