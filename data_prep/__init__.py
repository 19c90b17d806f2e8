"""From image archives to a checked set of tar shards. Start reading at `data_prep/shard_set.py`."""
