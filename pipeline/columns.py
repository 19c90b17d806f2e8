"""The columns of metrics.jsonl, by what they speak of.

Invariant: every column but those OF_THE_MOMENT is a function of recipe, data and number of ranks.
"""

OF_THE_MOMENT = {
    "time",
    "images_per_s",
    "images_per_s_rank",
    "data_wait",
    "mfu",
    "memory",
    "rank_time",
    "slowest_time",
    "slowest_rank",
    "slowest_host",
}
"""How fast it went, and when."""

NO_LOSS = OF_THE_MOMENT | {
    "step",
    "epoch",
    "samples",
    "lr",
    "grad_norm",
    "skipped",
    "skips",
    "replaced",
    "decoded_patches",  # of Efficient MAE: a count
}
"""What is neither the loss, nor a part of it, nor an accuracy."""
