"""From factors back to models: merging, exporting, verifying, and the operations on whole files."""
