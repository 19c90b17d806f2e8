"""ImageNet-21k: one tar per synset, as files of a folder, or all inside of one tar; or class folders.

Invariant: as for ImageNet-1k, a label is the position of the wnid among the sorted wnids that SRC holds.
"""

from collections.abc import Iterator
from pathlib import Path

from data_prep.errors import UserError
from data_prep.sources.containers import TAR_ENDINGS, Entry, entries, entries_inside
from data_prep.sources.imagenet import WNID
from data_prep.sources.sample import Classes, PlainSource, Sample, key_of


class ImageNet21kSource(PlainSource):
    """root: a folder with n01440764.tar, ... or n01440764/ ... (at any depth of one), or a tar of such tars.
    Readable names come from SRC/words.txt ("wnid TAB words") where there is one."""

    def __init__(self, root: Path):
        if not root.exists():
            raise UserError(f"SRC {root} does not exist")
        self._tars: dict[str, list[Entry]] = {}
        for entry in entries(root, ""):
            wnid = entry.base.partition(".")[0]
            if entry.rejection_reason is None and WNID.fullmatch(wnid) and entry.base.endswith(TAR_ENDINGS):
                self._tars.setdefault(wnid, []).append(entry)
        layout = "a tar of tars" if root.is_file() else "a tar per synset"
        names = sorted(self._tars)
        if not names and root.is_dir():
            layout = "class folders"
            names = sorted(
                path.name for path in root.iterdir() if WNID.fullmatch(path.name) and path.is_dir()
            )
        if not names:
            raise UserError(f"SRC {root} holds no synset: expected n01440764.tar, ... or n01440764/, ...")
        super().__init__("imagenet21k", layout, str(root), Classes(tuple(names), _words(root, names)))

    def samples(self) -> Iterator[Sample]:
        for label, wnid in enumerate(self.classes.names):
            for entry in self._of_class(wnid):
                yield Sample(key_of(entry.base), entry.location, label, entry.rejection_reason)

    def _of_class(self, wnid: str) -> Iterator[Entry]:
        if not self._tars:
            yield from entries(self.root, wnid)
        for tar in self._tars.get(wnid, ()):
            yield from entries_inside(self.root, tar)


def _words(root: Path, wnids: list[str]) -> tuple[str, ...]:
    path = root / "words.txt"
    if not root.is_dir() or not path.is_file():
        return ()
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    words = {wnid: text for wnid, _, text in (line.partition("\t") for line in lines)}
    return tuple(words[wnid] for wnid in wnids) if all(wnid in words for wnid in wnids) else ()
