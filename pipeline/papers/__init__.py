"""The tables and figures of the papers as experiments: published numbers, commands, and measurements.

Invariant: an experiment is data; its commands are those that a user would run.
"""
