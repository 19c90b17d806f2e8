"""From a shard set to a pre-trained vision transformer. Start reading at `pipeline/train/trainer.py`."""

__version__ = "0.1.0"
