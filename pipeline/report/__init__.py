"""Runs as a page: what `python -m pipeline report` writes."""
