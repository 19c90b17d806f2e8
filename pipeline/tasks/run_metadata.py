"""RUN/weights.json: what a fine-tuning began with, and what its checkpoints cannot say of themselves.

Invariant: it is written once, at the first start. A later start only adds what an earlier version left out.
"""

from pathlib import Path

from pydantic import Field, model_validator

from pipeline.errors import UserError
from pipeline.io.atomic import read_json, write_json
from pipeline.recipe.loading import validate
from pipeline.recipe.sections import Section

WEIGHTS_JSON = "weights.json"


class InitialWeights(Section):
    encoder: str
    """In words."""
    digest: str
    """Of its weights."""
    heads: int = Field(ge=1)
    """Of its attention; the rest of its shape is its weights'."""
    classes: tuple[str, ...]
    """The shard set's, in the order of the logits."""
    class_names: tuple[str, ...]
    """For people, class by class, or empty."""

    @model_validator(mode="after")
    def _of_all_classes(self) -> "InitialWeights":
        if self.class_names and len(self.class_names) != len(self.classes):
            raise ValueError(f"class_names: {len(self.class_names)} names of {len(self.classes)} classes")
        return self


def load_or_create(run: Path, found: InitialWeights) -> InitialWeights:
    """What the run began with: `found`, where it begins now. UserError as `read_begun`."""
    path = run / WEIGHTS_JSON
    tree = _tree(path) if path.exists() else {}
    whole = {**found.model_dump(mode="json"), **tree}
    begun = validate(InitialWeights, whole, str(path))
    if whole != tree:
        write_json(path, whole)
    return begun


def load_initial_weights(run: Path) -> InitialWeights:
    """UserError where the run does not say, or it cannot be read."""
    path = run / WEIGHTS_JSON
    tree = _tree(path)
    if missing := [key for key in ("heads", "classes", "class_names") if key not in tree]:
        raise UserError(
            f"{path}: says nothing of {', '.join(missing)}: the run was begun by an earlier version; start "
            "the same `finetune` command once more, which adds that and trains nothing again"
        )
    return validate(InitialWeights, tree, str(path))


def _tree(path: Path) -> dict:
    tree = read_json(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: is not what a fine-tuning writes, a mapping of keys; mend it")
    return tree
