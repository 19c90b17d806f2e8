"""Copy the images of parquet files into files that can be read at random.

A build shuffles the whole set, but in parquet an image can be read only with its row group. So each parquet file is
read once, front to back, and its images are written one after the other:

    .build/staged/FILE.images   the images' bytes
    .build/staged/FILE.npy      end of each image in it, uint64 (rows,); written last

Invariant: memory does not grow with the sizes of files and row groups. Removed with the build directory.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.atomic import temporary_name
from data_prep.build_shard import staging_directory, write_error
from data_prep.errors import UserError
from data_prep.workers import CountInput

_BATCH_BYTES = 16 << 20
_READ_BYTES = 1 << 20  # a read of a column


def open_parquet(path: Path) -> Any:
    """Open a pyarrow.parquet.ParquetFile that reads columns in small parts.

    Raises:
        UserError: If it is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, buffer_size=_READ_BYTES, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a valid parquet file ({error}); download it again") from error


@dataclass(frozen=True)
class StageJob:
    """Everything that a worker needs to stage parquet files.

    Attributes:
        directory: The shard set that is built.
        root: Folder of the parquet files.
        files: Their paths below it.
        column: Path of the column with the images' bytes: "image.bytes", or "image".
        num_rows, image_bytes: Rows, and estimated bytes of an image, of each file.
    """

    directory: Path
    root: Path
    files: tuple[str, ...]
    column: str
    num_rows: Sequence[int]
    image_bytes: Sequence[int]

    def is_finished(self, number: int) -> bool:
        try:
            images, ends_path = self._staged_paths(number)
            ends, size = np.load(ends_path, mmap_mode="r"), images.stat().st_size
        except (OSError, ValueError):
            return False
        return len(ends) == self.num_rows[number] and (not len(ends) or size == ends[-1])

    def open(self) -> Callable[[int, CountInput], None]:
        return self._stage

    def missing(self) -> list[int]:
        return [number for number in range(len(self.files)) if not self.is_finished(number)]

    def estimate_bytes(self, number: int) -> int:
        return self.num_rows[number] * self.image_bytes[number]

    def _stage(self, number: int, count_input: CountInput) -> None:
        name, (images, ends_path) = self.files[number], self._staged_paths(number)
        temporary = images.with_name(temporary_name(images.name))
        ends = np.zeros(self.num_rows[number], np.uint64)
        try:
            images.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(images.parent).free < self.estimate_bytes(number):
                raise write_error(self.directory)
            with open(temporary, "wb") as file:
                row = end = 0
                for image in self._read_images(number):
                    if row == len(ends):
                        raise self._changed_error(name)
                    end += file.write(image)
                    ends[row] = end
                    row += 1
                    count_input(len(image), len(image), 0, 0)
                if row < len(ends):
                    raise self._changed_error(name)
                file.flush()
                os.fsync(file.fileno())  # is_finished sees only the size, which may outlast the content
            if self.is_finished(number):  # by another array task, which may be reading it
                return
            os.replace(temporary, images)
            with open(temporary, "wb") as file:
                np.save(file, ends)
            os.replace(temporary, ends_path)
        except OSError as error:
            raise write_error(self.directory, error) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _changed_error(self, name: str) -> UserError:
        return UserError(f"{self.root / name}: has changed since the build was planned; restore it")

    def _read_images(self, number: int):
        """Yield the bytes of each row, b"" for a missing image."""
        import pyarrow as pa

        path = self.root / self.files[number]
        batch_rows = max(1, min(1024, _BATCH_BYTES // self.image_bytes[number]))
        batches = open_parquet(path).iter_batches(batch_rows, columns=[self.column], use_threads=False)
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{path}: cannot be read ({error}); download it again") from error
            if batch is None:
                return
            column = batch.column(0)
            if pa.types.is_struct(column.type):
                column = column.flatten()[0]
            for value in column:
                yield memoryview(value.as_buffer()) if value.is_valid else b""

    def _staged_paths(self, number: int) -> tuple[Path, Path]:
        base = staging_directory(self.directory) / self.files[number]
        return base.with_name(f"{base.name}.images"), base.with_name(f"{base.name}.npy")
