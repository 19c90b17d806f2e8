"""Recipes: typed, validated YAML files that determine what is trained."""

from pipeline.recipe.pretrain import Recipe, load_recipe

__all__ = ["Recipe", "load_recipe"]
