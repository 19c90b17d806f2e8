"""Recipe files: strict YAML, overridden by --set and validated by a typed model.

Invariant: a file that is not a valid recipe of the requested kind is a `UserError` that names the file and
the key.
"""

import difflib
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.errors import UserError
from pipeline.recipe.sections import Section

logger = logging.getLogger(__name__)
PRESETS_DIR = Path(__file__).parent / "presets"
DEPRECATED_KEYS = {
    "data.max_replaced": "data.max_undecodable",
    "data.readers": "data.read_threads",
    "data.threads": "data.decode_threads",
    "data.window_shards": "data.shuffle_window_shards",
    "guard.returns": "guard.max_rollbacks",
    "guard.skips_in_a_row": "guard.max_consecutive_skips",
    "method.efficient_mae.k": "method.efficient_mae.num_nearest",
}
"""Deprecated keys, still accepted, and their new names."""
MUTUALLY_EXCLUSIVE = (("train.steps", "train.epochs"), ("optim.warmup_steps", "optim.warmup_epochs"))
"""Pairs of which a recipe has at most one: an override of one removes the other."""


class RecipeFile(Section):
    """Base of all kinds of recipe."""

    COMMAND: ClassVar[str]
    """The command of `python -m pipeline` that takes this kind."""
    FOREIGN_SECTIONS: ClassVar[dict[str, str]] = {}
    """Sections that only other kinds have, and the command that takes those."""

    def to_yaml(self) -> str:
        """Return the complete recipe, defaults included, as YAML that `load` can read."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def differences(self, other: "RecipeFile") -> dict[str, tuple[Any, Any]]:
        """Return the keys, as "a.b.c", whose values differ, with this recipe's and the other's value."""
        ours, others = flatten(self.model_dump(mode="json")), flatten(other.model_dump(mode="json"))
        return {key: (ours[key], others[key]) for key in ours if ours[key] != others[key]}


AnyRecipe = TypeVar("AnyRecipe", bound=RecipeFile)
AnySection = TypeVar("AnySection", bound=Section)


def load(kind: type[AnyRecipe], name_or_path: str | Path, overrides: Sequence[str] = ()) -> AnyRecipe:
    """Read a recipe of one kind from a file or a preset, and apply "a.b=c" overrides.

    Raises:
        UserError: If the recipe is invalid or of another kind.
    """
    path = find_recipe(name_or_path)
    tree = read_yaml(path)
    for section in kind.FOREIGN_SECTIONS.keys() & tree.keys():
        raise UserError(
            f"{path}: is a recipe for `{kind.FOREIGN_SECTIONS[section]}`: it has a section {section}; "
            f"give a recipe for `{kind.COMMAND}`"
        )
    return validate(kind, tree, str(path), overrides)


def read_yaml(path: Path) -> dict:
    """Read a recipe file without validation. Raises UserError if it is not a YAML mapping."""
    try:
        tree = yaml.load(path.read_text(), Loader=_StrictLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: invalid YAML: {' '.join(str(error).split())}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: must be a YAML mapping of recipe keys")
    return tree


def validate(kind: type[AnySection], tree: dict, where: str, overrides: Sequence[str] = ()) -> AnySection:
    """Convert a tree of keys, overridden, to a recipe or a section.

    Args:
        kind: The class to validate against.
        tree: Nested keys and values; modified in place.
        where: Start of error messages, usually the file.
        overrides: "a.b=c" strings.

    Raises:
        UserError: If a key is unknown or missing, or a value is invalid.
    """
    for old, new in DEPRECATED_KEYS.items():
        section, _, name = old.rpartition(".")
        keys: Any = tree
        for part in section.split("."):
            keys = keys.get(part) if isinstance(keys, dict) else None
        if isinstance(keys, dict):
            _rename_key(keys, name, new.rpartition(".")[2], f"{where}: {section}.")
    if overrides:
        _override(tree, overrides)
        where += " with --set " + " ".join(overrides)
    _drop_removed(tree, where)
    try:
        # Strict mode rejects lists for tuples, except in JSON. YAML dates and binary data fail as strings.
        return kind.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        errors = error.errors()
        # A list whose only item is invalid is also reported as too short.
        reasons = [_reason(kind, e) for e in [e for e in errors if e["type"] != "too_short"] or errors]
        raise UserError(f"{where}: " + "; ".join(reasons)) from error


def list_presets() -> list[str]:
    """Return the names of the recipes that ship with the package."""
    return sorted(path.stem for path in PRESETS_DIR.glob("*.yaml"))


def mutable_keys(kind: type[BaseModel]) -> set[str]:
    """Return the keys, as "a.b.c", of a kind of recipe that may change when a run is resumed."""
    keys = set()
    for name, field in kind.model_fields.items():
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("mutable"):
            keys.add(name)
        elif section := _section_in(field.annotation):
            keys |= {f"{name}.{key}" for key in mutable_keys(section)}
    return keys


def recipe_keys(kind: type[BaseModel]) -> set[str]:
    """Return the keys, as "a.b.c", of a kind of recipe."""
    keys = set()
    for name, field in kind.model_fields.items():
        section = _section_in(field.annotation)
        keys |= {f"{name}.{key}" for key in recipe_keys(section)} if section else {name}
    return keys


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Parse "a.b=c" strings to keys "a.b" and values; a mapping c gives one key for each of its leaves.

    Raises:
        UserError: If a string is not KEY=VALUE, or the value is not YAML.
    """
    values = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            raise UserError(f"--set {override}: expected KEY.KEY=VALUE, for example --set optim.base_lr=1e-4")
        try:
            value = yaml.load(text, Loader=_StrictLoader)
        except yaml.YAMLError as error:
            raise UserError(f"--set {override}: the value is not valid YAML") from error
        values |= flatten({key: value})
    return values


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a nested dict by their paths "a.b.c"."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader that rejects duplicate keys and reads `1e-4` as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.YAMLError(f"duplicate key {key!r} in line {key_node.start_mark.line + 1}")
            seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def find_recipe(name_or_path: str | Path) -> Path:
    """Return the file of a recipe: the path itself, or a preset. Raises UserError if there is none."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml"):
        raise UserError(f"{path}: no such recipe file")
    preset = PRESETS_DIR / f"{name_or_path}.yaml"
    if not preset.is_file():
        names = list_presets()
        raise UserError(
            f"recipe {str(name_or_path)!r}: neither a file nor a shipped recipe"
            f"{_suggestion(str(name_or_path), names)}; shipped are {', '.join(names)}"
        )
    return preset


def _rename_key(keys: dict[str, Any], old: str, new: str, where: str) -> None:
    """Move the value of a deprecated key to its new name."""
    if old in keys:
        if new in keys:
            raise UserError(f"{where}{old}: is the deprecated name of {new}; give only {new}")
        keys[new] = keys.pop(old)
        logger.warning(f"{where}{old} is deprecated; use {new}")


def _drop_removed(tree: dict, where: str) -> None:
    """Remove the keys of the former optimizer Muon. Raises UserError if the recipe uses it."""
    optim = tree.get("optim")
    if isinstance(optim, dict):
        if optim.pop("name", "adamw") != "adamw":
            raise UserError(f"{where}: optim.name: Muon was removed; remove the key and start a new run")
        for key in ("muon_lr", "muon_momentum"):
            optim.pop(key, None)


def _override(tree: dict, overrides: Sequence[str]) -> None:
    values = parse_overrides(overrides)
    for old, new in DEPRECATED_KEYS.items():
        _rename_key(values, old, new, "--set ")
    for pair in MUTUALLY_EXCLUSIVE:
        for key, other in (pair, pair[::-1]):
            section, _, name = other.partition(".")
            if key in values and other not in values and isinstance(tree.get(section), dict):
                tree[section].pop(name, None)
    for key, value in values.items():
        *names, last = key.split(".")
        section = tree
        for name in names:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise UserError(f"--set {key}: {name!r} is a value in this recipe, not a section")
        section[last] = value


def _reason(kind: type[BaseModel], error: Any) -> str:
    """Describe one of pydantic's errors, with the key."""
    location = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{location}: unknown key{_suggestion(str(error['loc'][-1]), _keys_at(kind, error['loc'][:-1]))}"
    if error["type"] == "missing":
        return f"{location}: missing"
    if error["type"] == "value_error":  # from a _validate method: its message names the keys
        return str(error["ctx"]["error"])
    return f"{location}: {error['msg'].lower()}, got {error['input']!r}"


def _keys_at(kind: type[BaseModel], location: tuple) -> list[str]:
    section: Any = kind
    for name in location:
        section = _section_in(section if isinstance(name, int) else section.model_fields[name].annotation)
    return list(section.model_fields)


def _section_in(annotation: Any) -> Any:
    """Return the section class in a field's type, also as the type of its items, or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)


def _suggestion(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
