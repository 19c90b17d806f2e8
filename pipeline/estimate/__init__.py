"""The cost of a recipe, without running it."""
