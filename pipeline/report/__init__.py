"""The HTML report of `python -m pipeline report`."""
