"""Files: atomic writes, tensors, metrics."""
