"""Build checked tar shards from image archives. Start reading at `data_prep/shard_set.py`."""
