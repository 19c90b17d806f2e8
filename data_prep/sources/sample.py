"""Samples and the base class of data sources.

Invariant: a Sample is plain data without open files, so a plan of millions of samples is kept in columns and
any process can read any of them. Its key depends only on its name.

To add a source:
1. Write a module in `data_prep/sources` with a subclass of `Source`, or a function that returns one. It is
   called with (root, split, **options) and raises UserError if SRC holds no such data set. `containers.py`
   lists the files of folders, tar, tar.gz and zip archives.
2. Add it to `registry.SOURCES`, with its help, splits and options. That makes it a command.
3. If its images are stored in a way that `Storage` lacks, add a member there and a branch in
   `SourceReader._read`.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # imports pydantic
    from data_prep.parquet_staging import StageJob
    from data_prep.shard_set import Annotation

KEY_LIMIT = 90
"""Characters; with the longest extension a name still fits USTAR's limit of 100."""
KEY = re.compile(rf"(?!__)[A-Za-z0-9_-]{{1,{KEY_LIMIT}}}")
"""No dot, slash or space, so that DALI and webdataset split names into the same key and extension."""


class Storage(IntEnum):
    """How an image is stored in its container, a file below the source's root. Part of the plan's sha256."""

    FILE = 0  # the container is the image
    STORED = 1  # the bytes container[offset : offset + size]
    DEFLATED = 2  # the same range, compressed with deflate (a zip member)
    GZIPPED = 3  # the same range of the container's decompressed content
    PARQUET = 4  # row `offset` of a parquet file; the size is an estimate


class Location(NamedTuple):
    """Position of an image's bytes; offset and size in bytes."""

    container: str  # path below the source's root; "" for the root itself
    member: str = ""  # name inside the container, for messages and the quarantine
    offset: int = 0
    size: int = 0
    storage: Storage = Storage.FILE

    def __str__(self) -> str:
        return f"{self.container}!{self.member}" if self.member else self.container

    def quarantine_entry(self, reason: str, detail: str) -> dict[str, str]:
        return {"source": self.container, "member": self.member, "reason": reason, "detail": detail}


class Sample(NamedTuple):
    """One input of a source."""

    key: str  # name in the shards, from `make_key`
    location: Location
    label: int = -1  # position in the source's classes, -1 without a label
    rejection_reason: str | None = None  # "code: detail" if the input must not be read; it is then quarantined


@dataclass(frozen=True, slots=True)
class Details:
    """What a source knows about a sample besides its bytes and label."""

    metadata: Mapping[str, Any] | None = None  # content of KEY.json; None for no such file
    rotation: int = 0  # degrees counter-clockwise, a multiple of 90, by which to turn the pixels
    unreadable: tuple[str, ...] = ()  # a code for each part of the metadata that was left out because it is damaged
    label_map: Location | None = None  # of KEY.png, which is checked against the image and `Classes.names`


@dataclass(frozen=True, slots=True)
class Classes:
    """Class names in the order of the labels."""

    names: tuple[str, ...] = ()
    readable: tuple[str, ...] = ()  # for people, position by position, or empty
    annotation: "Annotation" = "label"
    category_ids: tuple[int, ...] = ()  # COCO's ids, position by position, or empty


@dataclass
class Source(ABC):
    """A data set to build shards from. It is opened before the workers are forked, which inherit it."""

    kind: str  # name in shard names; lower case letters and digits
    layout: str  # which form of the data set was found; part of the build's identity
    root: str  # path or URL below which containers are found
    classes: Classes = field(default_factory=Classes)
    expected: int | None = None  # number of images of the data set as published, if known
    annotations_digest: str = ""  # of the inputs besides images that the set depends on; part of the build's identity

    @abstractmethod
    def samples(self) -> Iterator[Sample]:
        """Yield every input, usable or not, in an order that depends on the content of SRC alone.

        Raises:
            UserError: If SRC cannot be read to its end.
        """

    def details(self, key: str) -> Details:
        """Return the metadata of one sample. Called by the workers, when the sample is written."""
        return Details()

    def read_files(self, sample: Sample, read: Callable[[Location], bytes]) -> list[tuple[str, bytes]]:
        """Return (extension, content) of files to copy into the sample; `read` returns the bytes of a location."""
        return []

    def staging_job(self, directory: Path) -> "StageJob | None":
        """Return the job that stages the images for the set in `directory`; None if they are read in place."""
        return None

    def notes(self) -> list[str]:
        """Return what the user should know about SRC, a line each, once all `samples` were read.

        Raises:
            UserError: If metadata in SRC do not belong to its images.
        """
        return []


def make_key(name: str) -> str:
    """Make a shard key from a file's name: without its ending, folders joined by "_".

    If characters have to be replaced, a hash of the name follows, so that different names keep different keys.
    """
    folder, _, last = name.rpartition("/")
    stem = last.rpartition(".")[0] or last
    plain = f"{folder}/{stem}".strip("/").replace("/", "_")
    if KEY.fullmatch(plain):
        return plain
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    valid = re.sub(r"[^A-Za-z0-9_-]+", "_", plain).strip("_")[: KEY_LIMIT - 9]
    return f"{valid or 'image'}-{digest}"
