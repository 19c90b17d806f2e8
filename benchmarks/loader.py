"""Compare the loader with torchvision, DALI's own reader, webdataset, litdata and mosaicml-streaming.

    python benchmarks/loader.py                  (IMAGENET_SAMPLE_DIR: a folder of JPEG photographs)
    python benchmarks/loader.py --rounds 7 --seconds 10 --directory /scratch
    python benchmarks/loader.py --only torchvision shardmae --packages DIR
    python benchmarks/loader.py --device cuda --threads 16 --batch 256       (never run: no GPU was available)

Every loader reads the same JPEG photographs and returns batches of MAE's augmentation in memory, on the CPU:
RandomResizedCrop 224, scale (0.2, 1), bicubic and antialiased, flip, normalized float32. Every loader has one
decoding thread or worker process per core (--threads; the process is bound to that many cores). In each round
every loader runs once, in turn, so that other load on the machine slows down all of them; the first batches
of a turn are a warm-up. The table has each loader's median over the rounds, and the median of its per-round
ratio to torchvision and to DALI's reader.

litdata and mosaicml-streaming require versions of other packages that conflict with the project's. Install
them into a separate folder: pip install --target DIR --no-deps litdata mosaicml-streaming (and their
dependencies), then pass --packages DIR. Loaders that cannot be imported are skipped with a message.

With --device cuda the loaders are those that decode on a GPU, and the batches are in its memory: torchvision's
decode_jpeg (nvJPEG) with files read by worker processes, DALI's reader, and ours.
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torchvision import transforms
from torchvision.transforms import InterpolationMode

SIZE = 224
SCALE = (0.2, 1.0)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Batches = Iterator[torch.Tensor]


class Setup(NamedTuple):
    """What every loader reads and returns."""

    directory: Path
    """For shard sets."""
    photographs: Path
    """Folders of JPEG files."""
    threads: int
    batch: int
    device: torch.device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="duration of a turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--copies", type=int, default=4, help="copies of each photograph")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="run the loaders whose name contains one of these")
    parser.add_argument("--packages", type=Path, help="folder of litdata and mosaicml-streaming")
    parser.add_argument("--directory", type=Path, help="working directory (default: the system's temporary directory)")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[: options.threads]
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(1)
    if options.packages:
        sys.path.append(str(options.packages))
    warnings.filterwarnings("ignore")
    print(f"{len(cores)} cores, load {os.getloadavg()[0]:.1f} before", flush=True)
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        _compare(Path(name), options)


def _compare(directory: Path, options) -> None:
    photographs = _copy_photographs(directory / "photographs", options.copies)
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    setup = Setup(directory, photographs, options.threads, options.batch, device)
    loaders = {}
    for name, start in (GPU_LOADERS if options.device == "cuda" else LOADERS).items():
        if options.only and not any(word in name for word in options.only):
            continue
        try:
            loaders[name] = start(setup)
        except ImportError as error:
            print(f"skipped: {name}: {error}", flush=True)
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    costs: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(options.rounds):
        for name, batches in loaders.items():
            rate, cost = _measure_turn(batches, options.seconds, device)
            rates[name].append(rate)
            costs[name].append(cost)
    print("\n| loader | images/s | x torchvision | x DALI's reader | CPU ms/image |\n| --- | --- | --- | --- | --- |")
    for name, values in rates.items():
        ratios = [
            f"{statistics.median(a / b for a, b in zip(values, rates[baseline], strict=True)):.2f}"
            if baseline in rates
            else ""
            for baseline in (TORCHVISION, DALI)
        ]
        print(
            f"| {name} | {statistics.median(values):,.0f} | {ratios[0]} | {ratios[1]} | "
            f"{statistics.median(costs[name]):.2f} |"
        )
    _compare_pixels(setup)


def _compare_pixels(setup: Setup) -> None:
    """Compare our pixels with those of torchvision on a Pillow image, with the same boxes and flips."""
    import numpy as np
    from torchvision.transforms.functional import hflip, resized_crop

    from pipeline.data.loader import BatchBuilder, Loader
    from pipeline.data.reader import ShardReader
    from pipeline.data.undecodable import UndecodableSamples
    from pipeline.recipe import load_recipe

    shards, settings = _shards(setup), [f"data.global_batch={setup.batch}", f"engine.micro_batch={setup.batch}"]
    recipe = load_recipe("vitb16_mae", [*settings, "data.mean=[0, 0, 0]", "data.std=[1, 1, 1]"])
    reader = ShardReader(shards)
    builder = BatchBuilder(reader, recipe, 1, UndecodableSamples(reader, 0))
    loader = Loader(ShardReader(shards), recipe, 1, setup.device)
    differences = []
    for _ in range(4):
        batch = loader.next()
        places = zip(batch.locations.shard, batch.locations.index_in_shard, strict=True)
        specs = builder.build(batch.locations, [reader.read(*place) for place in places])
        for row, image in enumerate(map(_open, (encoded.tobytes() for encoded in specs.encoded))):
            x, y, w, h = specs.boxes[row, 0].tolist()
            crop = resized_crop(image, y, x, h, w, [SIZE, SIZE], InterpolationMode.BICUBIC)
            expected = np.asarray(hflip(crop) if specs.flips[row, 0] else crop, np.float32)
            differences.append(np.abs(batch.images[row].permute(1, 2, 0).cpu().numpy() * 255 - expected).mean())
    loader.close()
    print(
        f"\npixels: {np.mean(differences):.3f} of 255 levels from torchvision's on the same boxes, mean of "
        f"{len(differences)} photographs; at most {max(differences):.3f}"
    )


def _measure_turn(batches: Batches, seconds: float, device: torch.device) -> tuple[float, float]:
    """Return images per second and CPU milliseconds per image. Batches prefetched before the turn do not count."""
    start = time.perf_counter()
    while time.perf_counter() - start < seconds / 4:
        next(batches)
    _synchronize(device)
    images, start, start_cpu = 0, time.perf_counter(), _cpu_seconds()
    while time.perf_counter() - start < seconds:
        images += len(next(batches))
    _synchronize(device)
    return images / (time.perf_counter() - start), 1000 * (_cpu_seconds() - start_cpu) / images


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu_seconds() -> float:
    """Return the CPU time of this process and its workers; workers of waiting loaders use none."""
    process = psutil.Process()
    # user and system time, and that of terminated children
    return sum(sum(p.cpu_times()[:4]) for p in [process, *process.children(recursive=True)])


def _copy_photographs(folder: Path, copies: int) -> Path:
    """Write the photographs into class folders for ImageFolder, each copy into a separate one."""
    source = os.environ.get("IMAGENET_SAMPLE_DIR")
    if not source:
        sys.exit("set IMAGENET_SAMPLE_DIR to a folder of JPEG photographs")
    for path in sorted(Path(source).iterdir()):
        data = path.read_bytes()
        for copy in range(copies):
            target = folder / f"{path.name.split('_')[0]}_{copy}"
            target.mkdir(parents=True, exist_ok=True)
            (target / path.name.replace(".JPEG", ".jpg")).write_bytes(data)
    return folder


def _shards(setup: Setup, *arguments: str) -> Path:
    out = setup.directory / "_".join(["shards", *arguments]).replace("-", "")
    if not out.exists():
        command = [sys.executable, "-m", "data_prep", "folder", setup.photographs, out, "--shard-size", "32MB"]
        subprocess.run([*map(str, command), *arguments], check=True, capture_output=True)
    return out


def _augmentation() -> Callable:
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, scale=SCALE, interpolation=InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def _forever(loader) -> Batches:
    while True:
        for batch in loader:
            yield batch[0] if isinstance(batch, (list, tuple)) else batch


def _data_loader(setup: Setup, dataset, **options) -> torch.utils.data.DataLoader:
    options |= {"shuffle": True, "drop_last": True, "persistent_workers": True}
    return torch.utils.data.DataLoader(dataset, setup.batch, num_workers=setup.threads, **options)


# ---- The loaders: each function returns an endless iterator of batches


def torchvision(setup: Setup) -> Batches:
    from torchvision.datasets import ImageFolder

    return _forever(_data_loader(setup, ImageFolder(str(setup.photographs), _augmentation())))


def torchvision_gpu(setup: Setup) -> Batches:
    from torchvision.io import ImageReadMode, decode_jpeg, read_file
    from torchvision.transforms import v2

    class Files(torch.utils.data.Dataset):
        paths = sorted(map(str, setup.photographs.rglob("*.jpg")))

        def __len__(self):
            return len(self.paths)

        def __getitem__(self, index):
            return read_file(self.paths[index])

    loader = _data_loader(setup, Files(), collate_fn=list)
    augment = v2.Compose(
        [v2.RandomResizedCrop(SIZE, SCALE, interpolation=InterpolationMode.BICUBIC), v2.RandomHorizontalFlip()]
    )
    normalize = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    while True:
        for encoded in loader:
            images = decode_jpeg(encoded, ImageReadMode.RGB, device=setup.device)
            yield normalize(torch.stack([augment(image) for image in images]))


def shardmae(setup: Setup, *arguments: str) -> Batches:
    from pipeline.data.loader import Loader
    from pipeline.data.reader import ShardReader
    from pipeline.recipe import load_recipe

    shards = _shards(setup, *arguments)
    settings = [f"data.global_batch={setup.batch}", f"engine.micro_batch={setup.batch}", "engine.precision=fp32"]
    recipe = load_recipe("vitb16_mae", settings)
    loader = Loader(ShardReader(shards), recipe, 196, setup.device, threads=setup.threads)

    def batches() -> Batches:
        while True:
            yield loader.next().images

    return batches()


def shardmae_256(setup: Setup) -> Batches:
    return shardmae(setup, "--resize", "256")


def dali_reader(setup: Setup) -> Batches:
    from nvidia.dali import Pipeline, fn, types

    shards, on_gpu = sorted(_shards(setup).glob("*.tar")), setup.device.type == "cuda"
    pipeline = Pipeline(
        batch_size=setup.batch,
        num_threads=setup.threads,
        device_id=setup.device.index,
        prefetch_queue_depth=3 if on_gpu else 2,
        exec_dynamic=True,
    )
    crop = {"random_area": SCALE, "random_aspect_ratio": (3 / 4, 4 / 3)}
    resize = {"size": [SIZE, SIZE], "interp_type": types.INTERP_CUBIC, "antialias": True}
    with pipeline:
        encoded = fn.readers.webdataset(
            paths=[str(path) for path in shards],
            index_paths=[str(path.with_suffix(".idx")) for path in shards],
            ext=["jpg"],
            missing_component_behavior="error",
            random_shuffle=True,
            initial_fill=1024,
        )
        if on_gpu:
            images = fn.decoders.image(encoded, device="mixed", output_type=types.RGB, jpeg_fancy_upsampling=True)
            images = fn.random_resized_crop(images, **crop, **resize)
        else:
            images = fn.decoders.image_random_crop(encoded, device="cpu", output_type=types.RGB, **crop)
            images = fn.resize(images, **resize)
        images = fn.crop_mirror_normalize(
            images,
            mirror=fn.random.coin_flip(),
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[255 * value for value in MEAN],
            std=[255 * value for value in STD],
        )
        pipeline.set_outputs(images)
    pipeline.build()

    def batches() -> Batches:
        while True:
            stream = torch.cuda.current_stream(setup.device) if on_gpu else None
            yield torch.from_dlpack(pipeline.run(stream)[0].as_tensor())

    return batches()


def webdataset(setup: Setup) -> Batches:
    import webdataset

    shards = sorted(map(str, _shards(setup).glob("*.tar")))
    dataset = (
        webdataset.WebDataset(shards, resampled=True, shardshuffle=False, empty_check=False)
        .shuffle(1024)
        .decode("pil")
        .to_tuple("jpg")
        .map_tuple(_augmentation())
        .batched(setup.batch, partial=False)
    )
    return _forever(webdataset.WebLoader(dataset, batch_size=None, num_workers=setup.threads))


def litdata(setup: Setup) -> Batches:
    import litdata

    augment = _augmentation()

    class Augmented(litdata.StreamingDataset):
        def __getitem__(self, index):
            return augment(_open(super().__getitem__(index)))

    out = setup.directory / "litdata"
    litdata.optimize(
        fn=Path.read_bytes,
        inputs=sorted(setup.photographs.rglob("*.jpg")),
        output_dir=str(out),
        chunk_bytes="32MB",
        num_workers=1,
    )
    multiprocessing.set_start_method("fork", force=True)  # optimize sets it to spawn
    dataset = Augmented(str(out), shuffle=True, drop_last=True)
    return _forever(litdata.StreamingDataLoader(dataset, batch_size=setup.batch, num_workers=setup.threads))


def mosaicml_streaming(setup: Setup) -> Batches:
    import streaming

    augment = _augmentation()

    class Augmented(streaming.StreamingDataset):
        def __getitem__(self, index):
            return augment(_open(super().__getitem__(index)["image"]))

    out = setup.directory / "streaming"
    with streaming.MDSWriter(out=str(out), columns={"image": "bytes"}, size_limit=32_000_000) as writer:
        for path in sorted(setup.photographs.rglob("*.jpg")):
            writer.write({"image": path.read_bytes()})
    dataset = Augmented(local=str(out), shuffle=True, batch_size=setup.batch)
    return _forever(torch.utils.data.DataLoader(dataset, setup.batch, num_workers=setup.threads, drop_last=True))


def _open(data: bytes):
    import io

    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


TORCHVISION, DALI = "torchvision + DataLoader", "DALI readers.webdataset"
LOADERS = {
    TORCHVISION: torchvision,
    DALI: dali_reader,
    "shardmae, originals": shardmae,
    "shardmae, --resize 256": shardmae_256,
    "webdataset + torchvision": webdataset,
    "litdata + torchvision": litdata,
    "mosaicml-streaming + torchvision": mosaicml_streaming,
}
GPU_LOADERS = {
    TORCHVISION: torchvision_gpu,
    DALI: dali_reader,
    "shardmae, originals": shardmae,
    "shardmae, --resize 256": shardmae_256,
}

if __name__ == "__main__":
    main()
