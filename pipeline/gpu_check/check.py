"""What a check gets and what it returns.

Invariant: a verdict is "passed" only if the value was compared with the bound. On a CPU, the value of a check that is
about a GPU says what was compared instead.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from pipeline.recipe import Recipe, load_recipe

Verdict = Literal["passed", "failed", "below goal", "measured", "not checked"]
"""Only "failed" makes the command exit with 1. "below goal": correct, but slower than the goal. "measured": there is no
bound."""

REDUCED = (
    "model.name=vit_tiny",
    "model.patch_size=8",
    "model.width=32",
    "model.depth=2",
    "model.heads=4",
    "model.decoder_width=32",
    "model.decoder_depth=1",
    "model.decoder_heads=4",
    "data.image_size=64",
    "engine.precision=fp32",
    "train.steps=8",
    "optim.warmup_steps=0",
)
"""Overrides that make a recipe small enough for a check on the CPU."""


@dataclass(frozen=True)
class Context:
    """What the checks of one invocation have in common. All values are JSON."""

    device: Literal["cuda", "cpu"]
    gpus: int
    """Ranks of the checks that use several GPUs (on the CPU: processes)."""
    photographs: str
    """Shard set of synthetic JPEGs of every kind (sample_images.py)."""
    data: str
    """Shard set for the measurements: the user's, or `photographs`."""
    folder: str
    """Directory for files of the checks, deleted afterwards."""
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """What earlier checks measured, by the check's name."""

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def scratch(self) -> Path:
        return Path(self.folder)

    def recipe(self, name: str, *overrides: str) -> Recipe:
        """Load a shipped recipe, reduced on the CPU."""
        return load_recipe(name, [*(() if self.on_gpu else REDUCED), *overrides])


@dataclass(frozen=True)
class Finding:
    """The result of a check."""

    value: str
    """What was found, in a few words."""
    bound: str
    """What it has to satisfy."""
    verdict: Verdict
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Measurements, for the recommended settings and for the report's tables."""


def judge(passed: bool) -> Verdict:
    """Return the verdict of a comparison with a bound."""
    return "passed" if passed else "failed"


def largest_difference(values: Sequence[float], expected: Sequence[float]) -> float:
    """Return the largest relative difference, infinite if a number is not finite or one is missing."""
    if len(values) != len(expected) or not all(map(math.isfinite, [*values, *expected])):
        return math.inf
    return max(abs(a - b) / abs(b) for a, b in zip(values, expected, strict=True))


def run_check_as_json(function: str, context: dict[str, Any]) -> dict[str, Any]:
    """Run the check "module:function" on a context as JSON; return its finding as JSON."""
    return asdict(resolve(function)(Context(**context)))


def resolve(function: str) -> Any:
    """Import "module:function"."""
    module, _, name = function.partition(":")
    return getattr(import_module(module), name)
