"""Thin faces of the library: parse, call, print."""
