"""A training run as a TOML file.

sections: the keys of each section, with types, defaults and help.
recipe: the whole recipe, and the rules between sections.
file: the TOML file, relative paths and overrides.
reference: the page docs/reference/recipe-keys.md.
"""
