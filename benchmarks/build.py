"""Compare the shard builder and `adopt` with tar, webdataset, wds2idx, libjpeg-turbo and Pillow on the same files.

    python benchmarks/build.py                   (IMAGENET_SAMPLE_DIR: a folder of JPEG photographs)
    python benchmarks/build.py --rounds 5 --copies 16 --directory /scratch
    python benchmarks/build.py --only adopt
    python benchmarks/build.py --only plan

In each round every contestant runs once, in turn, so that other load on the machine slows down all of them;
the table has each contestant's median over the rounds. The builder's time is that of the whole command:
start-up, planning, checksums, index, card and manifest. The time of the same command for 50 photographs
(start-up, imports, contact sheet) is subtracted, because a real data set has a million. Files are read from
the page cache. The builder alone syncs its output to disk, so tar has a second row with `sync`. The row
"read, sha256, write" does only that: it is the lower bound for a set with checksums. CPU seconds (user and
system, all processes) are given because they depend less on other load than wall seconds.
"""

import argparse
import hashlib
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROCESSES = 2
SHARD_BYTES = 32_000_000
PLANNED = 14_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--copies", type=int, default=16, help="copies of each photograph; decoding uses a quarter of them"
    )
    parser.add_argument("--directory", type=Path, help="working directory (default: the system's temporary directory)")
    parser.add_argument("--only", choices=("copy", "decode", "resize", "adopt", "plan"))
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    if options.only != "plan":
        with tempfile.TemporaryDirectory(dir=options.directory) as name:
            _compare(Path(name), options)
    if options.only in (None, "plan"):
        _plan()


