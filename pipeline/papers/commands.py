"""The commands of an experiment's rows.

Invariant: commands of different rows and experiments that give the same result have the same run directory, so they run
once. A command is returned only if its recipe is valid.
"""

import hashlib
import json
import logging
import shlex
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.errors import UserError
from pipeline.papers.experiment import Experiment, Row, Step
from pipeline.recipe import Recipe, load_recipe
from pipeline.recipe.classification import ClassificationRecipe
from pipeline.recipe.linear_probe import SET_BY_WEIGHTS, ProbeRecipe, load_probe_recipe
from pipeline.recipe.loading import DEPRECATED_KEYS, MUTUALLY_EXCLUSIVE, RecipeFile, flatten, mutable_keys, recipe_keys
from pipeline.recipe.tasks import load_finetune_recipe

logger = logging.getLogger(__name__)
KINDS: dict[Step, type[RecipeFile]] = {"pretrain": Recipe, "finetune": ClassificationRecipe, "linprobe": ProbeRecipe}
NUM_NEIGHBORS = 20
SET_BY_COMMAND = {"weights"}
"""Keys that a command sets by an option."""
DIGEST_KEYS = {"method.efficient_mae.num_nearest": "method.efficient_mae.k"}
"""Former names of keys. The digests keep them, so that runs of earlier versions are found."""
DATA, VAL, DIR = "DATA", "VAL", "DIR"
"""Placeholders for paths in commands that are only printed."""


class Command(NamedTuple):
    """A command of `python -m pipeline`."""

    step: Step
    run: str
    """Name of its run directory in the experiment's directory."""
    recipe: str
    """Empty for the linear probe and k-NN."""
    options: tuple[str, ...]
    """Options that decide the result; those with paths are not included."""
    weights: str = ""
    """Name of the run directory with the pre-trained weights, or Row.weights; empty for pre-training."""
    is_pretrained: bool = True
    """Whether `weights` names a run directory."""

    def words(self, directory: str, data: str, val: str | None) -> list[str]:
        """Return all arguments, for `python -m pipeline`."""
        paths = ["--data", data]
        if self.weights:
            weights = f"{directory}/{self.weights}" if self.is_pretrained else self.weights
            paths = ["--weights", weights, *paths, "--val", val or VAL]
        recipe = [self.recipe] if self.recipe else []
        return [self.step, *recipe, *paths, "--run", f"{directory}/{self.run}", *self.options]


class RowPlan(NamedTuple):
    row: Row
    recipe: Recipe
    """Pre-training recipe with all overrides."""
    commands: tuple[Command, ...]


def plan_experiment(experiment: Experiment, overrides: Sequence[str] = ()) -> list[RowPlan]:
    """Return the rows of an experiment with their commands.

    Args:
        experiment: What to run.
        overrides: "a.b=c" strings. A key applies to each kind of command whose recipe has it; with the prefix
            "pretrain.", "finetune." or "linprobe." to that kind only.

    Raises:
        UserError: If an override is invalid, distinguishes the rows, or no command has its key.
    """
    given = _overrides_by_step(experiment, overrides)
    return [_plan_row(experiment, row, given) for row in experiment.rows]


def format_commands(
    experiment: Experiment, plans: Sequence[RowPlan], launcher: str, data: str | None = None, val: str | None = None
) -> str:
    """Return the commands of every row as a shell script, with the published values as comments."""
    lines = [f"# {experiment.name}: {experiment.title} ({experiment.source})"]
    lines += [f"# {note}" for note in experiment.notes]
    for plan in plans:
        published = ", ".join(f"{column} {value:g}" for column, value in plan.row.published.items())
        lines += ["", f"# {plan.row.name}; published: {published or 'no number'}"]
        for command in plan.commands:
            lines.append(f"{launcher} pipeline {shlex.join(command.words(DIR, data or DATA, val))}")
    if not experiment.steps:
        lines += ["", f"{launcher} pipeline paper {experiment.name} --run {DIR}"]
    return "\n".join(lines)


