"""Recipes: typed, checked YAML files that decide what is trained."""

from pipeline.recipe.pretrain import Recipe, load_recipe

__all__ = ["Recipe", "load_recipe"]
