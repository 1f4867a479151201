"""Latents on disk: posteriors in bfloat16, in files with many pictures, which are read at each draw.

keys: 16 bytes that identify a picture file, its content or a view, and a table to find them.
contents: the hash of each picture file, remembered by path, size and time of the last change.
shards: a file with the posteriors of many views of one size.
store: the shards of one autoencoder, and the latents of a run that are read from them.
filling: encode the views that no shard has.
caches: what a run encodes before the training, and whether it stays in memory.
"""
