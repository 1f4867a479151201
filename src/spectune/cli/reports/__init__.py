"""The output of each command: one module per command. See `CommandSpec` for the functions of a module."""
