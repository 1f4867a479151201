"""From folders of captioned images to batches that a seed fixes completely."""
