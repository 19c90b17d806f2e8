"""WebDataset tars in the layouts in which they occur, written by their own tools or as those document it."""

import io
import json
import subprocess
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import webdataset
from oddities import oddities
from published import tar_of, write_tree


@dataclass
class Layout:
    """What a folder of tars holds.

    `valid`: image and class name of the usable samples by key, in any order; `reencoded`: keys of samples that must be
    re-encoded; `rejected`: number of quarantine entries of other inputs by reason; `options`: of both commands.
    """

    folder: Path
    valid: dict[str, tuple[bytes, str | None]] = field(default_factory=dict)
    reencoded: set[str] = field(default_factory=set)
    rejected: Counter = field(default_factory=Counter)
    options: tuple[str, ...] = ()


def tar(*arguments, folder: Path) -> None:
    """Run GNU tar in a folder."""
    subprocess.run(["tar", *map(str, arguments)], check=True, cwd=folder)


def add_samples(layout: Layout, keys: list[str], photographs: list[bytes], classes: list[str | None]) -> None:
    layout.valid |= dict(zip(keys, zip(photographs, classes, strict=False), strict=False))


def shard_writer(folder: Path, photographs: list[bytes]) -> Layout:
    """webdataset's ShardWriter, which writes PAX headers."""
    layout = Layout(folder)
    with webdataset.ShardWriter(str(folder / "train-%04d.tar"), maxcount=4, verbose=0) as sink:
        for number, data in enumerate(photographs[:10]):
            key = f"sample{number:06d}"
            sink.write(
                {"__key__": key, "jpg": data, "cls": number % 3, "json": {"id": number}, "txt": f"photo {number}"}
            )
            layout.valid[key] = data, str(number % 3)
    assert b"PaxHeader" in (folder / "train-0000.tar").read_bytes()
    return layout


def sa_1b(folder: Path, photographs: list[bytes]) -> Layout:
    """`tar cf x.tar folder/` and `tar cf x.tar .`: directory entries, files in the folder's order, no labels."""
    layout = Layout(folder)
    for number, prefix in enumerate(("sa_000000", ".")):
        below = folder / "unpacked" / f"sa_{number:06d}"
        for i in range(4 * number, 4 * number + 4):
            write_tree(below, {f"sa_{i}.jpg": photographs[i], f"sa_{i}.json": json.dumps({"annotations": []})})
            layout.valid[f"{prefix}/sa_{i}"] = photographs[i], None
    tar("cf", folder / "sa_000000.tar", "sa_000000/", folder=folder / "unpacked")
    tar("cf", folder / "sa_000001.tar", ".", folder=folder / "unpacked" / "sa_000001")
    return layout


def img2dataset(folder: Path, photographs: list[bytes]) -> Layout:
    """img2dataset's output format webdataset: KEY.jpg, KEY.json, KEY.txt; a parquet file and statistics per tar."""
    layout = Layout(folder)
    for shard in range(2):
        with open(folder / f"{shard:05d}.tar", "wb") as file, webdataset.TarWriter(file) as sink:
            for i in range(5):
                key, data = f"{shard:05d}{i:04d}", photographs[5 * shard + i]
                metadata = {"url": f"https://x.org/{i}.jpg", "caption": "a photo", "key": key, "status": "success"}
                sink.write({"__key__": key, "jpg": data, "json": metadata, "txt": "a photo"})
                layout.valid[key] = data, None
        write_tree(folder, {f"{shard:05d}_stats.json": "{}", f"{shard:05d}.parquet": b"PAR1"})
    return layout


def timm(folder: Path, photographs: list[bytes]) -> Layout:
    """timm's ImageNet tars: KEY.jpg and KEY.cls, the class as a number."""
    layout = Layout(folder)
    for shard in range(2):
        files = {}
        for i in range(5):
            key, label = f"n0144{shard}764_{i}", 7 * shard + i
            files |= {f"{key}.jpg": photographs[5 * shard + i], f"{key}.cls": str(label).encode()}
            layout.valid[key] = photographs[5 * shard + i], str(label)
        (folder / f"imagenet1k-train-{shard:04d}.tar").write_bytes(tar_of(files))
    return layout


