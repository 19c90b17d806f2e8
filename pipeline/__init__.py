"""Pre-train vision transformers on shard sets by masked image modeling. Core: `pipeline/train/trainer.py`."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.data.reader import ShardReader
    from pipeline.methods import build_method
    from pipeline.recipe import load_recipe
    from pipeline.weights.run import load_run

__version__ = "0.1.0"
__all__ = ["ShardReader", "build_method", "load_recipe", "load_run"]
_MODULES = {
    "ShardReader": "pipeline.data.reader",
    "build_method": "pipeline.methods",
    "load_recipe": "pipeline.recipe",
    "load_run": "pipeline.weights.run",
}


def __getattr__(name: str) -> object:
    """Import public names on first use: torch and timm take seconds to import."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
