"""Source: ImageNet-21k. One tar per synset, in a folder or all inside one tar; or class folders.

Invariant: as for ImageNet-1k, a label is the position of the wnid among the sorted wnids of SRC.
"""

from collections.abc import Iterator
from pathlib import Path

from data_prep.errors import UserError
from data_prep.sources.containers import TAR_ENDINGS, Entry, iter_entries, iter_nested_entries
from data_prep.sources.imagenet import WNID
from data_prep.sources.sample import Classes, Sample, Source, make_key


class ImageNet21kSource(Source):
    """ImageNet-21k, or any data set of synset tars.

    Args:
        root: A folder with n01440764.tar, ... or n01440764/, ..., or a tar of such tars. The file words.txt in
            it ("wnid TAB words") holds the readable names.
        split: Only names the shards.
    """

    def __init__(self, root: Path, split: str):
        self._tars: dict[str, list[Entry]] = {}
        parent, container = (root, "") if root.is_dir() else (root.parent, root.name)
        for entry in iter_entries(parent, container):
            wnid = entry.basename.partition(".")[0]
            is_tar = entry.basename.endswith(TAR_ENDINGS)
            if entry.rejection_reason is None and WNID.fullmatch(wnid) and is_tar:
                self._tars.setdefault(wnid, []).append(entry)
        layout = "a tar of tars" if root.is_file() else "a tar per synset"
        names = sorted(self._tars)
        if not names and root.is_dir():
            layout = "class folders"
            names = sorted(path.name for path in root.iterdir() if WNID.fullmatch(path.name) and path.is_dir())
        if not names:
            raise UserError(f"SRC {root}: no synset; expected n01440764.tar, ... or n01440764/, ...")
        super().__init__("imagenet21k", layout, str(parent), Classes(tuple(names), _read_words(root, names)))

    def samples(self) -> Iterator[Sample]:
        for label, wnid in enumerate(self.classes.names):
            for entry in self._class_entries(wnid):
                yield Sample(make_key(entry.basename), entry.location, label, entry.rejection_reason)

    def _class_entries(self, wnid: str) -> Iterator[Entry]:
        if not self._tars:
            yield from iter_entries(self.root, wnid)
        for tar in self._tars.get(wnid, ()):
            yield from iter_nested_entries(self.root, tar)


def _read_words(root: Path, wnids: list[str]) -> tuple[str, ...]:
    path = root / "words.txt"
    if not root.is_dir() or not path.is_file():
        return ()
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    words = {wnid: text for wnid, _, text in (line.partition("\t") for line in lines)}
    return tuple(words[wnid] for wnid in wnids) if all(wnid in words for wnid in wnids) else ()
