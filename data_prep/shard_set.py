"""A shard set on disk: its names, its manifest, its indexes. Nothing else in the project knows the format.

    imagenet-train-000000.tar   USTAR: for each sample KEY.jpg, then KEY.cls and KEY.json where there are any
    imagenet-train-000000.idx   DALI's index: "v1.2 SAMPLES", then per sample "EXTENSION OFFSET SIZE NAME ..."
    manifest.json               what the set is; sizes and sha256 of every shard and index
    quarantine.jsonl            every input that is not in the shards, and why
    wids.json                   the list of shards as the wids library reads it
    card.md, card.json, contact_sheet.png   counts and pictures, for people

Invariant: a directory with a readable manifest.json is a whole set. The manifest is written last and
atomically, and whatever differs from what it says is an error that names the file. Everything read here is
treated as foreign: a damaged file raises ShardSetError, never anything else.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import UserError

FORMAT = "shardmae-shard-set"
FORMAT_VERSION = 1
MANIFEST, QUARANTINE, WIDS = "manifest.json", "quarantine.jsonl", "wids.json"
CARD, CARD_JSON, CONTACT_SHEET = "card.md", "card.json", "contact_sheet.png"
BUILD_DIRECTORY = ".build"
"""Where an unfinished build keeps its state; a whole set has none."""

_SHARD_NAME = re.compile(r"[a-z0-9]+-[A-Za-z0-9_]+-[0-9]{6,9}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MANIFEST_LIMIT = 1 << 30  # bytes; a million shards need a quarter of it


class ShardSetError(UserError):
    """A shard set that is missing, unfinished or damaged: one line with what, where and what to do."""


@dataclass(frozen=True)
class Shard:
    """What the manifest says about one shard. Sizes in bytes."""

    name: str
    samples: int
    bytes: int
    sha256: str
    index_bytes: int
    index_sha256: str


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says.

    `classes` is empty when the set has no labels; otherwise KEY.cls holds a position in it. `class_names` are
    readable names, position by position, or empty. `inputs` counts everything the source listed, so that
    `inputs == num_samples + quarantined`. `repairs` counts samples by what was mended in them.
    """

    format_version: int
    source: str
    split: str
    seed: int
    options: Mapping[str, Any]
    plan_sha256: str
    inputs: int
    quarantined: int
    repairs: Mapping[str, int]
    classes: tuple[str, ...]
    class_names: tuple[str, ...]
    shards: tuple[Shard, ...] = field(repr=False)

    @property
    def num_samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Of all tar files."""
        return sum(shard.bytes for shard in self.shards)


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples' files with one extension lie in a tar, in tar order.

    offsets, sizes: int64 (n,), in bytes; the file of sample i is tar[offsets[i] : offsets[i] + sizes[i]].
    """

    keys: list[str]
    offsets: np.ndarray
    sizes: np.ndarray


def shard_name(source: str, split: str, number: int) -> str:
    return f"{source}-{split}-{number:06d}"


def tar_path(directory: str | os.PathLike, shard: Shard | str) -> Path:
    return Path(directory) / f"{shard if isinstance(shard, str) else shard.name}.tar"


def idx_path(directory: str | os.PathLike, shard: Shard | str) -> Path:
    return Path(directory) / f"{shard if isinstance(shard, str) else shard.name}.idx"


def write_manifest(directory: str | os.PathLike, manifest: Manifest) -> None:
    """Makes the set whole. To be called last."""
    document = {"format": FORMAT, **asdict(manifest), "samples": manifest.num_samples}
    store(directory)  # the shards' names are on the disk before the manifest's
    write_atomically(Path(directory) / MANIFEST, (json.dumps(document, indent=1) + "\n").encode())
    store(directory)


