"""Exceptions that end a command with one line for the user and an exit code, never a traceback."""

from collections.abc import Sequence

from data_prep.errors import StoppedEarly, UserError
from data_prep.optional_packages import check_one_dali, missing_package_error

__all__ = [
    "AllRanksError",
    "DeviceError",
    "Diverged",
    "StoppedEarly",
    "StorageTimeout",
    "UserError",
    "check_one_dali",
    "join_names",
    "missing_package_error",
]


class StorageTimeout(UserError):
    """Storage that did not respond within the timeout and all retries; the next start may succeed."""


class AllRanksError(UserError):
    """A UserError that every rank raises together; only rank 0 prints it."""


class DeviceError(StoppedEarly):
    """A GPU, its driver or a library failed, not the data; the next start, perhaps on another node, may succeed."""


class Diverged(RuntimeError):
    """Training that diverged although the guard skipped steps and rolled back. Exit code 4."""


def join_names(names: Sequence[str], limit: int = 3) -> str:
    """Join the first `limit` names for a message, with the number of the others."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
