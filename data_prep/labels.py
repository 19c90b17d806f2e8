"""Labels of WebDataset samples: how they are stored, and which classes they make.

Invariant: a label is a pure function of a sample's key and its label file, and the classes are a pure function of
the set of labels, so tars that are read separately, in any order, get the same labels.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from data_prep.errors import UserError

LABEL_CHOICES = ("auto", "cls", "folders", "none")
MAX_CLASSES = 1_000_000
"""Larger numbers, and more names, are identifiers, not labels."""


@dataclass(frozen=True, slots=True)
class LabelRule:
    """Locate the label of a sample.

    Attributes:
        source: "cls": the content of KEY.cls; "json": the value of `key` in KEY.json; "folders": the folder of the
            key; "none": no labels.
        key: Key of the json object, for source "json".
    """

    source: str = "none"
    key: str | None = None

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "LabelRule":
        """Read the rule from the options of a manifest; see `to_options`."""
        return cls(options.get("labels", "none"), options.get("label_key"))

    def to_options(self) -> dict[str, str | None]:
        return {"labels": self.source, "label_key": self.key}

    @property
    def extension(self) -> str | None:
        """Extension of the file that holds the label; None if no file does."""
        return self.source if self.source in ("cls", "json") else None

    def read_label(self, key: str, content: bytes) -> str:
        """Return a sample's label: a class name, or a number without sign and leading zeros.

        Args:
            key: The sample's key.
            content: Content of its label file; ignored if the label is the folder.

        Raises:
            ValueError: If there is none.
        """
        if self.source == "folders":
            folder = key.rpartition("/")[0].rpartition("/")[2]
            if folder in ("", "."):
                raise ValueError("not in a folder, which would be its label")
            return folder.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        if self.source == "cls":
            return _normalize(content.decode(errors="replace"), "its .cls file")
        try:
            document = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError("its .json file is not valid") from error
        value = document.get(self.key) if isinstance(document, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError(f"its .json file has no number or text {self.key!r}")
        return _normalize(str(value), f"{self.key!r} in its .json file")

    def position(self, key: str, content: bytes, position_of: Mapping[str, int]) -> int:
        """Return a sample's position in the classes of an adopted set. Raises ValueError if it has none."""
        label = self.read_label(unquote(key), content)
        if label not in position_of:
            raise ValueError(f"{label!r} is none of the classes")
        return position_of[label]


def parse_label_options(labels: str, label_key: str | None) -> LabelRule | None:
    """Return the rule of the options --labels and --label-key; None if it is to be chosen by `choose_labels`.

    Raises:
        UserError: If they contradict each other.
    """
    if label_key is not None:
        if labels != "auto":
            raise UserError(f"--label-key {label_key}: cannot be combined with --labels {labels}; remove one")
        return LabelRule("json", label_key)
    return None if labels == "auto" else LabelRule(labels)


def _normalize(text: str, where: str) -> str:
    label = text.strip().encode("utf-8", "replace").decode()  # JSON may have lone surrogates
    if not label:
        raise ValueError(f"{where} is empty")
    if label.isascii() and label.isdigit():
        return str(int(label))
    if label[0] == "-" and label[1:].isdigit():
        raise ValueError(f"{where} has the negative number {label}")
    return label


def find_classes(labels: Iterable[str]) -> tuple[str, ...]:
    """Return the classes of a set of labels in the order of their positions.

    Numbers keep their value: if all labels are numbers, the classes are 0 to the largest. Names are sorted.

    Raises:
        ValueError: If a number is too large to be a label, or there are too many names.
    """
    names = set(labels)
    if len(names) > MAX_CLASSES:
        raise ValueError(f"more than {MAX_CLASSES:,} different labels")
    if names and all(name.isascii() and name.isdigit() for name in names):
        largest = max(map(int, names))
        if largest >= MAX_CLASSES:
            raise ValueError(f"the label {largest} is above {MAX_CLASSES - 1}")
        return tuple(map(str, range(largest + 1)))
    return tuple(sorted(names, key=lambda name: name.encode("utf-8", "surrogateescape")))
