"""data.crops_per_image: several crops of an image that is decoded once."""

import numpy as np
import pytest
import torch

from pipeline.data.loader import Loader
from pipeline.data.reader import ShardReader
from pipeline.errors import UserError
from pipeline.recipe import load_recipe

CPU = torch.device("cpu")


def take(shards, crops, steps=2, rank=0, world_size=1, batch=24, micro_batch=12, **settings):
    keys = {"data.global_batch": batch, "engine.micro_batch": micro_batch, "data.crops_per_image": crops}
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in {**keys, **settings}.items()]
    recipe = load_recipe("demo_emae", overrides)
    loader = Loader(ShardReader(shards), recipe, 16, CPU, rank, world_size)
    batches = [loader.next() for _ in range(steps * recipe.accumulation(world_size))]
    loader.close()
    return (
        torch.cat([item.images for item in batches]),
        torch.cat([item.noise for item in batches]),
        np.concatenate([item.locations.sample for item in batches]),
    )


def test_an_images_crops_follow_each_other_and_differ(shards):
    images, noise, samples = take(shards, crops=3)
    assert len(samples) == 48 and (samples.reshape(-1, 3) == samples[::3, None]).all()
    for values in (images, noise):
        views = values.flatten(1).view(-1, 3, values[0].numel())
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert (views[:, one] != views[:, other]).any(1).all()


def test_the_first_crop_is_the_only_one_of_a_run_without_and_the_pixels_are_those_of_a_decode_of_its_own(
    shards,
):
    """Cutting a crop out of a larger decoded box is decoding that crop."""
    several, noise, samples = take(shards, crops=4, batch=48, micro_batch=24, data__image_size=96)
    single, single_noise, single_samples = take(shards, 1, 1, data__image_size=96)
    assert samples[::4].tolist() == single_samples.tolist()
    assert torch.equal(noise[::4], single_noise)
    difference = (several[::4] - single).abs() * 0.225 * 255
    assert difference.mean() < 0.1 and difference.flatten(1).mean(1).max() < 0.5


def test_they_do_not_depend_on_the_number_of_ranks(shards):
    whole = take(shards, crops=3, steps=1)
    halves = [take(shards, crops=3, steps=1, rank=rank, world_size=2, micro_batch=6) for rank in (0, 1)]
    for number in range(3):
        joined = [half[number] for half in halves]
        assert np.array_equal(np.concatenate(joined), whole[number])


def test_the_boxes_of_an_images_crops_are_independent(shards):
    """Flips of the first two crops agree for one half of the images."""
    from pipeline.data.loader import CROP
    from pipeline.data.random_resized_crop import flips

    sample = np.arange(4000)
    first, second = (flips(0, np.zeros_like(sample), sample + (crop << CROP)) for crop in (0, 1))
    assert abs((first == second).mean() - 0.5) < 0.03 and abs(second.mean() - 0.5) < 0.03


def test_a_micro_batch_that_would_cut_an_images_crops_apart_is_refused():
    with pytest.raises(UserError, match=r"data\.crops_per_image: 5 does not divide engine.micro_batch, 8"):
        load_recipe("demo_emae", ["data.crops_per_image=5"])


def test_an_offset_that_would_cut_an_images_crops_apart_is_refused(shards):
    recipe = load_recipe("demo_emae", ["data.crops_per_image=4"])
    with pytest.raises(ValueError, match="offset 6: cuts through an image's 4 crops"):
        Loader(ShardReader(shards), recipe, 16, CPU, offset=6)
