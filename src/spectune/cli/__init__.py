"""The command line: parse arguments, call operations, print results."""