def long_names(folder: Path, photographs: list[bytes]) -> Layout:
    """Names that need extensions: GNU's, PAX's and USTAR's prefix; and those that an index cannot hold."""
    layout = Layout(folder)
    names = {"gnu": "g" * 150, "posix": "p" * 150, "ustar": "u" * 90}
    for number, (format_, name) in enumerate(names.items()):
        below = write_tree(folder / "unpacked" / format_, {f"{'d' * 60}/{name}.jpg": photographs[number]})
        tar(f"--format={format_}", "-cf", folder / f"{format_}.tar", "d" * 60, folder=below)
        layout.valid[f"{'d' * 60}/{name}"] = photographs[number], None
    for number, format_ in enumerate(("gnu", "posix"), 3):
        below = write_tree(folder / "unpacked" / f"odd-{format_}", {f"größe 100%/é {number}.jpg": photographs[number]})
        tar(f"--format={format_}", "-cf", folder / f"odd-{format_}.tar", "größe 100%", folder=below)
        layout.valid[f"gr%C3%B6%C3%9Fe%20100%25/%C3%A9%20{number}"] = photographs[number], None
    return layout


def mixed_formats(folder: Path, photographs: list[bytes]) -> Layout:
    """All formats under any ending and in any case, with damaged files between them."""
    layout, files = Layout(folder), {}
    for name, (data, result) in oddities(photographs[0]).items():
        ending = {"png": "png", "webp": "WebP"}.get(name, "JPEG")
        files |= {f"{name}.{ending}": data, f"{name}.CLS": b"3\n"}
        if result == "same" or result == "repaired: broken_exif":
            layout.valid[name] = data, "3"
        elif result.startswith("repaired"):
            layout.reencoded.add(name)
        else:
            layout.rejected[result.removeprefix("quarantined: ")] += 1
    files |= {"upper.JPG": photographs[1], "upper.cls": b"0"}  # content decides
    files |= {"two.png": photographs[3], "two.jpg": photographs[2], "two.cls": b"1", "two.npy": b"array"}
    files |= {"text.txt": b"no image", "text.cls": b"1", "bad.jpg": photographs[4], "none.jpg": photographs[5]}
    files |= {"bad.cls": b"-1", "README": b"", "__meta__/x.json": b"{}"}
    layout.valid |= {"upper": (photographs[1], "0"), "two": (photographs[2], "1")}
    layout.rejected += Counter(no_image=1, no_label=2, no_key=1, metadata=1)
    (folder / "mixed.tar").write_bytes(tar_of(files))
    return layout


def duplicate_keys(folder: Path, photographs: list[bytes]) -> Layout:
    """A key twice in one tar, side by side and far apart, and keys that another tar repeats."""
    layout = Layout(folder, rejected=Counter(duplicate_key=3))
    files = {"a.jpg": photographs[0], "b.jpg": photographs[1]}
    with tarfile.open(folder / "0.tar", "w") as archive:
        for name, data in (*files.items(), ("b.jpg", photographs[2]), ("c.jpg", photographs[3]), *files.items()):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    (folder / "1.tar").write_bytes(tar_of({"a.jpg": photographs[4], "d.jpg": photographs[5]}))
    add_samples(layout, ["0/a", "0/b", "0/c", "1/a", "1/d"], [*photographs[:2], *photographs[3:6]], [None] * 5)
    return layout


def truncated(folder: Path, photographs: list[bytes]) -> Layout:
    """The last tar ends inside a member, as after a killed download; another lacks its end mark."""
    layout = Layout(folder, rejected=Counter(damaged_tar=2))
    for number in range(3):
        chosen = photographs[4 * number : 4 * number + 4]
        keys = [f"{4 * number + i:04d}" for i in range(4)]
        data = tar_of({f"{key}.jpg": image for key, image in zip(keys, chosen, strict=True)})
        if number == 1:
            data = data.rstrip(b"\0")
            data += bytes(-len(data) % 512)
        if number == 2:
            data = data[: data.index(b"0011.jpg") + 900]
            keys.pop()
        (folder / f"{number}.tar").write_bytes(data)
        add_samples(layout, keys, chosen, [None] * 4)
    return layout


