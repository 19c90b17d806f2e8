"""Shard sets on disk: file names, manifest, indexes. The only module that knows the format.

    imagenet-train-000000.tar   USTAR; per sample KEY.jpg, then KEY.cls (label), KEY.json (metadata), KEY.txt
                                and KEY.png (label map) if any
    imagenet-train-000000.idx   DALI's index: "v1.2 SAMPLES", then per sample "EXTENSION OFFSET SIZE NAME ..."
    manifest.json               source, options, classes; size and sha256 of every shard and index
    quarantine.jsonl            every input that is not in the shards, with the reason
    wids.json                   the list of shards in the format of the wids library
    card.md, card.json, contact_sheet.png   counts, histograms, thumbnails

An adopted set (`python -m data_prep adopt`) is a folder of other WebDataset tars, which have any name and headers. Its
indexes list the usable samples; the image is always listed as "jpg", and characters that an index cannot hold (spaces,
non-ASCII, %) are percent-encoded in names. Labels are where the manifest's options say (data_prep/labels.py).

Invariant: a set is complete if its manifest exists, because the manifest is written last and atomically.
Every file read here is untrusted: a missing or damaged one raises ShardSetError and no other exception.
"""

import functools
import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote, unquote_to_bytes

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from data_prep.atomic import atomic_write, fsync_path, process_tag
from data_prep.errors import UserError
from data_prep.labels import LabelRule
from data_prep.suggested_command import suggest_command

FORMAT = "shardmae-shard-set"
FORMAT_VERSION = 1
MANIFEST, QUARANTINE, WIDS = "manifest.json", "quarantine.jsonl", "wids.json"
CARD, CARD_JSON, CONTACT_SHEET = "card.md", "card.json", "contact_sheet.png"
BUILD_DIRECTORY = ".build"
"""Holds the state of an unfinished build; a complete set has none."""

ADOPTION_STATE = ".adopt.json"
"""File in it of an unfinished adoption. Records of tars never have this name, since a shard's begins with no dot."""

ADOPTED = "adopted"
"""`Manifest.source` of a set whose tars were not built here."""

_MANIFEST_LIMIT = 1 << 30  # bytes; a million shards need a quarter of it
_Count = Annotated[int, Field(strict=True, ge=0, le=2**63 - 1)]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Annotation = Literal["label", "instances", "label_map"]
"""What `classes` are the classes of: images (KEY.cls), instances (in KEY.json), or pixels (KEY.png)."""
# The pattern also prevents a manifest from naming files outside its directory.
SHARD_NAME = r"[^./\\\x00-\x1f][^/\\\x00-\x1f]*"
_ShardName = Annotated[str, Field(pattern=f"^{SHARD_NAME}$")]
_SAFE_IN_INDEX = "".join(map(chr, range(33, 127))).replace("%", "")


class ShardSetError(UserError):
    """A shard set that is missing, unfinished or damaged."""


