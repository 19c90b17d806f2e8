import io
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import hflip, resized_crop

from data_prep.shard_set import read_index, read_manifest, tar_path
from pipeline.data.loader import Loader
from pipeline.data.pixels import jpeg_size
from pipeline.data.random_resized_crop import draw_crop_boxes, draw_flips
from pipeline.data.reader import ShardReader
from pipeline.errors import UserError
from pipeline.recipe import load_recipe

CPU = torch.device("cpu")
NOISE = 16


def recipe_of(*overrides):
    return load_recipe("demo_emae", ["data.global_batch=24", "engine.micro_batch=6", *overrides])


def load(shards, steps, rank=0, world_size=1, step=0, recipe=None):
    """Return images, noise and sample ids of some steps of one rank, each concatenated."""
    recipe = recipe or recipe_of()
    loader = Loader(ShardReader(shards), recipe, NOISE, CPU, rank, world_size, step)
    batches = [loader.next() for _ in range(steps * recipe.gradient_accumulation_steps(world_size))]
    loader.close()
    return (
        torch.cat([batch.images for batch in batches]),
        torch.cat([batch.noise for batch in batches]),
        np.concatenate([batch.locations.sample_id for batch in batches]),
    )


def test_a_step_does_not_depend_on_world_size(shards):
    images, noise, samples = load(shards, steps=1, step=3)
    for world_size in (2, 4):
        ranks = [load(shards, 1, rank, world_size, step=3) for rank in range(world_size)]
        assert torch.equal(torch.cat([rank[0] for rank in ranks]), images)
        assert torch.equal(torch.cat([rank[1] for rank in ranks]), noise)
        assert np.concatenate([rank[2] for rank in ranks]).tolist() == samples.tolist()


def test_starting_at_a_step_equals_skipping_the_earlier_ones(shards):
    whole, late = load(shards, steps=6), load(shards, steps=2, step=4)
    for all_steps, last_two in zip(whole, late, strict=True):
        assert np.array_equal(all_steps[-48:], last_two)


def test_pixels_do_not_depend_on_threads_or_prefetch(shards):
    def batches(threads, prefetch):
        recipe = recipe_of(f"data.prefetch={prefetch}")
        loader = Loader(ShardReader(shards), recipe, NOISE, CPU, threads=threads)
        images = [(batch.images, batch.images.clone()) for batch in (loader.next() for _ in range(12))]
        loader.close()
        assert all(torch.equal(image, copy) for image, copy in images)  # later batches do not overwrite it
        return [image for image, _ in images]

    for one, other in zip(batches(1, 1), batches(3, 4), strict=True):
        assert torch.equal(one, other)


def test_wait_seconds_are_counted(shards):
    loader = Loader(ShardReader(shards), recipe_of(), NOISE, CPU)
    start = time.perf_counter()
    for _ in range(6):
        loader.next()
    took = time.perf_counter() - start
    assert 0.5 * took < loader.wait_s <= took
    loader.close()


def test_interpreter_exits_cleanly_with_an_open_loader(shards):
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


def test_next_epoch_crops_the_same_sample_differently(shards):
    size = ShardReader(shards).manifest.num_samples
    recipe = load_recipe("demo_emae", [f"data.global_batch={size}", f"engine.micro_batch={size}"])
    first, second = (load(shards, 1, step=step, recipe=recipe) for step in (0, 1))
    assert sorted(first[2]) == sorted(second[2]) == list(range(size))
    order = [np.argsort(epoch[2]) for epoch in (first, second)]
    same = (first[0][order[0]] == second[0][order[1]]).flatten(1).all(1)
    assert not same.any()


def test_pixels_are_pillows_on_the_same_boxes(shards):
    recipe = recipe_of("data.image_size=224", "data.mean=[0, 0, 0]", "data.std=[1, 1, 1]")
    reader = ShardReader(shards)
    loader = Loader(reader, recipe, NOISE, CPU)
    differences = []
    for _ in range(4):
        batch = loader.next()
        epoch, shards_of, indexes, sample_id = batch.locations
        encoded = [reader.read(*location) for location in zip(shards_of, indexes, strict=True)]
        images = [Image.open(io.BytesIO(data)).convert("RGB") for data in encoded]
        data, sizes = recipe.data, np.array([image.size for image in images])
        assert [jpeg_size(image) for image in encoded] == [image.size for image in images]
        boxes = draw_crop_boxes(recipe.seed, epoch, sample_id, sizes, data.crop_scale, data.crop_ratio)
        flips = draw_flips(recipe.seed, epoch, sample_id)
        for row, image in enumerate(images):
            x, y, w, h = boxes[row].tolist()
            expected = resized_crop(image, y, x, h, w, [224, 224], InterpolationMode.BICUBIC)
            expected = np.asarray(hflip(expected) if flips[row] else expected, np.float32)
            ours = batch.images[row].permute(1, 2, 0).numpy() * 255
            differences.append(np.abs(ours.clip(0, 255) - expected).mean())
    loader.close()
    assert np.mean(differences) < 0.5 and max(differences) < 1.5


def test_pixels_are_normalized_by_mean_and_std(shards):
    plain = load(shards, 1, recipe=recipe_of("data.mean=[0, 0, 0]", "data.std=[1, 1, 1]"))[0]
    normal = load(shards, 1)[0]
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert torch.allclose((plain - mean) / std, normal, atol=1e-5)


def encode(mode="RGB", **options):
    file = io.BytesIO()
    Image.new(mode, (40, 24)).save(file, "JPEG", **options)
    return bytearray(file.getvalue())


def rare_subsampling():
    """Chroma at 3 x 1, which simplejpeg rejects."""
    data = encode()
    data[data.index(b"\xff\xc0") + 11] = 0x31
    with pytest.raises(ValueError):
        simplejpeg.decode_jpeg_header(bytes(data))
    return data


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(exif=exif)


@pytest.mark.parametrize(
    "make",
    [encode, lambda: encode(progressive=True), lambda: encode("L"), lambda: encode("CMYK"), rotated, rare_subsampling],
)
def test_jpeg_size_is_read_from_every_kind_of_header(make):
    assert jpeg_size(np.frombuffer(make(), np.uint8)) == (40, 24)


@pytest.mark.parametrize("damaged", [b"", b"\xff\xd8", b"XX" + encode()[2:], encode()[:100], bytes(1000)])
def test_damaged_jpeg_header_is_a_value_error(damaged):
    with pytest.raises(ValueError):
        jpeg_size(np.frombuffer(damaged, np.uint8))


@pytest.fixture
def copied(shards, tmp_path):
    return shutil.copytree(shards, tmp_path / "set")


def test_shard_with_a_wrong_checksum_is_named(copied):
    shard = read_manifest(copied).shards[0]
    index = read_index(copied, shard)
    with open(tar_path(copied, shard), "r+b") as file:
        file.seek(index.offsets[0] + index.sizes[0] - 5)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(UserError, match=shard.name):
        ShardReader(copied).verify_checksums(0, 1)


@pytest.mark.parametrize("suffix", [".tar", ".idx"])
@pytest.mark.parametrize("damage", ["removed", "shortened"])
def test_missing_or_truncated_file_is_named_at_once(copied, suffix, damage):
    path = (copied / read_manifest(copied).shards[-1].name).with_suffix(suffix)
    path.unlink() if damage == "removed" else path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(UserError, match=path.name):
        ShardReader(copied)
