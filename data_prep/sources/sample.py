"""What a source says about one image, before anyone has looked at its bytes.

Invariant: a sample is plain data with no open file, so that a plan of millions can be kept in columns and a
worker in another process can read any of them by itself. Its key depends on its name alone.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

from data_prep.shard_file import KEY, KEY_LIMIT

_UNFIT = re.compile(r"[^A-Za-z0-9_-]+")


class Storage(IntEnum):
    """How an image's bytes lie in its container (a file below the source's root)."""

    FILE = 0
    """The container is the image."""
    STORED = 1
    """container[offset : offset + size]."""
    DEFLATED = 2
    """The same range, to be inflated (a zip member)."""
    GZIPPED = 3
    """The range in the container's gunzipped bytes."""


class Location(NamedTuple):
    """container: path below the source's root ("" for the root itself), member: name inside of it, for
    people. offset, size: bytes, of what is read from the container."""

    container: str
    member: str = ""
    offset: int = 0
    size: int = 0
    storage: Storage = Storage.FILE

    def __str__(self) -> str:
        return f"{self.container}!{self.member}" if self.member else self.container


class Sample(NamedTuple):
    """label: position in the source's classes, -1 without. refusal: why it must not be read at all, or None;
    such a sample is an input like any other, and ends in quarantine."""

    key: str
    location: Location
    label: int = -1
    rejection_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Details:
    """What a source knows about a sample beyond its bytes; asked for when the sample is packed.

    metadata: for KEY.json, or None. rotation: degrees counter-clockwise to turn the pixels.
    """

    metadata: Mapping[str, Any] | None = None
    rotation: int = 0


@dataclass(frozen=True, slots=True)
class Classes:
    """names decide the label numbers; readable are for people, position by position, or empty."""

    names: tuple[str, ...] = ()
    readable: tuple[str, ...] = ()


class Source(Protocol):
    """kind: the name in shard names. layout: what was recognised, for the log."""

    kind: str
    layout: str
    classes: Classes
    root: str
    """Containers are paths below it."""
    expected: int | None

    def samples(self) -> Iterator[Sample]: ...

    def details(self, key: str) -> Details: ...


NO_DETAILS = Details()


@dataclass(slots=True)
class PlainSource:
    """A source whose samples have nothing but bytes and labels."""

    kind: str
    layout: str
    root: str
    classes: Classes = field(default_factory=Classes)
    expected: int | None = None
    """Samples of the whole data set as it was published, where that is known."""

    def details(self, key: str) -> Details:
        return NO_DETAILS


def key_of(name: str) -> str:
    """A shard key for a file's name: the name without its ending where that is fit to be a key.

    Otherwise what is unfit becomes "_" and eight digits of the whole name's hash follow, so that names which
    differ only there stay apart. Folders are joined by "_".
    """
    folder, _, last = name.rpartition("/")
    stem = last.rpartition(".")[0] or last
    plain = f"{folder}/{stem}".strip("/").replace("/", "_")
    if KEY.fullmatch(plain):
        return plain
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    fit = _UNFIT.sub("_", plain).strip("_")[: KEY_LIMIT - 9]
    return f"{fit or 'image'}-{digest}"
