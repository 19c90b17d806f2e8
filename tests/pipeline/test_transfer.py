"""What the loader copies to a GPU is in page-locked memory."""

import numpy as np
import pytest
import torch

from pipeline.data.loader import BatchBuilder
from pipeline.data.reader import ShardReader
from pipeline.data.transfer import copy_to_device, pin_for
from pipeline.data.undecodable import UndecodableSamples
from pipeline.recipe import load_recipe

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("crops", [1, 2])
def test_every_host_tensor_of_a_batch_was_pinned(shards, crops):
    recipe = load_recipe("demo_emae", ["engine.micro_batch=8", "data.global_batch=8", f"data.crops_per_image={crops}"])
    reader, pinned = ShardReader(shards), []

    def pin(tensor):
        pinned.append(tensor.clone())
        return pinned[-1]

    undecodable = UndecodableSamples(reader, 8)
    builder = BatchBuilder(reader, recipe, 4, undecodable, labeled=True, pin=pin)
    locations = reader.sampler(0).locate(np.arange(8 // crops))
    places = zip(locations.shard, locations.index_in_shard, strict=True)
    spec = builder.build(locations, [reader.read(*place) for place in places])
    for batch in (spec, builder.replace(spec, 1, "a reason")):
        tensors = [value for value in batch if isinstance(value, torch.Tensor)]
        assert len(tensors) == 2 and all(any(tensor is copy for copy in pinned) for tensor in tensors)
        assert len(batch.labels) == len(batch.noise) == 8


def test_tensors_for_a_gpu_are_pinned_and_others_are_not():
    values = torch.arange(3.0)
    assert pin_for(values, CPU) is values and copy_to_device(values, CPU) is values
    if torch.cuda.is_available():
        assert pin_for(values, GPU).is_pinned() and copy_to_device(values, GPU).device == GPU
    else:  # without a GPU there is no page-locked memory: an error, not a pageable copy
        with pytest.raises(RuntimeError):
            pin_for(values, GPU)
