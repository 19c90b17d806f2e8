"""Source: WebDataset tars, to repair, re-encode, shuffle or re-shard them.

Invariant: a sample is one that `adopt` finds, with the same label. Its key is WebDataset's, with folders joined by "_";
if several tars have the same keys, all keys begin with the tar's name. The files KEY.json and KEY.txt are copied.

Columns instead of objects: a sample takes about 120 bytes beside the plan's.
"""

import logging
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from data_prep.errors import UserError
from data_prep.labels import LabelRule, find_classes, parse_label_options
from data_prep.shard_set import ShardSetError, read_manifest
from data_prep.sources.remote_files import is_url
from data_prep.sources.sample import Classes, Location, Sample, Source, Storage, make_key
from data_prep.sources.sequential_reader import SequentialReader
from data_prep.sources.tar_samples import (
    KEPT_EXTENSIONS,
    Member,
    Members,
    RejectedMember,
    TarSamples,
    choose_labels,
    describe_missing_image,
    find_image,
    read_label,
)
from data_prep.sources.webdataset_files import find_tars, open_tar
from data_prep.string_column import StringColumn, has_repeated

logger = logging.getLogger(__name__)


class WebDatasetSource(Source):
    """WebDataset tars.

    Args:
        root: A folder, a tar, a brace pattern of tars, or a URL of one of them.
        split: Only names the shards.
        labels, label_key: Where the labels are; see `parse_label_options`.
    """

    def __init__(self, root: str, split: str, labels: str, label_key: str | None):
        directory, self._tars = find_tars(root)
        self._rule = parse_label_options(labels, label_key)
        self._rejected: list[tuple[Location, str]] = []
        self._labels: dict[str, int] = {}  # number of a label, in the order of their first samples
        self._left_out: Counter[str] = Counter()  # members by extension
        # A row per sample with an image and a label; rows are ordered by tar and position in it.
        self._keys, self._members = StringColumn(), StringColumn()
        self._offset, self._size, self._label = array("Q"), array("Q"), array("i")
        self._files = {extension: (array("Q"), array("Q")) for extension in KEPT_EXTENSIONS}  # offset (0: none), size
        self._first_row, self._storages = array("Q"), []  # of each tar
        for tar in self._tars:
            self._first_row.append(len(self._keys))
            with open_tar(directory, tar) as (reader, size, storage):
                self._read_tar(tar, reader, size, storage)
        self._first_row.append(len(self._keys))
        self._row_of_tar = {tar: number for number, tar in enumerate(self._tars)}
        try:
            names = find_classes(self._labels)
        except ValueError as error:
            raise UserError(f"SRC {root}: {error}; use --labels none, or another --label-key") from error
        position_of = {name: position for position, name in enumerate(names)}
        self._positions = [position_of[label] for label in self._labels]
        rule = self._rule or LabelRule("none")
        layout = "tars, labels: " + (f"json key {rule.key!r}" if rule.source == "json" else rule.source)
        classes = Classes(names)
        if rule.source == "cls" and not is_url(directory):
            classes = _find_built_classes(Path(directory), names) or classes
        super().__init__("webdataset", layout, directory, classes)
        self._prefix_tar = has_repeated(_make_key(self._keys[row]) for row in range(len(self._keys)))

    def samples(self) -> Iterator[Sample]:
        for location, rejection_reason in self._rejected:
            yield Sample("", location, -1, rejection_reason)
        for tar, storage, first, last in zip(
            self._tars, self._storages, self._first_row, self._first_row[1:], strict=False
        ):
            prefix = f"{tar.partition('.tar')[0]}/" if self._prefix_tar else ""
            for row in range(first, last):
                location = Location(tar, self._members[row], self._offset[row], self._size[row], storage)
                label = self._positions[self._label[row]] if self._label[row] >= 0 else -1
                yield Sample(_make_key(prefix + self._keys[row]), location, label)

    def notes(self) -> list[str]:
        notes = []
        if self._left_out:
            counts = ", ".join(f"{count:,} .{extension}" for extension, count in self._left_out.most_common(5))
            notes.append(f"members that a shard set does not hold are left out: {counts}")
        if self._prefix_tar:
            notes.append("the tars have the same keys, so keys begin with the tar's name")
        return notes

    def read_files(self, sample: Sample, read: Callable[[Location], bytes]) -> list[tuple[str, bytes]]:
        location = sample.location
        tar = self._row_of_tar[location.container]
        first, last = self._first_row[tar], self._first_row[tar + 1]
        row = first + int(np.searchsorted(np.asarray(self._offset)[first:last], location.offset))
        files = []
        for extension, (offsets, sizes) in self._files.items():
            if offsets[row]:
                member = f"{sample.key}.{extension}"
                place = Location(location.container, member, offsets[row], sizes[row], location.storage)
                files.append((extension, read(place)))
        return files

    def _read_tar(self, tar: str, reader: SequentialReader, size: int | None, storage: Storage) -> None:
        contents = TarSamples(reader, size, tar, storage)
        labels: dict[str, str | RejectedMember] = {}

        def read(member: Member) -> bytes:
            return reader.read_at(member.offset, member.size)

        for key, extension, _ in contents:
            # A compressed or remote tar is read only once if labels are read on the way.
            if self._rule is not None and extension == self._rule.extension:
                labels[key] = _read_label(self._rule, key, contents.samples[key], read)
        if self._rule is None and contents.samples:
            self._rule = choose_labels(contents.samples)
        self._storages.append(storage)
        self._rejected += contents.rejected
        if contents.damage:
            logger.warning(f"{contents.damage}; its last samples are missing")
        rows = []
        for key, members in contents.samples.items():
            try:
                rows.append((key, members, self._number_of_label(labels.get(key), key, members, read)))
            except RejectedMember as error:
                first = members[find_image(members) or next(iter(members))]
                self._rejected.append((Location(tar, first.name, storage=storage), str(error)))
        for row in sorted(rows, key=lambda row: row[1][find_image(row[1])].offset):
            self._append(*row)

    def _number_of_label(
        self, label: str | RejectedMember | None, key: str, members: Members, read: Callable[[Member], bytes]
    ) -> int:
        """Return the number of a sample's label, -1 if there are no labels. Raises RejectedMember if it is unusable."""
        if find_image(members) is None:
            raise RejectedMember(describe_missing_image(members))
        if self._rule is None or self._rule.source == "none":
            return -1
        label = label or _read_label(self._rule, key, members, read)
        if isinstance(label, RejectedMember):
            raise label
        return self._labels.setdefault(label, len(self._labels))

    def _append(self, key: str, members: Members, label: int) -> None:
        image = find_image(members)
        assert image is not None
        self._keys.append(key)
        self._members.append(members[image].name)
        self._offset.append(members[image].offset)
        self._size.append(members[image].size)
        self._label.append(label)
        for extension, (offsets, sizes) in self._files.items():
            member = members.get(extension)
            offsets.append(member.offset if member else 0)
            sizes.append(member.size if member else 0)
        used = {image, "cls" if self._rule and self._rule.source == "cls" else image, *KEPT_EXTENSIONS}
        self._left_out.update(members.keys() - used)


def _find_built_classes(directory: Path, numbers: tuple[str, ...]) -> Classes | None:
    """Return the classes of which the labels are numbers, if the tars are a built shard set's; else None."""
    try:
        manifest = read_manifest(directory)
    except ShardSetError:
        return None
    is_numbered = manifest.has_labels and not manifest.is_adopted and numbers == tuple(map(str, range(len(numbers))))
    if not is_numbered or len(numbers) > len(manifest.classes):
        return None
    return Classes(manifest.classes, manifest.class_names)


def _make_key(key: str) -> str:
    return make_key(f"{key.removeprefix('./')}.jpg")


def _read_label(rule: LabelRule, key: str, members: Members, read: Callable[[Member], bytes]) -> str | RejectedMember:
    try:
        return read_label(rule, key, members, read)
    except RejectedMember as error:
        return error
