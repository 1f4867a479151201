"""Pictures from a running model, and pictures of pictures: generation and comparison."""
