"""From folders of captioned images to batches that depend on a seed only.

folders: the folders of a recipe.
scan: what one folder contains.
images, masks, captions: read one file.
buckets: training sizes, and how an image is placed in one.
color: random changes of color.
views: how one draw uses an image.
plan: which images form which batch.
dataset: batches.
latents, store: encode images, and keep latents on disk.
gather: the pictures of a run.
"""
