"""The operations, each of them a module or a package."""
