"""Source: ImageNet-1k in the layouts in which it is published and stored.

    archives  ILSVRC2012_img_train.tar (a tar per class inside), or ILSVRC2012_img_val.tar with the devkit
    folders   train/<wnid>/*.JPEG, val/<wnid>/*.JPEG, or the class folders themselves
    kaggle    [ILSVRC/]Data/CLS-LOC/{train,val} with LOC_val_solution.csv and LOC_synset_mapping.txt

Invariant: a label is the position of the image's wnid among the sorted wnids. The devkit's ids (1 to 1000)
have another order; they only map a validation image to its wnid and never become labels.
"""

import csv
import io
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from data_prep.errors import UserError
from data_prep.sources.containers import Entry, iter_entries, iter_nested_entries
from data_prep.sources.sample import Classes, Sample, Source, make_key

LAYOUTS = ("archives", "folders", "kaggle")
TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
WNID = re.compile(r"n[0-9]{8}")
_PUBLISHED = {"train": 1_281_167, "val": 50_000}
_VAL_NUMBER = re.compile(r"ILSVRC2012_val_([0-9]{8})\b")


class ImageNetSource(Source):
    """ImageNet-1k (ILSVRC2012 classification).

    Args:
        root: Folder of one of the layouts, or the train or val archive itself.
        split: "train" or "val".
        layout: One of LAYOUTS; None detects it.
    """

    def __init__(self, root: Path, split: str, layout: str | None = None):
        if root.is_file() and root.name in (TRAIN_TAR, VAL_TAR):
            root = root.parent
        candidates = {name: _find(root, split, name) for name in LAYOUTS if layout in (None, name)}
        containers = {name: container for name, container in candidates.items() if container is not None}
        if not containers:
            archive = TRAIN_TAR if split == "train" else f"{VAL_TAR} with {DEVKIT}"
            raise UserError(
                f"SRC {root}: no ImageNet {split} split in {f'the layout {layout}' if layout else 'any layout'}; "
                f"expected {archive}, {split}/<wnid>/ or Data/CLS-LOC/{split}/"
            )
        layout, self._container = next(iter(containers.items()))
        super().__init__("imagenet", layout, str(root), expected=_PUBLISHED[split])
        self._class_tars: list[Entry] | None = None
        self._wnid_of = self._read_classes(split)
        self._label_of = {wnid: label for label, wnid in enumerate(self.classes.names)}

    def samples(self) -> Iterator[Sample]:
        for entry in self._entries():
            label = self._label_of.get(self._wnid_of(entry) or "", -1)
            unknown = "no_class: its class is not known" if label < 0 else None
            yield Sample(make_key(entry.basename), entry.location, label, entry.rejection_reason or unknown)

    def _read_classes(self, split: str) -> Callable[[Entry], str | None]:
        """Set the classes. Returns the function from an image to its wnid."""
        wnid_of: Callable[[Entry], str | None]
        root = Path(self.root)
        readable = _read_synset_mapping(root)
        if not readable and (root / DEVKIT).is_file():
            readable = dict(_read_devkit_synsets(root / DEVKIT).values())
        if self.layout == "archives" and split == "train":
            self._class_tars = [entry for entry in iter_entries(root, TRAIN_TAR) if WNID.fullmatch(_stem(entry))]
            wnids = {_stem(entry) for entry in self._class_tars}
            wnid_of = _wnid_from_archive_name
        elif (self.layout, split) == ("archives", "val"):
            devkit_truth = _read_devkit_truth(root / DEVKIT)
            wnids, wnid_of = readable, lambda entry: devkit_truth.get(_val_number(entry))
        elif (self.layout, split) == ("kaggle", "val"):
            truth = _read_kaggle_truth(root)
            wnids, wnid_of = readable or truth.values(), lambda entry: truth.get(_stem(entry))
        else:
            wnids = (name for name in os.listdir(root / self._container) if WNID.fullmatch(name))
            wnid_of = _wnid_from_folder
        wnids = sorted(set(wnids))
        if not wnids:
            raise UserError(
                f"{root / self._container}: contains no class named by its WordNet ID (n01440764, ...); check SRC"
            )
        names = tuple(readable[wnid] for wnid in wnids) if all(wnid in readable for wnid in wnids) else ()
        self.classes = Classes(tuple(wnids), names)
        return wnid_of

    def _entries(self) -> Iterator[Entry]:
        if self._class_tars is None:
            yield from iter_entries(self.root, self._container)
            return
        for outer in self._class_tars:
            if outer.rejection_reason:
                raise UserError(f"{outer.location}: not an archive ({outer.rejection_reason})")
            yield from iter_nested_entries(self.root, outer)


