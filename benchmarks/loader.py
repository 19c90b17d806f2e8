"""Compare the loader with torchvision, DALI's own reader, webdataset, litdata and mosaicml-streaming.

    python benchmarks/loader.py                  (IMAGENET_SAMPLE_DIR: a folder of JPEG photographs)
    python benchmarks/loader.py --rounds 7 --seconds 10 --directory /scratch
    python benchmarks/loader.py --only torchvision shardmae --packages DIR

Every loader reads the same JPEG photographs and returns batches of MAE's augmentation in memory, on the CPU:
RandomResizedCrop 224, scale (0.2, 1), bicubic and antialiased, flip, normalized float32. Every loader has one
decoding thread or worker process per core (--threads; the process is bound to that many cores). In each round
every loader runs once, in turn, so that other load on the machine slows down all of them; the first batches
of a turn are a warm-up. The table has each loader's median over the rounds, and the median of its per-round
ratio to torchvision and to DALI's reader.

litdata and mosaicml-streaming require versions of other packages that conflict with the project's. Install
them into a separate folder: pip install --target DIR --no-deps litdata mosaicml-streaming (and their
dependencies), then pass --packages DIR. Loaders that cannot be imported are skipped with a message.
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

import psutil
import torch
from torchvision import transforms
from torchvision.transforms import InterpolationMode

BATCH = 64
SIZE = 224
SCALE = (0.2, 1.0)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU = torch.device("cpu")

Batches = Iterator[torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="duration of a turn")
    parser.add_argument("--threads", type=int, default=2)
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
    loaders = {}
    for name, start in LOADERS.items():
        if options.only and not any(word in name for word in options.only):
            continue
        try:
            loaders[name] = start(directory, photographs, options.threads)
        except ImportError as error:
            print(f"skipped: {name}: {error}", flush=True)
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    costs: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(options.rounds):
        for name, batches in loaders.items():
            rate, cost = _measure_turn(batches, options.seconds)
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
    _compare_pixels(_shards(directory, photographs))


def _compare_pixels(shards: Path) -> None:
    """Compare our pixels with those of torchvision on a Pillow image, with the same boxes and flips."""
    import numpy as np
    from torchvision.transforms.functional import hflip, resized_crop

    from pipeline.data.loader import BatchBuilder, Loader
    from pipeline.data.reader import ShardReader
    from pipeline.data.undecodable import UndecodableSamples
    from pipeline.recipe import load_recipe

    settings = [f"data.global_batch={BATCH}", f"engine.micro_batch={BATCH}"]
    recipe = load_recipe("vitb16_mae", [*settings, "data.mean=[0, 0, 0]", "data.std=[1, 1, 1]"])
    reader = ShardReader(shards)
    builder = BatchBuilder(reader, recipe, 1, UndecodableSamples(reader, 0))
    loader = Loader(ShardReader(shards), recipe, 1, CPU)
    differences = []
    for _ in range(4):
        batch = loader.next()
        places = zip(batch.locations.shard, batch.locations.index_in_shard, strict=True)
        specs = builder.build(batch.locations, [reader.read(*place) for place in places])
        for row, image in enumerate(map(_open, (encoded.tobytes() for encoded in specs.encoded))):
            x, y, w, h = specs.boxes[row, 0].tolist()
            crop = resized_crop(image, y, x, h, w, [SIZE, SIZE], InterpolationMode.BICUBIC)
            expected = np.asarray(hflip(crop) if specs.flips[row, 0] else crop, np.float32)
            differences.append(np.abs(batch.images[row].permute(1, 2, 0).numpy() * 255 - expected).mean())
    loader.close()
    print(
        f"\npixels: {np.mean(differences):.3f} of 255 levels from torchvision's on the same boxes, mean of "
        f"{len(differences)} photographs; at most {max(differences):.3f}"
    )


def _measure_turn(batches: Batches, seconds: float) -> tuple[float, float]:
    """Return images per second and CPU milliseconds per image. Batches prefetched before the turn do not count."""
    start = time.perf_counter()
    while time.perf_counter() - start < seconds / 4:
        next(batches)
    images, start, start_cpu = 0, time.perf_counter(), _cpu_seconds()
    while time.perf_counter() - start < seconds:
        images += len(next(batches))
    return images / (time.perf_counter() - start), 1000 * (_cpu_seconds() - start_cpu) / images


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


def _shards(directory: Path, photographs: Path, *arguments: str) -> Path:
    out = directory / "_".join(["shards", *arguments]).replace("-", "")
    if not out.exists():
        command = [sys.executable, "-m", "data_prep", "folder", photographs, out, "--shard-size", "32MB"]
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


# ---- The loaders: each function returns an endless iterator of batches


def torchvision(directory: Path, photographs: Path, threads: int) -> Batches:
    from torchvision.datasets import ImageFolder

    return _forever(
        torch.utils.data.DataLoader(
            ImageFolder(str(photographs), _augmentation()),
            BATCH,
            shuffle=True,
            num_workers=threads,
            drop_last=True,
            persistent_workers=True,
        )
    )


def shardmae(directory: Path, photographs: Path, threads: int, *arguments: str) -> Batches:
    from pipeline.data.loader import Loader
    from pipeline.data.reader import ShardReader
    from pipeline.recipe import load_recipe

    shards = _shards(directory, photographs, *arguments)
    settings = [f"data.global_batch={BATCH}", f"engine.micro_batch={BATCH}", "engine.precision=fp32"]
    recipe = load_recipe("vitb16_mae", settings)
    loader = Loader(ShardReader(shards), recipe, 196, CPU, threads=threads)

    def batches() -> Batches:
        while True:
            yield loader.next().images

    return batches()


def shardmae_256(directory: Path, photographs: Path, threads: int) -> Batches:
    return shardmae(directory, photographs, threads, "--resize", "256")


def dali_reader(directory: Path, photographs: Path, threads: int) -> Batches:
    from nvidia.dali import Pipeline, fn, types

    shards = sorted(_shards(directory, photographs).glob("*.tar"))
    pipeline = Pipeline(batch_size=BATCH, num_threads=threads, device_id=None, prefetch_queue_depth=2)
    with pipeline:
        encoded = fn.readers.webdataset(
            paths=[str(path) for path in shards],
            index_paths=[str(path.with_suffix(".idx")) for path in shards],
            ext=["jpg"],
            missing_component_behavior="error",
            random_shuffle=True,
            initial_fill=1024,
        )
        images = fn.decoders.image_random_crop(
            encoded, device="cpu", output_type=types.RGB, random_area=SCALE, random_aspect_ratio=(3 / 4, 4 / 3)
        )
        images = fn.resize(images, size=[SIZE, SIZE], interp_type=types.INTERP_CUBIC, antialias=True)
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
            yield torch.from_dlpack(pipeline.run()[0].as_tensor())

    return batches()


def webdataset(directory: Path, photographs: Path, threads: int) -> Batches:
    import webdataset

    shards = sorted(map(str, _shards(directory, photographs).glob("*.tar")))
    dataset = (
        webdataset.WebDataset(shards, resampled=True, shardshuffle=False, empty_check=False)
        .shuffle(1024)
        .decode("pil")
        .to_tuple("jpg")
        .map_tuple(_augmentation())
        .batched(BATCH, partial=False)
    )
    return _forever(webdataset.WebLoader(dataset, batch_size=None, num_workers=threads))


def litdata(directory: Path, photographs: Path, threads: int) -> Batches:
    import litdata

    augment = _augmentation()

    class Augmented(litdata.StreamingDataset):
        def __getitem__(self, index):
            return augment(_open(super().__getitem__(index)))

    out = directory / "litdata"
    litdata.optimize(
        fn=Path.read_bytes,
        inputs=sorted(photographs.rglob("*.jpg")),
        output_dir=str(out),
        chunk_bytes="32MB",
        num_workers=1,
    )
    multiprocessing.set_start_method("fork", force=True)  # optimize sets it to spawn
    dataset = Augmented(str(out), shuffle=True, drop_last=True)
    return _forever(litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=threads))


def mosaicml_streaming(directory: Path, photographs: Path, threads: int) -> Batches:
    import streaming

    augment = _augmentation()

    class Augmented(streaming.StreamingDataset):
        def __getitem__(self, index):
            return augment(_open(super().__getitem__(index)["image"]))

    out = directory / "streaming"
    with streaming.MDSWriter(out=str(out), columns={"image": "bytes"}, size_limit=32_000_000) as writer:
        for path in sorted(photographs.rglob("*.jpg")):
            writer.write({"image": path.read_bytes()})
    dataset = Augmented(local=str(out), shuffle=True, batch_size=BATCH)
    return _forever(torch.utils.data.DataLoader(dataset, BATCH, num_workers=threads, drop_last=True))


def _open(data: bytes):
    import io

    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


TORCHVISION, DALI = "torchvision ImageFolder + DataLoader", "DALI readers.webdataset"
LOADERS = {
    TORCHVISION: torchvision,
    DALI: dali_reader,
    "shardmae, originals": shardmae,
    "shardmae, --resize 256": shardmae_256,
    "webdataset + torchvision": webdataset,
    "litdata + torchvision": litdata,
    "mosaicml-streaming + torchvision": mosaicml_streaming,
}

if __name__ == "__main__":
    main()
