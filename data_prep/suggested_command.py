"""Which command makes a shard set of what the user has, for messages."""

import os
from pathlib import Path

_MAX_FOLDERS = 100  # subfolders to look into


def suggest_command(path: Path) -> str:
    """Return which command makes a shard set of a file, or of the files in a folder, by their names."""
    folders = [path, *sorted(path.glob("[!.]*/"))[:_MAX_FOLDERS]] if path.is_dir() else []
    for folder in folders:
        names = [entry.name for entry in folder.iterdir()] if os.access(folder, os.R_OK) else []
        if command := _command_for(folder, names):
            return command
    command = _command_for(path.parent, [path.name]) if path.is_file() else None
    return command or f"if it holds images, build one with `python -m data_prep folder {path} OUT`"


def _command_for(folder: Path, names: list[str]) -> str | None:
    for endings, advice, command in (
        ((".tar",), "index tar files with", f"adopt {folder}"),
        ((".tar.gz", ".tgz"), "build a set from compressed tar files with", f"webdataset {folder} OUT"),
        ((".parquet",), "build a set from parquet files with", f"parquet {folder} OUT"),
    ):
        if any(name.endswith(endings) and not name.startswith(".") for name in names):
            return f"{advice} `python -m data_prep {command}`"
    return None
