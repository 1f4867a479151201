"""The autoencoder.

* convention: scale, shift and padding, from several sources.
* loading: load an autoencoder from its own file.
"""