def store(path: str | os.PathLike) -> None:
    """Waits until a file's content, or a directory's names, are on the disk, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def remove_leftovers(directory: Path, process: int | str = "*") -> None:
    """Temporary files of a process that was killed, or of any."""
    for pattern in (f".*.{process}.tmp", f"{BUILD_DIRECTORY}/*.{process}.tmp"):
        for path in directory.glob(pattern):
            path.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes, stored: bool = True) -> None:
    """Under its name there is either the whole of `data` or what was there before. stored: also after a power
    cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            if stored:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_manifest(directory: str | os.PathLike) -> Manifest:
    """The manifest of the set in `directory`.

    Raises ShardSetError: no such directory, no whole set in it, or a manifest that is damaged or of another
    version.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    if not directory.is_dir():
        what = "is a file, not the directory of a shard set" if directory.exists() else "does not exist"
        raise ShardSetError(
            f"{directory} {what}; `python -m data_prep folder IMAGES OUT` makes a shard set OUT"
        )
    try:
        with open(path, "rb") as file:
            data = file.read(_MANIFEST_LIMIT + 1)
    except FileNotFoundError:
        if (directory / BUILD_DIRECTORY).is_dir():
            raise ShardSetError(
                f"{directory} is an unfinished shard set (no {MANIFEST}): the `python -m data_prep` "
                "command that began it, run again, finishes it"
            ) from None
        raise ShardSetError(
            f"{directory} is no shard set (no {MANIFEST}); where it holds images, "
            f"`python -m data_prep folder {directory} OUT` makes a shard set OUT of them"
        ) from None
    except OSError as error:
        raise ShardSetError(f"{path} can't be read: {error.strerror}") from None
    return parse_manifest(data, path)


def parse_manifest(data: bytes, where: str | os.PathLike = MANIFEST) -> Manifest:
    """`where` is for the messages. Raises ShardSetError."""
    if len(data) > _MANIFEST_LIMIT:
        raise ShardSetError(f"{where} is larger than {_MANIFEST_LIMIT:,} bytes: it is no manifest")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise _damaged(where, "no JSON") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ShardSetError(f"{where} is no manifest of a shard set (its 'format' is not {FORMAT!r})")
    version = document.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise ShardSetError(
            f"{where} has format version {str(version)[:20]}, this program reads version {FORMAT_VERSION}: "
            "build the set again, or use the ShardMAE that built it"
        )
    fields = _Fields(document, str(where))
    shards = document.get("shards")
    if not isinstance(shards, list) or not shards:
        raise _damaged(where, "'shards' must be a list with at least one shard")
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        source=fields.text("source"),
        split=fields.text("split"),
        seed=fields.integer("seed"),
        options=fields.mapping("options"),
        plan_sha256=fields.digest("plan_sha256"),
        inputs=fields.integer("inputs"),
        quarantined=fields.integer("quarantined"),
        repairs=fields.mapping("repairs"),
        classes=fields.names("classes"),
        class_names=fields.names("class_names"),
        shards=tuple(_shard(entry, number, str(where)) for number, entry in enumerate(shards)),
    )
    if len({shard.name for shard in manifest.shards}) != len(manifest.shards):
        raise _damaged(where, "a shard is listed twice")
    if document.get("samples") != manifest.num_samples:
        raise _damaged(where, "'samples' is not the sum over the shards")
    return manifest


def _damaged(where: str | os.PathLike, what: str) -> ShardSetError:
    return ShardSetError(f"{where} is damaged ({what}): restore the file or build the set again")


def _shard(entry: object, number: int, where: str) -> Shard:
    place = f"{where}, shard {number}"
    if not isinstance(entry, dict):
        raise _damaged(place, "not an object")
    fields = _Fields(entry, place)
    name = fields.text("name")
    if not _SHARD_NAME.fullmatch(name):  # also keeps a foreign manifest from naming files elsewhere
        raise _damaged(place, f"{name[:80]!r} is no shard's name")
    shard = Shard(
        name=name,
        samples=fields.integer("samples"),
        bytes=fields.integer("bytes"),
        sha256=fields.digest("sha256"),
        index_bytes=fields.integer("index_bytes"),
        index_sha256=fields.digest("index_sha256"),
    )
    if shard.samples < 1:
        raise _damaged(place, "it has no sample")
    return shard


class _Fields:
    """Typed access to one JSON object; every failure is a ShardSetError that names the field."""

    def __init__(self, document: dict, where: str):
        self.document, self.where = document, where

    def _get(self, name: str, kind: type) -> Any:
        value = self.document.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise _damaged(self.where, f"'{name}' is missing or of a wrong type")
        return value

    def text(self, name: str) -> str:
        return self._get(name, str)

    def integer(self, name: str) -> int:
        value = self._get(name, int)
        if not 0 <= value < 1 << 63:
            raise _damaged(self.where, f"'{name}' is out of range")
        return value

    def mapping(self, name: str) -> dict:
        return self._get(name, dict)

    def digest(self, name: str) -> str:
        value = self._get(name, str)
        if not _SHA256.fullmatch(value):
            raise _damaged(self.where, f"'{name}' is no sha256")
        return value

    def names(self, name: str) -> tuple[str, ...]:
        value = self._get(name, list)
        if not all(isinstance(item, str) for item in value):
            raise _damaged(self.where, f"'{name}' must be a list of names")
        return tuple(value)


def read_index(directory: str | os.PathLike, shard: Shard, extension: str = "jpg") -> ShardIndex:
    """Where each sample's `extension` file lies. Raises ShardSetError when the index is missing or damaged,
    is not the one that the manifest means, or a sample has no such file."""
    path = idx_path(directory, shard)
    return verified_index(_read_exactly(path, shard.index_bytes), shard, extension, path)


def verified_index(
    data: bytes, shard: Shard, extension: str = "jpg", where: str | os.PathLike = "index"
) -> ShardIndex:
    """As `read_index`, from bytes that were read elsewhere. `where` is for the messages."""
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise ShardSetError(
            f"{where} is not the index that {MANIFEST} describes (its sha256 differs): restore it"
        )
    return parse_index(data, shard, extension, where)


def parse_index(
    data: bytes, shard: Shard, extension: str = "jpg", where: str | os.PathLike = "index"
) -> ShardIndex:
    """`where` is for the messages. Raises ShardSetError."""
    keys, offsets, sizes = [], [], []
    suffix = "." + extension
    for number, files in enumerate(parse_index_lines(data, shard.samples, shard.bytes, where)):
        for kind, offset, size, name in files:
            if kind == extension:
                keys.append(name.removesuffix(suffix))
                offsets.append(offset)
                sizes.append(size)
                break
        else:
            raise ShardSetError(f"{where}: sample {number} has no .{extension} file")
    return ShardIndex(keys, np.array(offsets, np.int64), np.array(sizes, np.int64))


def parse_index_lines(data: bytes, samples: int, tar_bytes: int, where: str | os.PathLike):
    """Yields each sample's files as a list of (extension, offset, size, name). Raises ShardSetError."""
    try:
        lines = data.decode("ascii").split("\n")
    except UnicodeDecodeError:
        raise ShardSetError(f"{where} is damaged: not plain text") from None
    if lines[0] != f"v1.2 {samples}" or lines[-1] != "" or len(lines) != samples + 2:
        raise ShardSetError(f"{where} is damaged: it does not hold {samples} samples as DALI's index v1.2")
    for number, line in enumerate(lines[1:-1]):
        words = line.split(" ")
        if len(words) % 4:
            raise ShardSetError(f"{where} is damaged in line {number + 2}")
        files = []
        for i in range(0, len(words), 4):
            extension, offset, size, name = words[i : i + 4]
            if not (_is_number(offset) and _is_number(size) and name.endswith("." + extension)):
                raise ShardSetError(f"{where} is damaged in line {number + 2}")
            start, length = int(offset), int(size)
            if start % 512 or start < 512 or start + length > tar_bytes:
                raise ShardSetError(f"{where} is damaged in line {number + 2}: outside of the tar file")
            files.append((extension, start, length, name))
        yield files


