"""ImageNet-1k as its owners publish it, and as people keep it.

    archives  ILSVRC2012_img_train.tar (a tar per class inside), or ILSVRC2012_img_val.tar with the devkit
    folders   train/<wnid>/*.JPEG, val/<wnid>/*.JPEG, or the class folders themselves
    kaggle    [ILSVRC/]Data/CLS-LOC/{train,val} with LOC_val_solution.csv and LOC_synset_mapping.txt

Invariant: a label is the position of the image's wnid among the sorted wnids. The devkit's own ids (1 to
1000) are in another order and never become labels; they are only the way from a validation image to its wnid.
"""

import csv
import io
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from data_prep.errors import UserError
from data_prep.sources.containers import Entry, entries, entries_inside
from data_prep.sources.sample import Classes, PlainSource, Sample, key_of

LAYOUTS = ("archives", "folders", "kaggle")
TRAIN_TAR, VAL_TAR, DEVKIT = (
    "ILSVRC2012_img_train.tar",
    "ILSVRC2012_img_val.tar",
    "ILSVRC2012_devkit_t12.tar.gz",
)
WNID = re.compile(r"n[0-9]{8}")
_PUBLISHED = {"train": 1_281_167, "val": 50_000}
_VAL_NUMBER = re.compile(r"ILSVRC2012_val_([0-9]{8})\b")


class ImageNetSource(PlainSource):
    """split: train or val. layout: one of LAYOUTS, or None to recognise it. Raises UserError when SRC has
    none."""

    def __init__(self, root: Path, split: str, layout: str | None = None):
        if root.is_file() and root.name in (TRAIN_TAR, VAL_TAR):
            root = root.parent
        found = {name: place for name in LAYOUTS if (place := _find(root, split, name)) is not None}
        if layout is not None:
            found = {name: place for name, place in found.items() if name == layout}
        if not found:
            archive = TRAIN_TAR if split == "train" else f"{VAL_TAR} with {DEVKIT}"
            wanted = f"the layout {layout}" if layout else "any layout"
            raise UserError(
                f"SRC {root} holds no ImageNet {split} set in {wanted}: expected {archive}, {split}/<wnid>/ "
                f"or Data/CLS-LOC/{split}/"
            )
        layout, self._container = next(iter(found.items()))
        super().__init__("imagenet", layout, str(root), expected=_PUBLISHED[split])
        self._wnid_of = self._open(split)
        self._label_of = {wnid: label for label, wnid in enumerate(self.classes.names)}

    def samples(self) -> Iterator[Sample]:
        for entry in self._entries():
            wnid = self._wnid_of(entry)
            label = self._label_of.get(wnid, -1)
            rejection_reason = entry.rejection_reason or (
                None if label >= 0 else "no_class: its class is not known"
            )
            yield Sample(key_of(entry.base), entry.location, label, rejection_reason)

    def _open(self, split: str) -> Callable[[Entry], str | None]:
        """Sets the classes. Returns what gives an image's wnid."""
        root = Path(self.root)
        readable = _synset_mapping(root) or (
            _devkit_names(root / DEVKIT) if (root / DEVKIT).is_file() else {}
        )
        self._tars = None
        if self.layout == "archives" and split == "train":
            self._tars = [entry for entry in entries(root, TRAIN_TAR) if WNID.fullmatch(_stem(entry))]
            wnids = sorted({_stem(entry) for entry in self._tars})
            wnid_of = _wnid_in_archive_name
        elif (self.layout, split) == ("archives", "val"):
            truth = _devkit_truth(root / DEVKIT)
            wnids, wnid_of = sorted(readable), lambda entry: truth.get(_val_number(entry))
        elif (self.layout, split) == ("kaggle", "val"):
            truth = _kaggle_truth(root)
            wnids, wnid_of = (
                sorted(readable or set(truth.values())),
                lambda entry: truth.get(_stem(entry)),
            )
        else:
            folder = root / self._container
            wnids = sorted(name for name in os.listdir(folder) if WNID.fullmatch(name))
            wnid_of = _wnid_in_path
        if not wnids:
            raise UserError(f"{root / self._container} holds no class (n01440764, ...)")
        names = tuple(readable[wnid] for wnid in wnids) if all(wnid in readable for wnid in wnids) else ()
        self.classes = Classes(tuple(wnids), names)
        return wnid_of

    def _entries(self) -> Iterator[Entry]:
        if self._tars is None:
            yield from entries(self.root, self._container)
            return
        for outer in self._tars:
            if outer.rejection_reason:
                raise UserError(f"{outer.location} is no archive but {outer.rejection_reason}")
            yield from entries_inside(self.root, outer)


