"""Evaluation of frozen encoders on labeled shard sets: k-NN and the linear probe."""
