"""Sets that cannot be judged on are refused in one line."""

import shutil

import pytest
from PIL import Image

from pipeline.errors import UserError
from pipeline.evals.labelled import labels_of, open_labelled
from pipeline.sections import DataSection
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
            open_labelled(train, val, DataSection())
        assert "\n" not in str(refusal.value)


def test_labels_stand_in_the_order_of_the_set(tmp_path):
    found = open_labelled(
        folder_of(tmp_path, "one", ["a", "b", "c"]),
        folder_of(tmp_path, "two", ["a", "b", "c"], 9),
        DataSection(),
    )
    names = [found.train.key(0, index) for index in range(3)]
    assert [found.train.manifest.classes[label] for label in labels_of(found.train)] == [
        name.split("_")[0] for name in names
    ]
