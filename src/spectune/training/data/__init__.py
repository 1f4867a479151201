"""Make batches from folders of captioned images. Batches depend on a seed only.

folders: the folders of a recipe.
names: a name for a run, from the folder of its pictures.
scan: the contents of one folder.
pictures: find picture files, open them, convert their colors.
images, masks: read one file.
captions: read captions, and vary them between draws.
buckets: the training sizes of a recipe, and the placement of an image in one of them.
color: random changes of color.
plan: the images of each batch.
tables: many images in arrays and files instead of one object each.
dataset: batches, and the view of an image in one draw: its crop, orientation and color.
latents: encode images.
cache: latents on disk, and what a run encodes before the training.
encoding: encode all images of a run in the way of its recipe, or as exactly as the memory allows.
gather: checks and warnings for the images of a run.
"""
