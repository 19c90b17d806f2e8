"""Data sources: each lists its samples in a fixed order, reads archives in place and writes nothing.

`sample.py` explains how to add one; `registry.py` lists all.
"""
