"""GPU memory that a training run needs, and the settings that fit a card."""
