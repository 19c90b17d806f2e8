"""Find and open the tars of a WebDataset: a folder, one tar, a brace pattern, or a URL of any of them.

Invariant: tars are ordered by name, so what is read from them does not depend on the file system.
"""

import contextlib
import itertools
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from braceexpand import braceexpand

from data_prep.errors import UserError
from data_prep.labels import LabelRule
from data_prep.shard_set import SHARD_NAME
from data_prep.sources.containers import TAR_ENDINGS, open_gzip
from data_prep.sources.remote_files import RemoteFiles, hide_password, is_url
from data_prep.sources.sample import Storage
from data_prep.sources.sequential_reader import SequentialReader, UnreadableSource, open_local
from data_prep.sources.tar_samples import RejectedMember, TarSamples, choose_labels, read_label
from data_prep.suggested_command import suggest_command

logger = logging.getLogger(__name__)

_GZIP = b"\x1f\x8b"
_HEADER_BYTES = 4096  # a read of a local tar when its headers are listed
_STREAM_BYTES = 4 << 20  # a read of a compressed or remote tar, which is read to its end anyway


def list_tars(folder: Path) -> list[Path]:
    """Return the tars of a folder, compressed ones too, by name. Raises UserError if there are none."""
    try:
        names = _select_tars(os.listdir(folder))
    except FileNotFoundError as error:
        raise UserError(f"{folder}: does not exist; check the path") from error
    except NotADirectoryError as error:
        raise UserError(f"{folder}: is a file; name the folder of the tars, {folder.parent}") from error
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}; check the path and its permissions") from error
    if not names:
        raise UserError(f"{folder}: no tar files; {suggest_command(folder)}")
    if below := sorted({path.parent.name for path in folder.glob("*/*.tar")}):
        logger.warning(f"{folder}: the tars in its subfolders are not read ({', '.join(below[:3])})")
    return [folder / name for name in names]


def check_readable_in_place(path: Path) -> None:
    """Raise UserError if a tar cannot be read in place, because it is compressed, or its name cannot be a shard's."""
    try:
        with open(path, "rb") as file:
            is_compressed = file.read(len(_GZIP)) == _GZIP
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; restore it or move it away") from error
    if is_compressed or not path.name.endswith(".tar"):
        raise UserError(
            f"{path}: compressed, so it cannot be indexed in place; "
            f"`python -m data_prep webdataset {path.parent} OUT` builds a set from it"
        )
    if not re.fullmatch(SHARD_NAME, path.name) or any("\ud800" <= letter <= "\udfff" for letter in path.name):
        raise UserError(f"{str(path)!r}: a name that a shard cannot have; rename it")


def peek_labels(tars: list[Path], rule: LabelRule | None) -> LabelRule:
    """Choose where the labels are from the first of these tars that has samples, or check that `rule` finds one there.

    Raises:
        UserError: If it does not, since all tars would be read before anyone noticed a wrong --label-key.
    """
    if rule is not None and rule.source == "none":
        return rule
    for path in tars:
        with open_tar(str(path.parent), path.name) as (reader, size, storage):
            contents, problem = TarSamples(reader, size, str(path), storage), None
            for key, extension, member in contents:
                if rule is not None and extension == (rule.extension or extension):
                    try:
                        read_label(rule, key, {extension: member}, lambda m: reader.read_at(m.offset, m.size))
                    except RejectedMember as error:
                        problem = problem or f"{key}: {str(error).removeprefix('no_label: ')}"
                        continue
                    return rule
            if contents.samples:
                break
    else:
        return rule or LabelRule("none")
    if rule is None:
        return choose_labels(contents.samples)
    problem = problem or f"there is no .{rule.extension} member"
    raise UserError(f"{path}: no sample has a label ({problem}); choose another --label-key, or --labels")


def find_tars(source: str) -> tuple[str, list[str]]:
    """Return the root of a source, a folder or URL, and the tars' paths below it.

    Args:
        source: A folder, a tar, a brace pattern of tars ("shards/{000..099}.tar"), or a URL of one of them.

    Raises:
        UserError: If there is no tar, or one is missing.
    """
    shown = hide_password(source)
    if source.startswith("file://"):
        source = source.removeprefix("file://")
    if not is_url(source) and os.path.isdir(source):
        return source, [path.name for path in list_tars(Path(source))]
    paths = _expand(source)
    if is_url(source) and len(paths) == 1 and not paths[0].endswith(TAR_ENDINGS):
        root = paths[0].rstrip("/")
        try:
            names = _select_tars(RemoteFiles(root).list_names())
        except UnreadableSource as error:
            raise UserError(f"SRC {shown}: cannot be listed: {error}") from error
        if not names:
            raise UserError(f"SRC {shown}: no tar files; name them with a brace pattern ({{000..099}}.tar)")
        return root, names
    if not is_url(source):
        missing = [path for path in paths if not os.path.isfile(path)]
        if missing:
            more = f" (and {len(missing) - 1:,} more)" if len(missing) > 1 else ""
            raise UserError(f"SRC {shown}: {missing[0]} does not exist{more}; download it, or correct the pattern")
        paths = [os.path.abspath(path) for path in paths]
    folders = zip(*(path.split("/")[:-1] for path in paths), strict=False)
    root = "/".join(level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, folders))
    return root or "/", sorted({path[len(root) + 1 :] for path in paths})


@contextlib.contextmanager
def open_tar(root: str, name: str) -> Iterator[tuple[SequentialReader, int | None, Storage]]:
    """Open a tar to list it; yields a reader of its decompressed bytes, their number if known, and its storage.

    Raises:
        UserError: If it cannot be read.
    """
    path = hide_password(f"{root}/{name}")
    try:
        if is_url(root):
            yield _open_remote(RemoteFiles(root), name, path)
            return
        with open_local(Path(path), _HEADER_BYTES) as (reader, size):
            if reader.read_at(0, len(_GZIP)) != _GZIP:
                yield reader, size, Storage.STORED
                return
        file = open_gzip(path)

        def inflate(offset: int, count: int) -> bytes:
            file.seek(offset)
            return file.read(count)

        yield SequentialReader(inflate, _STREAM_BYTES), None, Storage.GZIPPED
    except UnreadableSource as error:
        raise UserError(f"{path}: cannot be read: {error}; check the path and its permissions") from error


def _open_remote(files: RemoteFiles, name: str, path: str) -> tuple[SequentialReader, int | None, Storage]:
    size = files.size(name)

    def fetch(offset: int, count: int) -> bytes:
        if size is not None:
            count = min(count, size - offset)
        return files.read(name, offset, count) if count > 0 else b""

    reader = SequentialReader(fetch, _STREAM_BYTES)
    if reader.read_at(0, len(_GZIP)) == _GZIP:
        raise UserError(f"{path}: compressed, which can be read only from a disk; download it first")
    return reader, size, Storage.STORED


def _select_tars(names: list[str]) -> list[str]:
    return sorted(name for name in names if name.endswith(TAR_ENDINGS) and not name.startswith("."))


def _expand(pattern: str) -> list[str]:
    try:
        return list(braceexpand(pattern)) if "{" in pattern and not os.path.exists(pattern) else [pattern]
    except ValueError as error:
        raise UserError(f"SRC {pattern}: unbalanced braces") from error
