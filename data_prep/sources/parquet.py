"""Source: parquet files of images, as the Hugging Face `datasets` library writes them.

Invariant: the plan needs only schemas, row counts and the columns of labels and paths; no image is read before the
build. Images are then copied row group by row group into files that can be read at random (parquet_staging.py).

Image column: a struct of bytes and path, or binary. Label column: numbers, whose names are those of the ClassLabel in
the schema's metadata if there is one, or texts.
"""

import json
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import UserError
from data_prep.labels import find_classes
from data_prep.parquet_staging import StageJob, open_parquet
from data_prep.sources.sample import Classes, Location, Sample, Source, Storage, make_key
from data_prep.string_column import StringColumn, has_repeated

_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_LABEL_NAMES = ("label", "labels")
_NO_COLUMN = "none"


class ParquetSource(Source):
    """Parquet files of images and labels.

    Args:
        root: A parquet file, or a folder with parquet files at any depth.
        split: Selects the files that have it in their names ("train-00000-of-00294.parquet", "train/0000.parquet"). If
            no name has a split, all files are read.
        image_column, label_column: Names of columns; None finds them by type. "none" for no labels.
    """

    def __init__(self, root: Path, split: str, image_column: str | None, label_column: str | None):
        folder, names = _find_files(root, split)
        self._files = names
        schema = open_parquet(folder / names[0]).schema_arrow
        features = _read_features(schema)
        self._image = _find_image_column(folder / names[0], schema, features, image_column)
        label = _find_label_column(folder / names[0], schema, features, label_column, self._image)
        self._num_rows, self._sizes = array("Q"), []  # of each file; estimated bytes of an image of each row group
        self._paths: StringColumn | None = StringColumn()
        labels: list[Any] = []
        for name in names:
            labels += self._read_metadata(folder / name, schema, label)
        layout = f"{self._image}, {label or 'no labels'}"
        super().__init__("parquet", layout, str(folder))
        self._labels = self._set_classes(labels, features.get(label or "", {}).get("names"))
        if self._paths is not None and has_repeated(make_key(self._paths[i]) for i in range(len(self._paths))):
            self._paths = None

    def samples(self) -> Iterator[Sample]:
        row = 0
        for name, sizes in zip(self._files, self._sizes, strict=True):
            for row_in_file, size in enumerate(np.repeat(*np.array(sizes, np.int64)).tolist()):
                path = self._paths[row] if self._paths is not None else ""
                key = make_key(path or f"{name.removesuffix('.parquet')}/{row_in_file:06d}.jpg")
                member = f"row {row_in_file}" + (f" {path}" if path else "")
                label = int(self._labels[row]) if len(self._labels) else -1
                unlabeled = "no_class: its label is none of the classes" if self.classes.names and label < 0 else None
                location = Location(name, member, row_in_file, size, Storage.PARQUET)
                yield Sample(key, location, label, unlabeled)
                row += 1

    def staging_job(self, directory: Path) -> StageJob:
        mean_bytes = [max(1, int(np.dot(sizes, rows)) // max(1, sum(rows))) for sizes, rows in self._sizes]
        return StageJob(directory, Path(self.root), tuple(self._files), self._image, tuple(self._num_rows), mean_bytes)

    def _read_metadata(self, path: Path, schema: Any, label: str | None) -> list[Any]:
        """Append a file's row counts, image sizes and paths; return its labels."""
        file = open_parquet(path)
        leaves = [file.schema.column(i).path for i in range(len(file.schema))]
        if file.schema_arrow.names != schema.names or self._image not in leaves:
            raise UserError(f"{path}: its columns differ from those of {self._files[0]}; select files of one data set")
        column = leaves.index(self._image)
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        rows = [group.num_rows for group in groups]
        sizes = [group.column(column).total_uncompressed_size // max(1, group.num_rows) for group in groups]
        self._sizes.append((sizes, rows))
        self._num_rows.append(sum(rows))
        path_column = self._image.removesuffix(".bytes") + ".path"
        if path_column not in leaves:
            self._paths = None
        if self._paths is not None:
            texts = _read_column(file, path, path_column)
            if all(texts):
                for text in texts:
                    self._paths.append(text.rpartition("/")[2])
            else:
                self._paths = None
        return _read_column(file, path, label) if label else []

    def _set_classes(self, labels: list[Any], names: list[str] | None) -> np.ndarray:
        """Set the classes. Returns the position of each row's label, -1 if it has none; empty without labels."""
        if all(label is None or label == -1 for label in labels):  # test splits have -1
            return np.empty(0, np.int64)
        if names:
            self.classes = Classes(tuple(map(str, names)))
            known = [isinstance(label, int) and 0 <= label < len(names) for label in labels]
            return np.array([label if ok else -1 for label, ok in zip(labels, known, strict=True)], np.int64)
        texts = [None if label is None or label == -1 else str(label) for label in labels]
        try:
            self.classes = Classes(find_classes(text for text in texts if text is not None))
        except ValueError as error:
            raise UserError(f"SRC {self.root}: {error}; choose another --label-column, or none") from error
        position_of = {name: position for position, name in enumerate(self.classes.names)}
        return np.array([-1 if text is None else position_of[text] for text in texts], np.int64)


def _find_files(root: Path, split: str) -> tuple[Path, list[str]]:
    """Return the folder, and the split's files below it by name."""
    if root.is_file():
        return root.parent, [root.name]
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.parquet") if path.is_file())
    files = [name for name in files if not any(part.startswith(".") for part in name.split("/"))]
    if not files:
        raise UserError(f"SRC {root}: no parquet files; `datasets` writes one with Dataset.to_parquet(PATH)")
    words = {name: set(re.split(r"[^a-z0-9]+", name.lower())) for name in files}
    wanted = next((synonyms for synonyms in _SPLIT_WORDS.values() if split in synonyms), (split,))
    selected = [name for name in files if words[name] & set(wanted)]
    if selected:
        return root, selected
    present = [name for name, synonyms in _SPLIT_WORDS.items() if any(words[file] & set(synonyms) for file in files)]
    if present:
        raise UserError(f"SRC {root}: no {split} files; choose --split {' or '.join(present)}")
    return root, files


def _read_features(schema: Any) -> dict[str, Any]:
    """Return the `datasets` library's description of each column, {} if there is none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return {name: entry for name, entry in features.items() if isinstance(entry, dict)}


def _find_image_column(path: Path, schema: Any, features: dict[str, Any], wanted: str | None) -> str:
    """Return the path of the leaf column with the images' bytes."""
    leaves = {name: leaf for name in schema.names if (leaf := _image_leaf(schema.field(name)))}
    if wanted is None:
        declared = [name for name in leaves if features.get(name, {}).get("_type") == "Image"]
        candidates = declared or list(leaves)
        if len(candidates) > 1:
            raise UserError(f"{path}: several image columns, {', '.join(candidates)}; choose one with --image-column")
        wanted = candidates[0] if candidates else None
    if wanted not in leaves:
        what = f"column {wanted!r} holds no images" if wanted else "no column of images"
        raise UserError(f"{path}: {what} (bytes, or a struct with bytes); its columns are {', '.join(schema.names)}")
    return leaves[wanted]


def _image_leaf(field: Any) -> str | None:
    import pyarrow.types as types

    def is_binary(type_: Any) -> bool:
        return types.is_binary(type_) or types.is_large_binary(type_)

    if is_binary(field.type):
        return field.name
    if types.is_struct(field.type):
        index = field.type.get_field_index("bytes")
        if index >= 0 and is_binary(field.type.field(index).type):
            return f"{field.name}.bytes"
    return None


def _find_label_column(path: Path, schema: Any, features: dict[str, Any], wanted: str | None, image: str) -> str | None:
    if wanted == _NO_COLUMN:
        return None
    if wanted is not None:
        if wanted not in schema.names or wanted == image.partition(".")[0]:
            raise UserError(f"{path}: no label column {wanted!r}; its columns are {', '.join(schema.names)}")
        return wanted
    declared = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    usual = [name for name in declared or schema.names if name in _LABEL_NAMES]
    if len(declared) > 1 and not usual:
        raise UserError(f"{path}: several label columns, {', '.join(declared)}; choose one with --label-column")
    return next(iter(usual or declared), None)


def _read_column(file: Any, path: Path, column: str) -> list[Any]:
    import pyarrow as pa

    try:
        values = file.read(columns=[column]).flatten().column(0).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}); download it again") from error
    if any(not (value is None or isinstance(value, int | str)) for value in values):
        raise UserError(f"{path}: column {column} holds no numbers or texts; choose another --label-column, or none")
    return values
