"""The sections of a recipe: typed, frozen, with units in the names; unknown keys are errors.

base: what all sections share.
model: [model] and [vae].
data: [data], [data.bucket], [data.caption] and [[data.sets]].
objective: [objective], [loss] and [loss.edm2].
run: [optimizer] and [run].
"""
