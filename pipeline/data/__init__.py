"""From shard sets to batches on the device: `sampler` orders the samples, `loader` crops, `dali` decodes."""
