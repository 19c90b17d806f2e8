"""RUN/weights.json: metadata of a fine-tuning's initial weights that its checkpoints do not contain.

Invariant: keys are written once, at the first start; later starts only add keys that are missing.
"""

from pathlib import Path

from pydantic import Field, model_validator

from pipeline.errors import UserError
from pipeline.io.atomic import read_json, write_json
from pipeline.recipe.loading import validate
from pipeline.recipe.sections import Section
from pipeline.train.run_directory import RunDirectory


class InitialWeights(Section):
    encoder: str
    """Description for messages."""
    digest: str
    """SHA-256 of the encoder's weights."""
    heads: int = Field(ge=1)
    """Attention heads; the weights determine the rest of the shape."""
    classes: tuple[str, ...]
    """The shard set's classes, in the order of the logits."""
    class_names: tuple[str, ...]
    """Readable names of the classes, or empty."""
    category_ids: tuple[int, ...] = ()
    """COCO's ids of the classes, or empty."""

    @model_validator(mode="after")
    def _validate_names(self) -> "InitialWeights":
        if self.class_names and len(self.class_names) != len(self.classes):
            raise ValueError(f"class_names: {len(self.class_names)} names for {len(self.classes)} classes")
        return self


def load_or_create(run: RunDirectory, current: InitialWeights) -> InitialWeights:
    """Read the run's metadata, with missing keys added from `current` and written back.

    Raises:
        UserError: If the file is damaged.
    """
    path = run.initial_weights
    tree = _read(path) if path.exists() else {}
    complete = {**current.model_dump(mode="json"), **tree}
    initial = validate(InitialWeights, complete, str(path))
    if complete != tree:
        write_json(path, complete)
    return initial


def load_initial_weights(run: RunDirectory) -> InitialWeights:
    """Read the run's metadata. Raises UserError if the file is damaged, missing or lacks a key."""
    path = run.initial_weights
    tree = _read(path)
    if missing := [key for key in ("heads", "classes", "class_names") if key not in tree]:
        raise UserError(
            f"{path}: lacks {', '.join(missing)}, added in a later version; run the same `finetune` command "
            "again to add them"
        )
    return validate(InitialWeights, tree, str(path))


def _read(path: Path) -> dict:
    tree = read_json(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: not a mapping of keys; restore or remove it")
    return tree
