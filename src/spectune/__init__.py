"""spectune fine-tunes a whole SDXL checkpoint by training only its principal spectrum."""
