"""Output of the commands before a training: new, and train with --dry-run."""