def empty_tars(folder: Path, photographs: list[bytes]) -> Layout:
    """A tar without members, one of zero bytes, and one whose only sample is unusable, first in the folder."""
    layout = Layout(folder, rejected=Counter(empty_tar=2, empty=1))
    tar("cf", "0-none.tar", "-T", "/dev/null", folder=folder)
    (folder / "1-zero.tar").write_bytes(b"")
    (folder / "2-bad.tar").write_bytes(tar_of({"bad.jpg": b"", "bad.cls": b"ant"}))
    (folder / "3.tar").write_bytes(
        tar_of({"a.jpg": photographs[0], "a.cls": b"bee", "b.jpg": photographs[1], "b.cls": b"ant"})
    )
    layout.valid |= {"a": (photographs[0], "bee"), "b": (photographs[1], "ant")}
    return layout


def macos(folder: Path, photographs: list[bytes]) -> Layout:
    """macOS's tar stores a `._` member before each file, and Finder a `._` file beside a tar."""
    layout, files = Layout(folder, rejected=Counter(hidden=10)), {"set/._.DS_Store": b"x", "set/.DS_Store": b"x"}
    for i in range(4):
        files |= {f"set/._{i}.jpg": b"\0\5\x16\7", f"set/{i}.jpg": photographs[i]}
        files |= {f"set/._{i}.cls": b"\0\5\x16\7", f"set/{i}.cls": b"%d" % i}
        layout.valid[f"set/{i}"] = photographs[i], str(i)
    (folder / "x.tar").write_bytes(tar_of(files))
    (folder / "._x.tar").write_bytes(b"\0\5\x16\7")
    return layout


def class_folders(folder: Path, photographs: list[bytes]) -> Layout:
    """`tar cf x.tar ant bee`: the folder is the label."""
    layout = Layout(folder)
    for number in range(2):
        below = folder / "unpacked" / str(number)
        for i in range(4 * number, 4 * number + 4):
            name = ("ant", "bee")[i % 2]
            write_tree(below, {f"{name}/{i}.jpg": photographs[i]})
            layout.valid[f"{name}/{i}"] = photographs[i], name
        tar("cf", folder / f"{number}.tar", "ant", "bee", folder=below)
    return layout


def json_labels(folder: Path, photographs: list[bytes]) -> Layout:
    """The label is a key of the json, in a set whose cls files mean something else."""
    layout = Layout(folder, options=("--label-key", "species"), rejected=Counter(no_label=1))
    files = {}
    for i, species in enumerate(("bee", "ant", "bee", None)):
        files |= {f"{i}.jpg": photographs[i], f"{i}.cls": b"0", f"{i}.json": json.dumps({"species": species}).encode()}
        if species:
            layout.valid[str(i)] = photographs[i], species
    (folder / "x.tar").write_bytes(tar_of(files))
    return layout


def compressed(folder: Path, photographs: list[bytes]) -> Layout:
    layout = Layout(folder)
    for i in range(4):
        write_tree(folder / "unpacked", {f"{i}.jpg": photographs[i], f"{i}.cls": str(i % 2)})
        layout.valid[str(i)] = photographs[i], str(i % 2)
    tar("czf", folder / "x.tar.gz", "--transform=s,^./,,", ".", folder=folder / "unpacked")
    return layout


LAYOUTS: dict[str, Callable[[Path, list[bytes]], Layout]] = {
    make.__name__: make
    for make in (
        *(shard_writer, sa_1b, img2dataset, timm, long_names, mixed_formats, duplicate_keys),
        *(truncated, empty_tars, macos, class_folders, json_labels),
    )
}
"""All layouts that can be read in place."""
