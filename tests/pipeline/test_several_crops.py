"""data.crops_per_image: several crops of an image that is decoded once."""

import numpy as np
import pytest
import torch

from pipeline.data.loader import CROP_SHIFT, Loader
from pipeline.data.random_resized_crop import draw_flips
from pipeline.data.reader import ShardReader
from pipeline.errors import UserError
from pipeline.recipe import load_recipe

CPU = torch.device("cpu")


def load(shards, crops, steps=2, rank=0, world_size=1, batch=24, micro_batch=12, **settings):
    """Return images, noise and sample ids of some steps of a rank."""
    keys = {"data.global_batch": batch, "engine.micro_batch": micro_batch, "data.crops_per_image": crops}
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in {**keys, **settings}.items()]
    recipe = load_recipe("demo_emae", overrides)
    loader = Loader(ShardReader(shards), recipe, 16, CPU, rank, world_size)
    batches = [loader.next() for _ in range(steps * recipe.gradient_accumulation_steps(world_size))]
    loader.close()
    return (
        torch.cat([item.images for item in batches]),
        torch.cat([item.noise for item in batches]),
        np.concatenate([item.locations.sample_id for item in batches]),
    )


def test_crops_of_an_image_are_consecutive_and_differ(shards):
    images, noise, samples = load(shards, crops=3)
    assert len(samples) == 48 and (samples.reshape(-1, 3) == samples[::3, None]).all()
    for values in (images, noise):
        views = values.flatten(1).view(-1, 3, values[0].numel())
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert (views[:, one] != views[:, other]).any(1).all()


def test_first_crop_is_the_crop_of_a_run_with_one(shards):
    """A crop of a larger decoded box has the pixels of that crop decoded alone."""
    several, noise, samples = load(shards, crops=4, batch=48, micro_batch=24, data__image_size=96)
    single, single_noise, single_samples = load(shards, 1, 1, data__image_size=96)
    assert samples[::4].tolist() == single_samples.tolist()
    assert torch.equal(noise[::4], single_noise)
    difference = (several[::4] - single).abs() * 0.225 * 255
    assert difference.mean() < 0.1 and difference.flatten(1).mean(1).max() < 0.5


def test_crops_do_not_depend_on_world_size(shards):
    whole = load(shards, crops=3, steps=1)
    halves = [load(shards, crops=3, steps=1, rank=rank, world_size=2, micro_batch=6) for rank in (0, 1)]
    for number in range(3):
        assert np.array_equal(np.concatenate([half[number] for half in halves]), whole[number])


def test_crops_of_an_image_are_drawn_independently():
    sample_id = np.arange(4000)
    first, second = (draw_flips(0, np.zeros_like(sample_id), sample_id + (crop << CROP_SHIFT)) for crop in (0, 1))
    assert abs((first == second).mean() - 0.5) < 0.03 and abs(second.mean() - 0.5) < 0.03


def test_micro_batch_not_divisible_by_crops_is_rejected():
    with pytest.raises(UserError, match=r"data\.crops_per_image: 5 .*engine.micro_batch"):
        load_recipe("demo_emae", ["data.crops_per_image=5"])


def test_offset_not_divisible_by_crops_is_rejected(shards):
    recipe = load_recipe("demo_emae", ["data.crops_per_image=4"])
    with pytest.raises(ValueError, match="offset 6"):
        Loader(ShardReader(shards), recipe, 16, CPU, offset=6)
