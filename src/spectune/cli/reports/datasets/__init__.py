"""Output of the commands about datasets."""