@dataclass(frozen=True)
class Shard:
    """One shard's entry in the manifest. Sizes in bytes."""

    name: _ShardName
    samples: Annotated[_Count, Field(ge=1)]
    bytes: _Count
    sha256: _Sha256
    index_bytes: _Count
    index_sha256: _Sha256


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json."""

    format_version: _Count
    source: str
    split: str
    seed: _Count
    options: Mapping[str, Any]
    plan_sha256: _Sha256
    inputs: _Count  # what the source listed: num_samples + quarantined
    quarantined: _Count
    repairs: Mapping[str, _Count]  # number of samples per kind of repair
    classes: tuple[str, ...]  # a label is a position in it; empty if the set has no annotations
    class_names: tuple[str, ...]  # readable names of `classes`, position by position, or empty
    shards: Annotated[tuple[Shard, ...], Field(min_length=1)] = field(repr=False)
    annotation: Annotation = "label"
    category_ids: tuple[_Count, ...] = ()  # COCO's id of each of `classes`, position by position, or empty

    @property
    def has_labels(self) -> bool:
        """Whether each sample has a KEY.cls."""
        return bool(self.classes) and self.annotation == "label"

    @property
    def num_samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Size of all tar files in bytes."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def is_adopted(self) -> bool:
        return self.source == ADOPTED

    @property
    def label_extension(self) -> str | None:
        """Extension of the files that hold the labels; None if no file does."""
        return LabelRule.from_options(self.options).extension if self.is_adopted else "cls"

    def read_labels(self, keys: Sequence[str], contents: Sequence[bytes]) -> list[int]:
        """Return the positions in `classes` of samples, from their keys and the contents of their label files.

        Raises:
            ValueError: If a sample has no label.
        """
        if not self.is_adopted:
            return list(map(int, contents))
        rule = LabelRule.from_options(self.options)
        return [rule.position(key, content, self._position_of) for key, content in zip(keys, contents, strict=True)]

    @functools.cached_property
    def _position_of(self) -> dict[str, int]:
        return {name: position for position, name in enumerate(self.classes)}


_MANIFEST_SCHEMA = TypeAdapter(Manifest)


@dataclass(frozen=True)
class ShardIndex:
    """Names and positions of the files with one extension in a tar, in tar order.

    offsets and sizes are int64 (n,), in bytes; sample i's file is tar[offsets[i] : offsets[i] + sizes[i]].
    """

    keys: list[str]
    names: list[str]
    offsets: np.ndarray
    sizes: np.ndarray


def shard_name(source: str, split: str, number: int) -> str:
    return f"{source}-{split}-{number:06d}"


def tar_path(directory: str | os.PathLike, shard: Shard | str) -> Path:
    return Path(directory) / f"{shard if isinstance(shard, str) else shard.name}.tar"


def idx_path(directory: str | os.PathLike, shard: Shard | str) -> Path:
    return Path(directory) / f"{shard if isinstance(shard, str) else shard.name}.idx"


def write_manifest(directory: str | os.PathLike, manifest: Manifest) -> None:
    """Write manifest.json, which completes the set. All other files must be there and on disk."""
    document = {"format": FORMAT, **asdict(manifest), "samples": manifest.num_samples}
    fsync_path(directory)  # the shards' directory entries must be durable before the manifest is
    atomic_write(Path(directory) / MANIFEST, (json.dumps(document, indent=1) + "\n").encode())
    fsync_path(directory)


def remove_temporary_files(directory: Path, process: int | None = None) -> None:
    """Remove the temporary files that a killed process of this machine, or any process, left behind."""
    tag = "*" if process is None else process_tag(process)
    # Only ours: the folder of an adopted set also holds other programs' files.
    patterns = [f".*.{ending}.{tag}.tmp" for ending in ("idx", "json", "jsonl", "md", "png")]
    for pattern in (*patterns, f"{BUILD_DIRECTORY}/**/*.{tag}.tmp"):
        for path in directory.glob(pattern):
            path.unlink(missing_ok=True)


def read_manifest(directory: str | os.PathLike) -> Manifest:
    """Read the manifest of a complete set.

    Raises:
        ShardSetError: If `directory` does not exist or holds no complete set, or if the manifest is damaged
            or of another version.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    if not directory.is_dir():
        if not directory.exists():
            raise ShardSetError(
                f"{directory}: does not exist; check the path, or build a shard set with "
                "`python -m data_prep folder IMAGES OUT`"
            )
        raise ShardSetError(f"{directory}: is a file, not a shard set; {suggest_command(directory)}")
    try:
        with open(path, "rb") as file:
            data = file.read(_MANIFEST_LIMIT + 1)
    except FileNotFoundError as error:
        if (directory / BUILD_DIRECTORY).is_dir():
            raise ShardSetError(
                f"{directory}: unfinished shard set (no {MANIFEST}); run its `python -m data_prep` command "
                "again to finish it"
            ) from error
        hint = suggest_command(directory)
        raise ShardSetError(f"{directory}: not a shard set (no {MANIFEST}); {hint}") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    return parse_manifest(data, path)


