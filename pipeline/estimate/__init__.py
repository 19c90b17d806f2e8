"""Estimates of a recipe's cost, and a benchmark of its loader."""
