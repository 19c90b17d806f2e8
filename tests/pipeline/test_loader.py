import io
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import hflip, resized_crop

from data_prep.shard_set import read_index, read_manifest, tar_path
from pipeline.data.jpeg import jpeg_size
from pipeline.data.loader import Loader
from pipeline.data.random_resized_crop import crop_boxes, flips
from pipeline.data.reader import ShardReader
from pipeline.errors import UserError
from pipeline.recipe import load_recipe

CPU = torch.device("cpu")
NOISE = 16


def recipe_of(*overrides):
    return load_recipe("demo_emae", ["data.global_batch=24", "engine.micro_batch=6", *overrides])


def take(shards, steps, rank=0, world_size=1, step=0, recipe=None):
    """Images, noise and sample ids of some steps of one rank, each concatenated."""
    recipe = recipe or recipe_of()
    loader = Loader(ShardReader(shards), recipe, NOISE, CPU, rank, world_size, step)
    batches = [loader.next() for _ in range(steps * recipe.accumulation(world_size))]
    loader.close()
    return (
        torch.cat([batch.images for batch in batches]),
        torch.cat([batch.noise for batch in batches]),
        np.concatenate([batch.locations.sample for batch in batches]),
    )


def test_a_steps_pixels_and_noise_do_not_depend_on_the_number_of_ranks(shards):
    images, noise, samples = take(shards, steps=1, step=3)
    for world_size in (2, 4):
        parts = [take(shards, 1, rank, world_size, step=3) for rank in range(world_size)]
        assert torch.equal(torch.cat([part[0] for part in parts]), images)
        assert torch.equal(torch.cat([part[1] for part in parts]), noise)
        assert np.concatenate([part[2] for part in parts]).tolist() == samples.tolist()


def test_to_begin_at_a_step_is_to_have_skipped_the_ones_before(shards):
    whole, late = take(shards, steps=6), take(shards, steps=2, step=4)
    for all_steps, last_two in zip(whole, late, strict=True):
        assert np.array_equal(all_steps[-48:], last_two)


def test_pixels_do_not_depend_on_threads_or_prefetch_and_stay_what_they_were(shards):
    def batches(threads, prefetch):
        loader = Loader(
            ShardReader(shards), recipe_of(f"data.prefetch={prefetch}"), NOISE, CPU, threads=threads
        )
        found = [(batch.images, batch.images.clone()) for batch in (loader.next() for _ in range(12))]
        loader.close()
        return found

    for one, other in zip(batches(1, 1), batches(3, 4), strict=True):
        assert (
            torch.equal(one[0], one[1]) and torch.equal(other[0], other[1]) and torch.equal(one[0], other[0])
        )


def test_the_seconds_waited_for_batches_are_counted(shards):
    loader = Loader(ShardReader(shards), recipe_of(), NOISE, CPU)
    began = time.perf_counter()
    for _ in range(6):
        loader.next()
    took = time.perf_counter() - began
    assert 0.5 * took < loader.waited <= took
    loader.close()


def test_a_program_that_ends_with_its_loader_open_ends_well(shards):
    code = (
        "import sys, torch\n"
        "from pipeline.data.loader import Loader\n"
        "from pipeline.data.reader import ShardReader\n"
        "from pipeline.recipe import load_recipe\n"
        "loader = Loader(ShardReader(sys.argv[1]), load_recipe('demo_emae'), 16, torch.device('cpu'))\n"
        "loader.next()\n"
        "sys.exit(2)\n"
    )
    finished = subprocess.run([sys.executable, "-c", code, str(shards)], capture_output=True, text=True)
    assert finished.returncode == 2 and not finished.stderr, finished.stderr


def test_the_next_epoch_cuts_the_same_sample_otherwise(shards):
    size = ShardReader(shards).manifest.num_samples
    recipe = load_recipe("demo_emae", [f"data.global_batch={size}", f"engine.micro_batch={size}"])
    first, second = (take(shards, 1, step=step, recipe=recipe) for step in (0, 1))
    assert sorted(first[2]) == sorted(second[2]) == list(range(size))
    order = [np.argsort(epoch[2]) for epoch in (first, second)]
    same = (first[0][order[0]] == second[0][order[1]]).flatten(1).all(1)
    assert not same.any()


def test_the_pixels_are_pillows_on_the_same_boxes(shards):
    recipe = recipe_of("data.image_size=224", "data.mean=[0, 0, 0]", "data.std=[1, 1, 1]")
    reader = ShardReader(shards)
    loader = Loader(reader, recipe, NOISE, CPU)
    differences = []
    for _ in range(4):
        batch = loader.next()
        locations = batch.locations
        encoded = [reader.read(s, i) for s, i in zip(locations.shard, locations.index, strict=True)]
        sizes = np.array([jpeg_size(image.data) for image in encoded])
        data, seed = recipe.data, recipe.seed
        boxes = crop_boxes(seed, locations.epoch, locations.sample, sizes, data.crop_scale, data.crop_ratio)
        mirrored = flips(seed, locations.epoch, locations.sample)
        for row, image in enumerate(encoded):
            x, y, w, h = boxes[row].tolist()
            photograph = Image.open(io.BytesIO(image)).convert("RGB")
            assert photograph.size == tuple(sizes[row])
            expected = resized_crop(photograph, y, x, h, w, [224, 224], InterpolationMode.BICUBIC)
            expected = np.asarray(hflip(expected) if mirrored[row] else expected, np.float32)
            ours = batch.images[row].permute(1, 2, 0).numpy() * 255
            differences.append(np.abs(ours.clip(0, 255) - expected).mean())
    loader.close()
    assert np.mean(differences) < 0.5 and max(differences) < 1.5


def test_normalisation_is_by_mean_and_standard_deviation(shards):
    plain = take(shards, 1, recipe=recipe_of("data.mean=[0, 0, 0]", "data.std=[1, 1, 1]"))[0]
    normal = take(shards, 1)[0]
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert torch.allclose((plain - mean) / std, normal, atol=1e-5)


@pytest.fixture
def copy_of_shards(shards, tmp_path):
    for path in shards.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def flip_a_bit_of_the_first_image(shards):
    """Behind the back of the manifest."""
    shard = read_manifest(shards).shards[0]
    index = read_index(shards, shard)
    with open(tar_path(shards, shard), "r+b") as file:
        file.seek(index.offsets[0] + index.sizes[0] - 5)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def test_a_shard_whose_bytes_are_not_the_manifests_is_named(copy_of_shards):
    flip_a_bit_of_the_first_image(copy_of_shards)
    name = read_manifest(copy_of_shards).shards[0].name
    with pytest.raises(UserError, match=name):
        ShardReader(copy_of_shards).check_bytes(0, 1)


@pytest.mark.parametrize("suffix", [".tar", ".idx"])
@pytest.mark.parametrize("damage", ["removed", "shortened"])
def test_a_missing_or_shortened_file_is_found_at_once(copy_of_shards, suffix, damage):
    path = (copy_of_shards / read_manifest(copy_of_shards).shards[-1].name).with_suffix(suffix)
    path.unlink() if damage == "removed" else path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(UserError, match=path.name):
        ShardReader(copy_of_shards)
