"""Add a data source for a folder of images whose classes and other columns are in labels.csv.

In the package, CsvSource belongs in data_prep/sources/csv_folder.py and CSV in data_prep/sources/registry.py, which
makes it the command `python -m data_prep csv SRC OUT`.
"""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from data_prep.__main__ import main
from data_prep.errors import UserError
from data_prep.sources.registry import SOURCES, SourceType
from data_prep.sources.sample import Classes, Details, Location, Sample, Source, make_key


class CsvSource(Source):
    """A folder with labels.csv, whose columns are file, class, and any others.

    Args:
        root: The folder.
        split: The value of --split; not used, because the folder has one split.
        listing: Name of the CSV file.
    """

    def __init__(self, root: Path, split: str, listing: str):
        try:
            with open(root / listing, newline="") as file:
                rows = list(csv.DictReader(file))
            self._rows = {make_key(row["file"]): row for row in rows}
            names = tuple(sorted({row["class"] for row in rows}))
        except (OSError, KeyError) as error:
            raise UserError(f"SRC {root / listing}: no columns file and class ({error}); check --listing") from error
        super().__init__("csv", listing, str(root), Classes(names))

    def samples(self) -> Iterator[Sample]:
        for key, row in self._rows.items():
            path = Path(self.root, row["file"])
            size = path.stat().st_size if path.is_file() else 0
            rejection_reason = None if path.is_file() else f"missing: listed as {row['file']}"
            label = self.classes.names.index(row["class"])
            yield Sample(key, Location(row["file"], size=size), label, rejection_reason)

    def details(self, key: str) -> Details:
        return Details({name: text for name, text in self._rows[key].items() if name not in ("file", "class")})


CSV = SourceType(
    factory=f"{__name__}:CsvSource",
    help="build a shard set from a folder with a CSV file of labels",
    example="csv ~/photographs shards/",
    options={"--listing": {"default": "labels.csv", "help": "name of the CSV file (default: labels.csv)"}},
)

if __name__ == "__main__":
    SOURCES["csv"] = CSV
    sys.exit(main(["csv", *sys.argv[1:]]))