def _compare(directory: Path, options) -> None:
    many = _copy_photographs(directory / "many", options.copies)
    few = _copy_photographs(directory / "few", max(1, options.copies // 4))
    fifty = directory / "fifty"
    fifty.mkdir()
    for path in sorted(few.iterdir())[:50]:
        (fifty / path.name).write_bytes(path.read_bytes())
    many_tars, few_tars, fifty_tars = (_write_tars(folder) for folder in (many, few, fifty))
    amounts = {folder: [path.stat().st_size for path in folder.iterdir()] for folder in (many, few, fifty)}
    amounts |= {many_tars: amounts[many], few_tars: amounts[few]}
    out = directory / "out"
    contestants: dict[str, list[tuple[str, Path, Callable[[Path, Path], None]]]] = {
        "copy": [
            ("tar -cf", many, lambda source, out: _run("tar", "-cf", out / "x.tar", source)),
            ("tar -cf, then sync", many, _tar_and_sync),
            ("webdataset ShardWriter loop", many, _shard_writer),
            ("read, sha256, write", many, _in_parallel(_copy)),
            ("builder, --check structure", many, _builder("--check", "structure")),
        ],
        "decode": [
            ("libjpeg-turbo decoding to RGB", few, _in_parallel(_decode)),
            ("builder, --check decode", few, _builder()),
        ],
        "resize": [
            ("Pillow loop, Lanczos", few, _in_parallel(_pillow("LANCZOS"))),
            ("Pillow loop, bilinear", few, _in_parallel(_pillow("BILINEAR"))),
            ("builder, --resize 256", few, _builder("--resize", "256")),
        ],
        "adopt, structure": [
            ("read", many_tars, _in_parallel(_read)),
            ("read, sha256", many_tars, _in_parallel(_read_and_hash)),
            ("wds2idx", many_tars, _in_parallel(_wds2idx)),
            ("adopt, --check structure", many_tars, _adopt("--check", "structure")),
        ],
        "adopt, decode": [
            ("libjpeg-turbo decoding to RGB", few, _in_parallel(_decode)),
            ("adopt, --check decode", few_tars, _adopt()),
        ],
    }
    print(
        "\n| what | processes | images/s | MB/s read | images/CPU s | builder's rate: wall, CPU |"
        "\n| --- | --- | --- | --- | --- | --- |"
    )
    for group, rows in contestants.items():
        if options.only not in (None, group.partition(",")[0]):
            continue
        start_up = (f"{rows[-1][0]}, 50 images", fifty_tars if group.startswith("adopt") else fifty, rows[-1][2])
        seconds: dict[str, list[float]] = {name: [] for name, _, _ in (*rows, start_up)}
        cpu: dict[str, list[float]] = {name: [] for name in seconds}
        for _ in range(options.rounds):
            for name, source, run in (*rows, start_up):
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir()
                start, start_cpu = time.perf_counter(), _cpu_seconds()
                run(source, out)
                seconds[name].append(time.perf_counter() - start)
                cpu[name].append(_cpu_seconds() - start_cpu)
        for times in (seconds, cpu):
            start_up_time = statistics.median(times[start_up[0]])
            times[rows[-1][0]] = [value - start_up_time for value in times[rows[-1][0]]]
        ours, ours_cpu = (statistics.median(times[rows[-1][0]]) for times in (seconds, cpu))
        for name, source, _ in rows:
            files = amounts[source][50 if name == rows[-1][0] else 0 :]
            median = statistics.median(seconds[name])
            rate, megabytes = len(files) / median, sum(files) / 1e6 / median
            median_cpu = statistics.median(cpu[name])
            ratio = f"{median / ours:.2f} x, {median_cpu / ours_cpu:.2f} x" if name != rows[-1][0] else ""
            processes = 1 if name.startswith(("tar", "webdataset")) else PROCESSES
            per_cpu = len(files) / median_cpu
            print(f"| {name} | {processes} | {rate:,.0f} | {megabytes:,.0f} | {per_cpu:,.0f} | {ratio} |", flush=True)


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _copy_photographs(folder: Path, copies: int) -> Path:
    source = os.environ.get("IMAGENET_SAMPLE_DIR")
    if not source:
        sys.exit("set IMAGENET_SAMPLE_DIR to a folder of JPEG photographs")
    folder.mkdir()
    for path in sorted(Path(source).iterdir()):
        data = path.read_bytes()
        for copy in range(copies):
            (folder / f"{copy}_{path.name}").write_bytes(data)
    return folder


def _write_tars(folder: Path) -> Path:
    """Write the files of a folder into tars of 32 MB, with labels."""
    import webdataset

    target = folder.with_name(f"{folder.name}-tars")
    target.mkdir()
    with webdataset.ShardWriter(str(target / "%06d.tar"), maxsize=SHARD_BYTES, verbose=0) as sink:
        for number, path in enumerate(sorted(folder.iterdir())):
            sink.write({"__key__": f"{number:08d}", "jpg": path.read_bytes(), "cls": number % 1000})
    return target


def _run(*command) -> None:
    subprocess.run([str(word) for word in command], check=True, capture_output=True)


def _builder(*arguments: str) -> Callable[[Path, Path], None]:
    def run(source: Path, out: Path) -> None:
        command = ("-m", "data_prep", "folder", source, out / "set", "--workers", PROCESSES)
        _run(sys.executable, *command, "--shard-size", "32MB", *arguments)

    return run


def _adopt(*arguments: str) -> Callable[[Path, Path], None]:
    def run(source: Path, out: Path) -> None:
        for path in source.iterdir():
            os.link(path, out / path.name)  # instead of a copy, since no tar is modified
        _run(sys.executable, "-m", "data_prep", "adopt", out, "--workers", PROCESSES, *arguments)

    return run


def _tar_and_sync(source: Path, out: Path) -> None:
    _run("tar", "-cf", out / "x.tar", source)
    _run("sync", out / "x.tar")


def _shard_writer(source: Path, out: Path) -> None:
    import webdataset

    with webdataset.ShardWriter(str(out / "%06d.tar"), maxsize=SHARD_BYTES, verbose=0) as sink:
        for path in sorted(source.iterdir()):
            sink.write({"__key__": path.stem.replace(".", "_"), "jpg": path.read_bytes()})


def _in_parallel(process_files: Callable[[list[Path], Path], None]) -> Callable[[Path, Path], None]:
    """Return a function that splits the files among PROCESSES processes."""

    def run(source: Path, out: Path) -> None:
        paths = sorted(source.iterdir())
        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=process_files, args=(paths[i::PROCESSES], out)) for i in range(PROCESSES)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()

    return run


def _copy(paths: list[Path], out: Path) -> None:
    """Copy files into files of 32 MB without checks, headers or an index."""
    digest, written = hashlib.sha256(), SHARD_BYTES
    for number, path in enumerate(map(str, paths)):
        if written >= SHARD_BYTES:
            target, written = os.open(out / f"{os.getpid()}-{number}", os.O_WRONLY | os.O_CREAT), 0
        source = os.open(path, os.O_RDONLY)
        data = os.read(source, os.fstat(source).st_size)
        os.close(source)
        digest.update(data)
        written += os.write(target, data)


def _read(paths: list[Path], _: Path, digest=None) -> None:
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while data := file.read(4 << 20):
                if digest is not None:
                    digest.update(data)


def _read_and_hash(paths: list[Path], out: Path) -> None:
    _read(paths, out, hashlib.sha256())


def _wds2idx(paths: list[Path], out: Path) -> None:
    from wds2idx import IndexCreator  # of DALI

    for path in paths:
        with IndexCreator(str(path), str(out / f"{path.stem}.idx"), verbose=False) as creator:
            creator.create_index()


def _decode(paths: list[Path], _: Path) -> None:
    import simplejpeg

    for path in paths:
        simplejpeg.decode_jpeg(path.read_bytes(), "RGB")


def _pillow(kernel: str) -> Callable[[list[Path], Path], None]:
    def resize_files(paths: list[Path], out: Path) -> None:
        from PIL import Image

        for path in paths:
            image = Image.open(path).convert("RGB")
            scale = 256 / min(image.size)
            if scale < 1:
                size = round(image.width * scale), round(image.height * scale)
                image = image.resize(size, Image.Resampling[kernel])
            image.save(out / path.name, "JPEG", quality=95)

    return resize_files


def _plan() -> None:
    """Measure planning in a separate process, so that the peak memory is that of the plan."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_plan_synthetic)
    process.start()
    process.join()


def _plan_synthetic() -> None:
    from data_prep.shard_plan import ShardPlan, ShardSize

    start = time.perf_counter()
    plan = ShardPlan(_synthetic(), seed=0, shard_size=ShardSize(bytes=1 << 30))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"\nplanned {plan.num_inputs:,} inputs in {seconds:.0f} s, peak {peak:.2f} GB")


def _synthetic() -> Iterator:
    """Yield samples like those of ImageNet-21k, one tar per synset."""
    from data_prep.sources.sample import Location, Sample, Storage

    for number in range(PLANNED):
        wnid = f"n{number // 650:08d}"
        key = f"{wnid}_{number}"
        size = 90_000 + number * 7919 % 40_000
        location = Location(f"{wnid}.tar", f"{key}.JPEG", number % 650 * 110_000, size, Storage.STORED)
        yield Sample(key, location, number // 650)


if __name__ == "__main__":
    main()
