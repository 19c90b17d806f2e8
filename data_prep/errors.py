"""Exceptions that end a command with one line for the user and an exit code, never a traceback.

`pipeline.errors` adds those of training.
"""


class UserError(ValueError):
    """A mistake in arguments, recipe, data or storage that the user can fix. Exit code 2."""


class StoppedEarly(Exception):
    """A command stopped before its end with its progress saved. Exit code 75; the same command resumes."""
