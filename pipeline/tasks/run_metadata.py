"""RUN/weights.json: what a fine-tuning began with, and what its checkpoints cannot say of themselves.

Invariant: it is written once, at the first start. A later start only adds what an earlier version left out.
"""

from pathlib import Path

from pydantic import Field, model_validator

from pipeline.errors import UserError
from pipeline.method_options import Section
from pipeline.recipe_file import checked
from pipeline.whole_file import read_json, write_json

BEGUN = "weights.json"


class Begun(Section):
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
    def _of_all_classes(self) -> "Begun":
        if self.class_names and len(self.class_names) != len(self.classes):
            raise ValueError(f"class_names: {len(self.class_names)} names of {len(self.classes)} classes")
        return self


def begin(run: Path, found: Begun) -> Begun:
    """What the run began with: `found`, where it begins now. UserError as `read_begun`."""
    path = run / BEGUN
    tree = _tree(path) if path.exists() else {}
    whole = {**found.model_dump(mode="json"), **tree}
    begun = checked(Begun, whole, str(path))
    if whole != tree:
        write_json(path, whole)
    return begun


def read_begun(run: Path) -> Begun:
    """UserError where the run does not say, or it cannot be read."""
    path = run / BEGUN
    tree = _tree(path)
    if missing := [key for key in ("heads", "classes", "class_names") if key not in tree]:
        raise UserError(
            f"{path}: says nothing of {', '.join(missing)}: the run was begun by an earlier version; start "
            "the same `finetune` command once more, which adds that and trains nothing again"
        )
    return checked(Begun, tree, str(path))


def _tree(path: Path) -> dict:
    tree = read_json(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: is not what a fine-tuning writes, a mapping of keys; mend it")
    return tree
