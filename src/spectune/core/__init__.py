"""Linear algebra of the principal spectrum: plain tensors in, plain tensors out."""
