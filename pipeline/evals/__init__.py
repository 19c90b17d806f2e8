"""What a run has learned, in pictures and numbers."""
