"""Recipe files: YAML read strictly, overridden by --set, checked by a typed model.

Invariant: what cannot be read as the wanted kind of recipe is one `UserError` that names file and key.
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
PRESETS = Path(__file__).parent / "presets"


class RecipeFile(Section):
    """What every kind of recipe can do: be written out whole, and be compared."""

    COMMAND: ClassVar[str]
    """Of `python -m pipeline`, which takes this kind."""
    FOREIGN_SECTIONS: ClassVar[dict[str, str]] = {}
    """Sections that only other kinds have, and the command that takes these."""

    def to_yaml(self) -> str:
        """The whole recipe, defaults included; `load` reads it back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def differences(self, other: "RecipeFile") -> dict[str, tuple[Any, Any]]:
        """Keys whose values differ, as "a.b.c": (value here, value there)."""
        mine, theirs = flat(self.model_dump(mode="json")), flat(other.model_dump(mode="json"))
        return {key: (mine[key], theirs[key]) for key in mine if mine[key] != theirs[key]}


AnyRecipe = TypeVar("AnyRecipe", max_total_s=RecipeFile)
AnySection = TypeVar("AnySection", max_total_s=Section)


def load(kind: type[AnyRecipe], name_or_path: str | Path, overrides: Sequence[str] = ()) -> AnyRecipe:
    """The `kind` of recipe that a file or a shipped recipe of this name holds, "a.b=c" overrides applied.

    Raises UserError, one line: the file, the key's path, what is wrong.
    """
    path = _find_recipe(name_or_path)
    tree = read_yaml(path)
    for section in kind.FOREIGN_SECTIONS.keys() & tree.keys():
        raise UserError(
            f"{path}: is a recipe for `{kind.FOREIGN_SECTIONS[section]}`: it has a section {section}; "
            f"give one of `{kind.COMMAND}`"
        )
    return validate(kind, tree, str(path), overrides)


def read_yaml(path: Path) -> dict:
    """What a recipe's file holds, not checked. UserError where that is no mapping of keys."""
    try:
        tree = yaml.load(path.read_text(), Loader=_UniqueKeys)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys; this file is not")
    return tree


def validate(kind: type[AnySection], tree: dict, where: str, overrides: Sequence[str] = ()) -> AnySection:
    """The `kind` of section, or whole recipe, that a tree of keys is, overridden. UserError begins with
    `where`."""
    if overrides:
        _override(tree, overrides)
        where += " with --set " + " ".join(overrides)
    _rename_deprecated(tree, where)
    _drop_removed(tree, where)
    try:
        # Python mode is strict about tuples and YAML has lists only, so validation goes through JSON's rules.
        return kind.model_validate_json(_as_json(tree))
    except ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(_complaint(kind, e) for e in _causes(error))) from None


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """The keys, "a.b.c", that overrides name, and their values; a mapping stands for its keys. UserError
    where one is no override."""
    found = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            raise UserError(f"--set {override}: expected KEY.KEY=VALUE, for example --set optim.base_lr=1e-4")
        try:
            value = yaml.load(text, Loader=_UniqueKeys)
        except yaml.YAMLError:
            raise UserError(f"--set {override}: the value is not YAML") from None
        found |= flat({key: value})
    return found


def flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    """A tree's values by their keys' paths, "a.b.c"."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, with two of its traps closed: a key given twice, and `1e-4` read as a string."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(f"the key {key!r} stands twice, again in line {line}")
            seen.add(key)
        return super().construct_mapping(node, deep)


_UniqueKeys.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _find_recipe(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise UserError(f"{path}: no such recipe file")
        return path
    shipped = PRESETS / f"{name_or_path}.yaml"
    if not shipped.is_file():
        names = shipped_recipes()
        raise UserError(
            f"recipe {str(name_or_path)!r}: neither a file nor a shipped recipe"
            f"{_nearest(str(name_or_path), names)}; shipped are {', '.join(names)}"
        )
    return shipped


RENAMED = {
    "data.max_replaced": "data.max_undecodable",
    "data.readers": "data.read_threads",
    "data.threads": "data.decode_threads",
    "data.window_shards": "data.shuffle_window_shards",
    "guard.returns": "guard.max_rollbacks",
    "guard.skips_in_a_row": "guard.max_consecutive_skips",
}
"""Deprecated keys, still accepted, and their new names."""
MUTUALLY_EXCLUSIVE = {  # of each pair at most one is given: an override of one takes the other out
    ("train", "steps"): ("train", "epochs"),
    ("train", "epochs"): ("train", "steps"),
    ("optim", "warmup_steps"): ("optim", "warmup_epochs"),
    ("optim", "warmup_epochs"): ("optim", "warmup_steps"),
}


def _rename_deprecated(tree: dict, where: str) -> None:
    """Move the values of deprecated keys to their new names, with a message for each."""
    for old, new in RENAMED.items():
        (section, old_key), new_key = old.split("."), new.split(".")[1]
        keys = tree.get(section)
        if isinstance(keys, dict) and old_key in keys:
            if new_key in keys:
                raise UserError(f"{where}: {old} is the old name of {new}; give only {new}")
            keys[new_key] = keys.pop(old_key)
            logger.warning(f"{where}: {old} is deprecated; use {new}")


def _drop_removed(tree: dict, where: str) -> None:
    """Take the keys of DeepSpeed's Muon out of an older recipe. UserError if it trains with Muon."""
    optim = tree.get("optim")
    if isinstance(optim, dict):
        if optim.pop("name", "adamw") != "adamw":
            raise UserError(f"{where}: optim.name: Muon was removed; leave the key out and start a new run")
        for key in ("muon_lr", "muon_momentum"):
            optim.pop(key, None)


def _override(tree: dict, overrides: Sequence[str]) -> None:
    parsed = parse_overrides(overrides)
    for old in parsed.keys() & RENAMED.keys():
        logger.warning(f"--set {old}: is deprecated; use {RENAMED[old]}")
    given = {tuple(RENAMED.get(key, key).split(".")): value for key, value in parsed.items()}
    for keys, value in given.items():
        section = tree
        for name in keys[:-1]:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise UserError(f"--set {'.'.join(keys)}: {name!r} is a value in this recipe, not a section")
        section[keys[-1]] = value
        rival = MUTUALLY_EXCLUSIVE.get(keys)
        if rival and rival not in given and isinstance(tree.get(rival[0]), dict):
            tree[rival[0]].pop(rival[1], None)


def _as_json(tree: dict) -> str:
    # YAML also knows dates and binary data; no recipe key takes one, so as strings they fail, key named.
    return json.dumps(tree, default=str)


def _causes(error: ValidationError) -> list[Any]:
    """The errors without their echo: a list whose only item is wrong is also said to be too short."""
    errors = error.errors()
    wrong = [e["loc"] for e in errors if e["type"] != "too_short"]
    return [e for e in errors if e["type"] != "too_short" or not any(_below(loc, e["loc"]) for loc in wrong)]


def _below(location: tuple, section: tuple) -> bool:
    return location[: len(section)] == section and len(location) > len(section)


def _complaint(kind: type[BaseModel], error: Any) -> str:
    location = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{location}: unknown key{_nearest(str(error['loc'][-1]), _keys_at(kind, error['loc'][:-1]))}"
    if error["type"] == "missing":
        return f"{location}: missing"
    if error["type"] == "value_error":  # our own message names its keys
        return str(error["ctx"]["error"])
    return f"{location}: {error['msg'].lower()}, got {error['input']!r}"


def _keys_at(kind: type[BaseModel], location: tuple) -> list[str]:
    section: Any = kind
    for name in location:
        section = _section_in(section if isinstance(name, int) else section.model_fields[name].annotation)
    return list(section.model_fields)


def _section_in(annotation: Any) -> Any:
    """The section that a key's type holds: itself, or that of its items."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
