"""Many images in arrays and files instead of one object each.

sequences: sequences that are made of others without a copy.
placements: the placements of all images of a run.
"""
