"""Prediction targets, one module per kind."""

from pipeline.methods.targets.target import HogTarget, PixelTarget, Target, TokenTarget, build_target

__all__ = ["HogTarget", "PixelTarget", "Target", "TokenTarget", "build_target"]
