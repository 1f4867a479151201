"""A training run as a TOML file: sections, defaults and validation."""
