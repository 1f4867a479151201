"""Adapter files: reading, writing, spellings and alphas."""
