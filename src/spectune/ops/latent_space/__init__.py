"""Move a checkpoint to another latent space: `convert --latent-channels`.

* move: write the checkpoint with new first and last convolutions and another autoencoder.
* initial: their weights from the old ones, without pictures.
* pictures: encode pictures with both autoencoders.
* fit: their weights from encoded pictures, by least squares.
* records: the report.
"""