def parse_manifest(data: bytes, where: str | os.PathLike = MANIFEST) -> Manifest:
    """Parse and validate the content of manifest.json; `where` is its path or URL for messages.

    Raises:
        ShardSetError: If it is damaged, of another version or no manifest at all.
    """
    if len(data) > _MANIFEST_LIMIT:
        raise ShardSetError(f"{where}: larger than {_MANIFEST_LIMIT:,} bytes, so not a manifest")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _damaged(where, "invalid JSON") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ShardSetError(f"{where}: not the manifest of a shard set ('format' is not {FORMAT!r})")
    version = document.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise ShardSetError(
            f"{where}: format version {str(version)[:20]}, but this program reads version {FORMAT_VERSION}; "
            "build the set again, or use the ShardMAE version that built it"
        )
    try:
        manifest = _MANIFEST_SCHEMA.validate_python(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"]))[:80]
        raise _damaged(where, f"{key}: {first['msg']}") from error
    if len({shard.name for shard in manifest.shards}) != len(manifest.shards):
        raise _damaged(where, "a shard is listed twice")
    if document.get("samples") != manifest.num_samples:
        raise _damaged(where, "'samples' is not the sum over the shards")
    return manifest


def _damaged(where: str | os.PathLike, problem: str) -> ShardSetError:
    return ShardSetError(f"{where}: damaged ({problem}); restore it or build the set again")


def _unreadable(path: Path, error: OSError) -> ShardSetError:
    return ShardSetError(f"{path}: cannot be read: {error.strerror}; check its permissions")


def read_index(directory: str | os.PathLike, shard: Shard, extension: str = "jpg") -> ShardIndex:
    """Read the index of the shard's files that end with `extension`.

    Raises:
        ShardSetError: If the index is missing, damaged or not the manifest's, or a sample has no such file.
    """
    path = idx_path(directory, shard)
    _check_size(path, shard.index_bytes)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    return verified_index(data, shard, extension, path)


def verified_index(data: bytes, shard: Shard, extension: str = "jpg", where: str | os.PathLike = "index") -> ShardIndex:
    """Parse an index after comparing its sha256 with the manifest's. See parse_index()."""
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise _damaged(where, f"its sha256 differs from {MANIFEST}")
    return parse_index(data, shard, extension, where)


def parse_index(data: bytes, shard: Shard, extension: str = "jpg", where: str | os.PathLike = "index") -> ShardIndex:
    """Parse the content of an index; `where` is its path or URL for messages.

    Raises:
        ShardSetError: If the index is damaged or a sample has no `extension` file.
    """
    keys, names, offsets, sizes = [], [], [], []
    for number, files in enumerate(parse_index_lines(data, shard.samples, shard.bytes, where)):
        for kind, offset, size, name in files:
            if kind == extension:
                keys.append(key_of(name))
                names.append(name)
                offsets.append(offset)
                sizes.append(size)
                break
        else:
            raise ShardSetError(f"{where}: sample {number} has no .{extension} file")
    return ShardIndex(keys, names, np.array(offsets, np.int64), np.array(sizes, np.int64))


def key_of(name: str) -> str:
    """Return the key of a member by WebDataset's rule: its name up to the first dot after the last slash."""
    dot = name.find(".", name.rfind("/") + 1)
    return name[:dot] if dot >= 0 else name


def quote_name(name: str) -> str:
    """Return a member's name or extension in the form that an index holds: printable ASCII without spaces."""
    return quote(name.encode("utf-8", "surrogateescape"), _SAFE_IN_INDEX)


def parse_index_lines(
    data: bytes, samples: int, tar_bytes: int, where: str | os.PathLike
) -> Iterator[list[tuple[str, int, int, str]]]:
    """Yield each sample's files as (extension, offset, size, name). Raises ShardSetError if damaged."""
    try:
        lines = data.decode("ascii").split("\n")
    except UnicodeDecodeError as error:
        raise _damaged(where, "not ASCII") from error
    if lines[0] != f"v1.2 {samples}" or lines[-1] != "" or len(lines) != samples + 2:
        raise _damaged(where, f"not a DALI index v1.2 of {samples} samples")
    for number, line in enumerate(lines[1:-1], 2):
        words = line.split(" ")
        if len(words) % 4:
            raise _damaged(where, f"line {number}")
        files = []
        for i in range(0, len(words), 4):
            extension, offset, size, name = words[i : i + 4]
            if not (_is_number(offset) and _is_number(size) and extension and name):
                raise _damaged(where, f"line {number}")
            start, length = int(offset), int(size)
            if start % 512 or start < 512 or start + length > tar_bytes:
                raise _damaged(where, f"line {number}: outside the tar file")
            files.append((extension, start, length, name))
        yield files


def _is_number(word: str) -> bool:
    return word.isdigit() and len(word) <= 18


def is_header_of(block: bytes, name: str, size: int) -> bool:
    """Return whether a 512-byte tar header belongs to the member with this name in the index and `size` bytes."""
    if block[:100] == name.encode("ascii").ljust(100, b"\0") and block[124:136] == b"%011o\0" % size:
        return True
    try:  # the header of an adopted tar
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    expected = unquote_to_bytes(name)
    # PAX and GNU headers hold only a part of a long name, and PAX headers may replace non-ASCII characters.
    has_whole_name = len(expected) <= 100 and expected.isascii()
    is_named = header.name.encode("utf-8", "surrogateescape") == expected or not has_whole_name
    return header.isreg() and header.size == size and is_named


def check_shard_files(directory: str | os.PathLike, manifest: Manifest) -> None:
    """Check the size of every shard and index, without reading them. Raises ShardSetError for the first fault."""
    for shard in manifest.shards:
        _check_size(tar_path(directory, shard), shard.bytes)
        _check_size(idx_path(directory, shard), shard.index_bytes)


def check_shard_bytes(directory: str | os.PathLike, shard: Shard) -> None:
    """Compare a tar file's sha256 with the manifest's. Raises ShardSetError if it differs."""
    path = tar_path(directory, shard)
    _check_size(path, shard.bytes)
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error
    if digest != shard.sha256:
        raise _damaged(path, f"its sha256 differs from {MANIFEST}")


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise ShardSetError(f"{path}: missing; restore it or build the set again") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    if size != expected:
        raise _damaged(path, f"{size:,} bytes, but {MANIFEST} says {expected:,}")
