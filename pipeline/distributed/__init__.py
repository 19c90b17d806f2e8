"""Processes, collectives, hardware and logging."""