def _find(root: Path, split: str, layout: str) -> str | None:
    """Return the container below root that holds the images in this layout, or None."""
    if layout == "archives":
        name = TRAIN_TAR if split == "train" else VAL_TAR
        if not (root / name).is_file():
            return None
        if split == "val" and not (root / DEVKIT).is_file():
            raise UserError(f"SRC {root}: {VAL_TAR} needs {DEVKIT}, which holds its labels; put it there")
        return name
    if layout == "kaggle":
        for below in (f"ILSVRC/Data/CLS-LOC/{split}", f"Data/CLS-LOC/{split}"):
            if (root / below).is_dir():
                return below
        return None
    for below in (split, ""):
        folder = root / below
        if folder.is_dir() and any(WNID.fullmatch(name) for name in os.listdir(folder)):
            return below
    return None


def _stem(entry: Entry) -> str:
    return entry.basename.partition(".")[0]


def _wnid_from_archive_name(entry: Entry) -> str:
    return entry.location.member.partition(".")[0]  # n01440764.tar/n01440764_10026.JPEG


def _wnid_from_folder(entry: Entry) -> str:
    return entry.name.partition("/")[0]


def _val_number(entry: Entry) -> int:
    match = _VAL_NUMBER.match(entry.basename)
    return int(match[1]) if match else -1


def _read_devkit_file(devkit: Path, ending: str) -> bytes:
    try:
        with tarfile.open(devkit) as tar:
            for member in tar:
                if member.name.endswith(ending) and member.isreg() and (file := tar.extractfile(member)):
                    return file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{devkit}: cannot be read ({error}); download it again") from error
    raise UserError(f"{devkit}: no {ending}; it must be the devkit of ILSVRC2012 tasks 1 and 2")


def _read_devkit_synsets(devkit: Path) -> dict[int, tuple[str, str]]:
    """Return ILSVRC id -> (wnid, words) of the leaf classes."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    content = io.BytesIO(_read_devkit_file(devkit, "data/meta.mat"))
    try:
        return {
            int(row["ILSVRC2012_ID"]): (str(row["WNID"]), str(row["words"]))
            for row in loadmat(content, squeeze_me=True)["synsets"]
            if int(row["num_children"]) == 0
        }
    except (MatReadError, KeyError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"{devkit}: its meta.mat cannot be read ({error}); download it again") from error


def _read_devkit_truth(devkit: Path) -> dict[int, str]:
    """Return number of a validation image, from 1 -> wnid."""
    synsets = _read_devkit_synsets(devkit)
    lines = _read_devkit_file(devkit, "data/ILSVRC2012_validation_ground_truth.txt").split()
    try:
        return {number: synsets[int(line)][0] for number, line in enumerate(lines, 1)}
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{devkit}: the validation ground truth has an unknown class {error}; download it again"
        ) from error


def _read_synset_mapping(root: Path) -> dict[str, str]:
    """Return wnid -> words from Kaggle's LOC_synset_mapping.txt, empty if there is none."""
    for path in (root / "LOC_synset_mapping.txt", root / "ILSVRC" / "LOC_synset_mapping.txt"):
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            words = (line.partition(" ") for line in lines)
            return {wnid: text for wnid, _, text in words if WNID.fullmatch(wnid)}
    return {}


def _read_kaggle_truth(root: Path) -> dict[str, str]:
    """Return image id -> wnid."""
    path = root / "LOC_val_solution.csv"
    if not path.is_file():
        raise UserError(f"SRC {root}: no LOC_val_solution.csv, which holds the labels of Kaggle's val images")
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.reader(file)
        return {row[0]: row[1].split(" ", 1)[0] for row in rows if len(row) == 2 and WNID.match(row[1])}
