"""Exporting a plain LoRA."""