def _is_number(word: str) -> bool:
    return word.isdigit() and len(word) <= 18


def is_header_of(block: bytes, name: str, size: int) -> bool:
    """Whether the 512 bytes before a member's data are the header of `name` with `size` bytes."""
    return block[:100] == name.encode("ascii").ljust(100, b"\0") and block[124:136] == b"%011o\0" % size


def check_shard_files(directory: str | os.PathLike, manifest: Manifest) -> None:
    """Cheap: every shard and index is there and has the size that the manifest says.

    Raises ShardSetError naming the first that is not.
    """
    for shard in manifest.shards:
        _check_size(tar_path(directory, shard), shard.bytes)
        _check_size(idx_path(directory, shard), shard.index_bytes)


def check_shard_bytes(directory: str | os.PathLike, shard: Shard) -> None:
    """Reads the whole tar file and compares its sha256. Raises ShardSetError."""
    path = tar_path(directory, shard)
    _check_size(path, shard.bytes)
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ShardSetError(f"{path} can't be read: {error.strerror}") from None
    if digest != shard.sha256:
        raise ShardSetError(
            f"{path} is damaged (its sha256 is not the manifest's): restore or rebuild the set"
        )


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ShardSetError(f"{path} is missing: restore or rebuild the set") from None
    except OSError as error:
        raise ShardSetError(f"{path} can't be read: {error.strerror}") from None
    if size != expected:
        raise ShardSetError(
            f"{path} has {size:,} bytes, the manifest says {expected:,}: restore or rebuild the set"
        )


def _read_exactly(path: Path, expected: int) -> bytes:
    _check_size(path, expected)
    try:
        return path.read_bytes()
    except OSError as error:
        raise ShardSetError(f"{path} can't be read: {error.strerror}") from None
