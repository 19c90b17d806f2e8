"""Adopt one tar: read it once, check its images, and write the index of its usable samples.

Invariant: the tar is only read. Index and record are a pure function of (tar, policy, label rule), written under
temporary names and renamed, index first; a tar is finished once its record is in the build directory. So a tar may be
adopted again, or by two processes at once.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep import images
from data_prep.atomic import atomic_write
from data_prep.build_shard import Record, is_intact, read_record, write_error, write_record
from data_prep.errors import UserError
from data_prep.labels import LabelRule
from data_prep.pixels import ImageError
from data_prep.shard_set import Shard, idx_path, quote_name, read_index, tar_path
from data_prep.source_reader import check_image_size_limit
from data_prep.sources.sample import Location
from data_prep.sources.sequential_reader import SequentialReader, UnreadableSource, open_local
from data_prep.sources.tar_samples import (
    IMAGE_EXTENSIONS,
    Members,
    RejectedMember,
    TarSamples,
    describe_missing_image,
    find_image,
    read_label,
)
from data_prep.stats import Stats
from data_prep.workers import CountInput

_READ_BYTES = 4 << 20


@dataclass(frozen=True)
class AdoptJob:
    """Everything that a worker needs to adopt a tar.

    Attributes:
        directory: Folder of the tars.
        names: The tars' names without ".tar".
        policy: How to check images.
        label_rule: Where the labels are.
        sha256: Identifies tars and options.
    """

    directory: Path
    names: tuple[str, ...]
    policy: images.Policy
    label_rule: LabelRule
    sha256: str

    def read_record(self, number: int) -> Record | None:
        """Read the record of a tar; None if it is not adopted yet, or the tar has changed since."""
        return read_record(self.directory, self.names[number], self._tar_state(number))

    def is_finished(self, number: int) -> bool:
        record = self.read_record(number)
        return record is not None and is_intact(self.directory, record.shard, (read_index,))

    def open(self) -> Callable[[int, CountInput], None]:
        return self._adopt

    def _tar_state(self, number: int) -> str:
        """Identify the tar's present state: a record that was made before it changed is not valid."""
        path = tar_path(self.directory, self.names[number])
        try:
            stat = path.stat()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}; check the path and its permissions") from error
        return hashlib.sha256(f"{self.sha256} {path.name} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()

    def _adopt(self, number: int, count_input: CountInput) -> None:
        name, state = self.names[number], self._tar_state(number)
        path, digest = tar_path(self.directory, name), hashlib.sha256()
        try:
            with open_local(path, _READ_BYTES, digest) as (reader, size):
                adoption = _TarAdoption(self, path.name, reader, size, count_input)
                num_bytes = reader.finish()
        except UnreadableSource as error:
            raise UserError(f"{path}: cannot be read: {error}; restore it or move it away") from error
        index = "\n".join([f"v1.2 {len(adoption.lines)}", *adoption.lines, ""]).encode("ascii")
        shard = None
        if adoption.lines:
            sha256 = hashlib.sha256(index).hexdigest()
            shard = Shard(name, len(adoption.lines), num_bytes, digest.hexdigest(), len(index), sha256)
        try:
            if shard is not None:
                atomic_write(idx_path(self.directory, name), index, fsync=False)
            else:
                idx_path(self.directory, name).unlink(missing_ok=True)
            write_record(self.directory, name, state, shard, adoption.quarantine, adoption.stats)
        except OSError as error:
            raise write_error(self.directory, error) from error


class _TarAdoption:
    """The samples of one tar: lines of the index, quarantine entries, statistics (labels not yet as positions)."""

    def __init__(self, job: AdoptJob, where: str, reader: SequentialReader, size: int, count_input: CountInput):
        self._job, self._where, self._reader, self._count_input = job, where, reader, count_input
        self._images: dict[str, tuple[str, images.Prepared | ImageError]] = {}  # extension, result by key
        self._labels: dict[str, str | RejectedMember] = {}
        self.lines: list[str] = []
        self.quarantine: list[dict[str, str]] = []
        self.stats = Stats()
        contents = TarSamples(reader, size, where)
        for key, extension, member in contents:
            if extension in IMAGE_EXTENSIONS:
                self._check_image(key, contents.samples[key])
            elif extension == job.label_rule.extension:
                self._labels[key] = self._read_label(key, {extension: member})
        for location, rejection_reason in contents.rejected:
            self._reject(location, *rejection_reason.split(": ", 1))
        for key, members in contents.samples.items():
            self._add_sample(key, members)

    def _check_image(self, key: str, members: Members) -> None:
        """Check the image of a sample whose members so far are these, if it is not checked yet."""
        extension = find_image(members)
        if extension is None or self._images.get(key, ("",))[0] == extension:
            return
        member = members[extension]
        try:
            check_image_size_limit(member.size)
            data = self._reader.read_at(member.offset, member.size)
            result = replace(images.check_in_place(data, self._job.policy), data=b"")  # to save memory
        except ImageError as error:
            result = error
        self._count_input(member.size, 0, 0, int(isinstance(result, ImageError)))
        self._images[key] = (extension, result)

    def _read_label(self, key: str, members: Members) -> str | RejectedMember:
        try:
            return read_label(self._job.label_rule, key, members, lambda m: self._reader.read_at(m.offset, m.size))
        except RejectedMember as error:
            return error

    def _add_sample(self, key: str, members: Members) -> None:
        extension, rule = find_image(members), self._job.label_rule
        if extension is None:
            first = next(iter(members.values()))
            self._reject(Location(self._where, first.name), *describe_missing_image(members).split(": ", 1))
            return
        location, label = Location(self._where, members[extension].name), None
        if rule.source != "none":
            label = self._labels.get(key) or self._read_label(key, {})
            if isinstance(label, RejectedMember):
                self._reject(location, *str(label).split(": ", 1))
                return
        result = self._images[key][1]
        if isinstance(result, ImageError):
            self._reject(location, result.reason, str(result))
            return
        words = [_index_entry("jpg", members, extension)]
        words += [_index_entry(quote_name(other), members, other) for other in members if other != extension]
        self.lines.append(" ".join(words))
        self.stats.add(result, members[extension].size, [])
        if label is not None:
            self.stats.labels[label] += 1

    def _reject(self, location: Location, reason: str, detail: str) -> None:
        self.quarantine.append(location.quarantine_entry(reason, detail))
        self.stats.quarantine[reason] += 1


def _index_entry(listed_as: str, members: Members, extension: str) -> str:
    member = members[extension]
    return f"{listed_as} {member.offset} {member.size} {quote_name(member.name)}"
