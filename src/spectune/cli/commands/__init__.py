"""What each command does with its parsed arguments."""
