"""The commands of `python -m pipeline`, grouped by purpose; each file has the arguments and the code that
runs them.

Invariant: only these modules parse arguments, and heavy libraries are imported when a command runs.
"""
