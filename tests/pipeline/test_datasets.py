"""Sets that cannot be judged on are refused in one line."""

import shutil

import pytest
from PIL import Image

from pipeline.errors import UserError
from pipeline.evals.datasets import open_labelled_sets
from pipeline.recipe.sections import DataSection
from tests.conftest import build


def folder_of(tmp_path, name, classes, shade=0):
    """A shard set with one grey image a class; None: without classes."""
    for number, label in enumerate(classes):
        target = tmp_path / name / (label or "") / f"{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (shade + number,) * 3).save(target)
    return build(tmp_path / name, tmp_path / f"{name}-set")


def test_what_does_not_fit_together_is_refused(tmp_path):
    pets = folder_of(tmp_path, "pets", ["cat", "dog", "rat"])
    plain = folder_of(tmp_path, "plain", [None])
    zoo = folder_of(tmp_path, "zoo", ["cat", "dog", "lion"], 90)
    copy = shutil.copytree(pets, tmp_path / "copy")
    for train, val, complaint in (
        (plain, pets, f"--data {plain}: its samples have no labels"),
        (pets, plain, f"--val {plain}: its samples have no labels"),
        (pets, zoo, r"1 are missing, 'rat'; 1 are not there, 'lion'"),
        (pets, copy, f"--val {copy}: holds shards of --data {pets}"),
    ):
        with pytest.raises(UserError, match=complaint) as refusal:
            open_labelled_sets(train, val, DataSection())
        assert "\n" not in str(refusal.value)
