"""A training run as a TOML file.

sections: the keys of each section, with types, defaults and help.
recipe: all sections together, and the rules between them.
defaults: the keys whose defaults depend on the base and on the device.
file: read a TOML file; relative paths and overrides.
"""
