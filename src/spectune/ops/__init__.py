"""The operations. Each one is a module."""
