"""Training the change of a model's principal spectrum: recipe, data, objective, loop and saved state."""
