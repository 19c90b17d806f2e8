"""Trained weights of runs and files, and their names in other libraries."""
