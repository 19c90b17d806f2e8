"""What a user can mend is a `UserError`: one line that says what, where and what to do, and exit code 2.
A run that cannot be trained on is `Diverged`, and exit code 4."""

from collections.abc import Sequence


class UserError(ValueError):
    """A mistake in arguments, recipe or data. The message is shown as it is, without a traceback."""


class Unanswered(UserError):
    """Storage that gave no answer in all the time it was given. It may answer the next start: a run with
    everything saved ends as `StoppedEarly`."""


class AgreedError(UserError):
    """One that all ranks have told each other, and raise together: rank 0 says it."""


class StoppedEarly(Exception):
    """A run that stopped before its end, with everything saved: exit code 75, the same command continues."""


class Diverged(RuntimeError):
    """Training that the guard cannot save. The message is shown as it is; exit code 4."""


def some(names: Sequence[str], at_most: int = 3) -> str:
    """The first of them, for a message."""
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more
