"""Many images in arrays and files instead of one object each.

sequences, strings: sequences whose items are made when they are read.
images: the usable images of a folder in columns.
placements: the placements of all images of a run.
index_file: the columns of a folder in a file, the index.
states: sizes and times of files, which tell what changed since.
update: read what is new or changed.
indexing: scan a folder through its index.
"""
