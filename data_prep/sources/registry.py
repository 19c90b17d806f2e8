"""Registry of the data sources: name, help, splits and options of each `python -m data_prep SOURCE` command.

Invariant: importing this module loads only the standard library; the module of a source is imported
when the source is opened.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.labels import LABEL_CHOICES
from data_prep.sources.sample import Source


@dataclass(frozen=True)
class SourceType:
    """A kind of data source."""

    factory: str  # "module:callable", called with (root, split, **options); returns a Source
    help: str
    example: str
    splits: tuple[str, ...] | None = None  # values of --split, the default first; None: any name, default "train"
    orientation: str = "ignore"  # default of --orientation
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # flag: arguments of add_argument()
    accepts_patterns: bool = False  # whether SRC may be a brace pattern or URL; then the factory gets it as text

    def open(self, root: Path | str, split: str, arguments: Mapping[str, Any]) -> Source:
        """Open the source at `root` with the parsed command line. Raises UserError if there is none."""
        module, _, name = self.factory.partition(":")
        factory = getattr(importlib.import_module(module), name)
        names = [flag.removeprefix("--").replace("-", "_") for flag in self.options]
        return factory(root, split, **{name: arguments[name] for name in names})


LABEL_OPTIONS: dict[str, dict[str, Any]] = {
    "--labels": {
        "choices": LABEL_CHOICES,
        "default": "auto",
        "help": "cls: KEY.cls files; folders: the folder of a key; none: no labels; auto: cls files if the first tar "
        "has any, else folders if its samples are in several folders (default)",
    },
    "--label-key": {"metavar": "KEY", "help": "the label is this key of KEY.json"},
}

SOURCES = {
    "folder": SourceType(
        factory="data_prep.sources.image_archive:open_folder_or_archive",
        help="build a shard set from any folder or archive of images; class subfolders become labels",
        example="folder ~/photographs shards/ --resize 256 --workers 8",
        orientation="apply",
        options={
            "--labels": {
                "choices": ("auto", "folders", "none"),
                "default": "auto",
                "help": "folders: the first folder of a path is the class; none: no labels; auto: labels if there are "
                "subfolders and no image is next to them (default)",
            }
        },
    ),
    "imagenet": SourceType(
        factory="data_prep.sources.imagenet:ImageNetSource",
        help="build ImageNet-1k from the official archives, class folders or Kaggle's tree",
        example="imagenet ~/ILSVRC2012 shards/ --split train",
        splits=("train", "val"),
        options={"--layout": {"choices": ("archives", "folders", "kaggle"), "help": "default: detected, and printed"}},
    ),
    "imagenet21k": SourceType(
        factory="data_prep.sources.imagenet21k:ImageNet21kSource",
        help="build ImageNet-21k from a tar per synset",
        example="imagenet21k ~/winter21 shards/ --check structure --workers 16",
    ),
    "openimages": SourceType(
        factory="data_prep.sources.openimages:OpenImagesSource",
        help="build OpenImages from folders or archives, with labels, boxes and attribution",
        example="openimages ~/openimages shards/ --split train --resize 512",
        splits=("train", "validation", "test"),
    ),
    "coco": SourceType(
        factory="data_prep.sources.coco:CocoSource",
        help="build COCO from its zips or folders, with instances and captions",
        example="coco ~/coco shards/ --split train",
    ),
    "ade20k": SourceType(
        factory="data_prep.sources.ade20k:Ade20kSource",
        help="build ADE20K, or a data set in its layout, with label maps",
        example="ade20k ~/ADEChallengeData2016.zip shards/ --split training",
        splits=("training", "validation"),
        orientation="apply",
        options={
            "--classes": {
                "type": Path,
                "metavar": "FILE",
                "help": "class names in the order of their numbers, one per line or a table (default: "
                "objectInfo150.txt or classes.txt of SRC)",
            }
        },
    ),
    "webdataset": SourceType(
        factory="data_prep.sources.webdataset:WebDatasetSource",
        help="rebuild WebDataset tars (a folder, a brace pattern or a URL): repair, re-encode, shuffle, re-shard",
        example="webdataset 'laion/{00000..00127}.tar' shards/ --resize 256",
        options=LABEL_OPTIONS,
        accepts_patterns=True,
    ),
    "parquet": SourceType(
        factory="data_prep.sources.parquet:ParquetSource",
        help="build from parquet files of images as Hugging Face publishes them",
        example="parquet ~/imagenet-1k/data shards/ --split train",
        options={
            "--image-column": {"metavar": "NAME", "help": "default: the column of images, if there is one"},
            "--label-column": {"metavar": "NAME", "help": "default: the ClassLabel, or label; none: no labels"},
        },
    ),
}
