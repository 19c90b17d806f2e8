"""How a command ends early: each error is one line for the user, never a traceback."""


class UserError(ValueError):
    """Something for the user to mend (arguments, source, disk). Exit code 2."""


class BuildStopped(RuntimeError):
    """The build stopped with all finished shards kept; the same command continues it. Exit code 75."""