def _plan_row(experiment: Experiment, row: Row, given: dict[Step, list[str]]) -> RowPlan:
    name = row.recipe or experiment.recipe
    settings = _merge(experiment.settings, row.settings, given["pretrain"])
    recipe = load_recipe(name, settings)
    pretrain = _command("pretrain", recipe, name, _sets(settings))
    weights = row.weights or pretrain.run
    commands: list[Command] = []
    for step in experiment.steps:
        if step == "pretrain":
            if not row.weights:
                commands.append(pretrain)
            continue
        if step == "finetune":
            finetune = row.finetune_recipe or experiment.finetune_recipe
            settings = _merge(row.finetune_settings, given[step])
            tuned = load_finetune_recipe(finetune, weights, settings)
            command = _command(step, tuned, finetune, _sets(settings), weights)
        elif step == "linprobe":
            command = _plan_probe(experiment, weights, given[step])
        else:
            options = ("--k", str(NUM_NEIGHBORS), *experiment.features.options)
            command = Command(step, f"{step}-{_digest([weights, *options])}", "", options, weights)
        commands.append(command._replace(is_pretrained=not row.weights))
    return RowPlan(row, recipe, tuple(commands))


def _plan_probe(experiment: Experiment, weights: str, given: list[str]) -> Command:
    lrs, features = experiment.probe_lrs, experiment.features
    holdout = ["data.holdout=0"] if len(lrs) == 1 else []  # else needed to choose among them
    settings = _merge((f"train.epochs={experiment.probe_epochs}", *holdout), given)
    probe: dict[str, object] = {"weights": weights, "base_lrs": lrs, "center_crops": experiment.center_crops}
    probe |= {"pool": features.pool, "resize": features.resize}
    data = {"subset": features.labels, "subset_by_class": True} if features.labels else {}
    data |= {"image_size": features.image_size} if features.image_size else {}
    recipe = load_probe_recipe({"probe": probe, "data": data}, settings)
    options = ["--lr", *map(str, lrs), *(["--center-crops"] if experiment.center_crops else []), *features.options]
    return _command("linprobe", recipe, "", [*options, *_sets(settings)], weights)


def _command(step: Step, recipe: RecipeFile, name: str, options: list[str], weights: str = "") -> Command:
    """Make a command; a digest of the keys that decide the result names its run directory."""
    execution_only = mutable_keys(type(recipe)) - {"train.steps", "train.epochs"}
    keys = flatten(recipe.model_dump(mode="json"))
    deciding = {DIGEST_KEYS.get(key, key): value for key, value in keys.items() if key not in execution_only}
    return Command(step, f"{step}-{_digest(deciding)}", name, tuple(options), weights)


def _digest(deciding: object) -> str:
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:8]


def _merge(*groups: Sequence[str]) -> list[str]:
    """Combine overrides; a later one replaces an earlier one of the same key, or of its alternative."""
    values: dict[str, str] = {}
    for setting in (setting for group in groups for setting in group):
        key = setting.partition("=")[0]
        for pair in MUTUALLY_EXCLUSIVE:
            if key in pair:
                values.pop(pair[1 - pair.index(key)], None)
        values[key] = setting
    return list(values.values())


def _sets(settings: Sequence[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def _overrides_by_step(experiment: Experiment, overrides: Sequence[str]) -> dict[Step, list[str]]:
    given: dict[Step, list[str]] = {step: [] for step in KINDS}
    needed: list[Step] = experiment.steps or ["pretrain"]  # columns of cost are computed from the pre-training recipe
    for override in overrides:
        prefix, _, rest = override.partition(".")
        is_named = prefix in KINDS
        setting = rest if is_named else override
        key = setting.partition("=")[0]
        if new := DEPRECATED_KEYS.get(key):
            logger.warning(f"--set {key} is deprecated; use {new}")
            setting, key = new + setting.removeprefix(key), new
        names: set[str] = {prefix} if is_named else set(KINDS)
        if not is_named and key in SET_BY_WEIGHTS:  # the probe takes these keys from the weights
            names.remove("linprobe")
        accepting: list[Step] = [
            step for step in needed if step in names and key in recipe_keys(KINDS[step]) - SET_BY_COMMAND
        ]
        if not accepting:
            raise UserError(f"--set {override}: no command of {experiment.name} has this key; fix its name")
        for step in accepting:
            if key in experiment.varied_keys(step):
                raise UserError(f"--set {override}: distinguishes the rows of {experiment.name}; remove it")
            given[step].append(setting)
    return given
