"""The autoencoder.

* known: published autoencoders by name.
* convention: scale, shift and padding, from several sources.
* loading: load an autoencoder from its own file.
* fitting: decode as exactly as the memory of the device allows.
* ways: the ways to encode an image, with their errors.
* encoding: encode as exactly as the memory of the device allows.
* tiles: run an autoencoder on overlapping tiles of a picture.
"""
