"""Masked-image-modeling methods, one file per paper. `build_method` builds the one that a recipe names."""

from pipeline.methods import beit, efficient_mae, emae, lomar, mae  # noqa: F401 (each registers its method)
from pipeline.methods.method import Method, MethodOutput, Reconstruction
from pipeline.methods.registry import build_method, register_method

__all__ = ["Method", "MethodOutput", "Reconstruction", "build_method", "register_method"]
