"""Reading and writing files: atomic writes, tensors, metrics."""