def _find(root: Path, split: str, layout: str) -> str | None:
    """The container below root that holds the images in this layout, or None."""
    if layout == "archives":
        name = TRAIN_TAR if split == "train" else VAL_TAR
        if not (root / name).is_file():
            return None
        if split == "val" and not (root / DEVKIT).is_file():
            raise UserError(f"SRC {root} has {VAL_TAR} but not {DEVKIT}, which holds its labels")
        return name
    if layout == "kaggle":
        for below in (f"ILSVRC/Data/CLS-LOC/{split}", f"Data/CLS-LOC/{split}"):
            if (root / below).is_dir():
                return below
        return None
    for below in (split, "."):
        folder = root / below
        if folder.is_dir() and any(WNID.fullmatch(name) for name in os.listdir(folder)):
            return below if below != "." else ""
    return None


def _stem(entry: Entry) -> str:
    return entry.base.partition(".")[0]


def _wnid_in_archive_name(entry: Entry) -> str:
    return entry.location.member.partition(".")[0]  # n01440764.tar/n01440764_10026.JPEG


def _wnid_in_path(entry: Entry) -> str:
    return entry.name.partition("/")[0]


def _val_number(entry: Entry) -> int:
    match = _VAL_NUMBER.match(entry.base)
    return int(match[1]) if match else -1


def _devkit_file(devkit: Path, ending: str) -> bytes:
    try:
        with tarfile.open(devkit) as tar:
            for member in tar:
                if member.name.endswith(ending) and member.isreg():
                    return tar.extractfile(member).read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{devkit} can't be read ({error}): download it again") from None
    raise UserError(f"{devkit} holds no {ending}: it is not the ILSVRC2012 task 1 and 2 devkit")


def _devkit_synsets(devkit: Path) -> dict[int, tuple[str, str]]:
    """ILSVRC id -> (wnid, words) of the leaf classes."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        synsets = loadmat(io.BytesIO(_devkit_file(devkit, "data/meta.mat")), squeeze_me=True)["synsets"]
        return {
            int(row["ILSVRC2012_ID"]): (str(row["WNID"]), str(row["words"]))
            for row in synsets
            if int(row["num_children"]) == 0
        }
    except (MatReadError, KeyError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"{devkit}: its meta.mat can't be read ({error})") from None


def _devkit_names(devkit: Path) -> dict[str, str]:
    return dict(_devkit_synsets(devkit).values())


def _devkit_truth(devkit: Path) -> dict[int, str]:
    """Number of a validation image, from 1 -> wnid."""
    synsets = _devkit_synsets(devkit)
    lines = _devkit_file(devkit, "data/ILSVRC2012_validation_ground_truth.txt").split()
    try:
        return {number: synsets[int(line)][0] for number, line in enumerate(lines, 1)}
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{devkit}: the validation ground truth holds {error}, which is no class of it"
        ) from None


def _synset_mapping(root: Path) -> dict[str, str]:
    """wnid -> words, of Kaggle's LOC_synset_mapping.txt where there is one."""
    for path in (root / "LOC_synset_mapping.txt", root / "ILSVRC" / "LOC_synset_mapping.txt"):
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            return {
                wnid: words
                for wnid, _, words in (line.partition(" ") for line in lines)
                if WNID.fullmatch(wnid)
            }
    return {}


def _kaggle_truth(root: Path) -> dict[str, str]:
    """Image id -> wnid."""
    path = root / "LOC_val_solution.csv"
    if not path.is_file():
        raise UserError(
            f"SRC {root} has no LOC_val_solution.csv, which holds the labels of Kaggle's val images"
        )
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.reader(file)
        return {row[0]: row[1].split(" ", 1)[0] for row in rows if len(row) == 2 and WNID.match(row[1])}
