"""A training run as a TOML file.

sections: the keys of each section, with types, defaults and help.
recipe: all sections together, and the rules between them.
file: read a TOML file; relative paths and overrides.
reference: generate docs/reference/recipe-keys.md.
"""
