"""What each command prints: one module per command with `show` and, where it differs, `as_json`."""
