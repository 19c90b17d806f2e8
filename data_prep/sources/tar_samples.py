"""Group the members of a WebDataset tar into samples, as far as the tar can be read.

Invariant: keys and extensions follow WebDataset's rule: a key is a member's name up to the first dot after the last
slash, the lower-case rest is the extension. Unlike in WebDataset, the members of a sample need not be neighbors, since
`tar cf x.tar folder/` writes them in any order; a second member with the same name is a duplicate. The result is a pure
function of the tar's bytes. Every member is in a sample or in `rejected`.
"""

import re
import tarfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

from data_prep.errors import UserError
from data_prep.labels import LabelRule
from data_prep.shard_file import BLOCK
from data_prep.sources.containers import Entry, tar_entries
from data_prep.sources.folder import HIDDEN
from data_prep.sources.sample import Location, Storage
from data_prep.sources.sequential_reader import SequentialReader

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""If a sample has several of them, the first of this list is the image."""
KEPT_EXTENSIONS = ("json", "txt")
"""Members that are copied into a rebuilt set."""

_METADATA_NAME = re.compile(r"__[^/]*__($|/)")  # WebDataset skips such names
_LABEL_LIMIT = 1 << 20  # bytes of a label file


class Member(NamedTuple):
    """A member of a tar; `name` as stored, `offset` of its first data byte."""

    name: str
    offset: int
    size: int


Members = dict[str, Member]
"""The members of a sample by extension."""


class RejectedMember(ValueError):
    """A member that is in no sample. The message is "code: detail" for the quarantine."""


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name into key and extension. Raises RejectedMember if it belongs to no sample."""
    start = name.rfind("/") + 1
    if name.startswith(".", start):
        raise RejectedMember(HIDDEN)
    if _METADATA_NAME.match(name):
        raise RejectedMember("metadata: WebDataset skips names like __NAME__")
    dot = name.find(".", start)
    if dot < 0 or dot == len(name) - 1:
        raise RejectedMember("no_key: not named KEY.EXTENSION")
    return name[:dot], name[dot + 1 :].lower()


class TarSamples:
    """Read a tar and collect its samples.

    Args:
        file: The tar's (decompressed) bytes.
        size: The tar's size in bytes, None if it is not known.
        where: Its path for messages and locations.
        storage: How its members are read later.

    Attributes:
        samples: Members by key, in the order of each sample's first member. Complete after the iteration.
        rejected: Location and "code: detail" of every member that is in no sample, and of a damaged end.
        damage: Why the tar could not be read to its end, or None.
    """

    def __init__(self, file: SequentialReader, size: int | None, where: str, storage: Storage = Storage.STORED):
        self.samples: dict[str, Members] = {}
        self.rejected: list[tuple[Location, str]] = []
        self.damage: str | None = None
        self._file, self._size, self._where, self._storage = file, size, where, storage

    def __iter__(self) -> Iterator[tuple[str, str, Member]]:
        """Yield (key, extension, member) of every member that is in a sample, in the tar's order.

        Raises:
            UserError: If the file does not begin like a tar.
            UnreadableSource: If reading fails.
        """
        head = self._file.read_at(0, BLOCK)
        try:
            for entry in tar_entries(self._file, self._size, self._where, self._storage) if head else ():
                try:
                    yield self._add(entry)
                except RejectedMember as error:
                    self.rejected.append((entry.location, str(error)))
        except UserError as error:
            if not _is_header(head):
                raise
            self.damage = str(error)
            self.rejected.append((Location(self._where), f"damaged_tar: {self.damage}"))
        if not (self.samples or self.rejected):
            self.rejected.append((Location(self._where), "empty_tar: no members"))

    def _add(self, entry: Entry) -> tuple[str, str, Member]:
        if entry.rejection_reason is not None:
            raise RejectedMember(entry.rejection_reason)
        key, extension = split_name(entry.stored_name)
        members = self.samples.setdefault(key, {})
        if extension in members:
            raise RejectedMember(f"duplicate_key: {members[extension].name} is an earlier member of sample {key!r}")
        members[extension] = Member(entry.stored_name, entry.location.offset, entry.location.size)
        return key, extension, members[extension]


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def find_image(members: Members) -> str | None:
    """Return the extension of a sample's image, None if it has none."""
    return next((extension for extension in IMAGE_EXTENSIONS if extension in members), None)


def describe_missing_image(members: Members) -> str:
    """Return the "code: detail" of a sample without an image."""
    return f"no_image: no .{', .'.join(IMAGE_EXTENSIONS)}, but .{', .'.join(members)}"[:200]


def choose_labels(samples: dict[str, Members]) -> LabelRule:
    """Choose where labels are from the samples of the first tar that has any.

    cls files if there is one; else folders if all samples are in folders, and in more than one.
    """
    if any("cls" in members for members in samples.values()):
        return LabelRule("cls")
    folders = {key.rpartition("/")[0] for key in samples}
    return LabelRule("folders" if len(folders) > 1 and not folders & {"", "."} else "none")


def read_label(rule: LabelRule, key: str, members: Members, read: Callable[[Member], bytes]) -> str:
    """Return the label of a sample. Raises RejectedMember if it has none."""
    content = b""
    if rule.extension is not None:
        member = members.get(rule.extension)
        if member is None:
            raise RejectedMember(f"no_label: no .{rule.extension} member")
        if member.size > _LABEL_LIMIT:
            raise RejectedMember(f"no_label: a .{rule.extension} member of {member.size:,} bytes")
        content = read(member)
    try:
        return rule.read_label(key, content)
    except ValueError as error:
        raise RejectedMember(f"no_label: {error}") from error
