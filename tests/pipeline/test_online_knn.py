"""k-NN while a run trains: that of the command, on a part of the set."""

import shutil

import pytest
import torch

from pipeline.data.reader import ShardReader
from pipeline.distributed.launch import DistInfo
from pipeline.errors import UserError
from pipeline.evals.feature_cache import FeatureExtractor, Features
from pipeline.evals.feature_extractor import load_frozen_encoder
from pipeline.evals.knn import classify
from pipeline.evals.online_knn import K, OnlineKnn, check_online
from pipeline.methods import build_method
from pipeline.recipe import load_recipe
from pipeline.tasks.pretraining import Pretraining
from tests.integration.smuggling import smuggle

ALONE = DistInfo(0, 1, 0, 1, torch.device("cpu"), 1)
SETTINGS = ("model.width=32", "model.depth=2", "data.image_size=32", "evals.knn_every=5")


@pytest.mark.parametrize("samples", [50, 5000])
def test_it_is_what_the_command_finds_on_the_first_samples(labelled_sets, tmp_path, samples):
    recipe = load_recipe("demo_emae", [*SETTINGS, f"evals.knn_samples={samples}"])
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    reader = ShardReader(labelled_sets[0])
    torch.manual_seed(recipe.seed)
    seen = []
    figures = OnlineKnn(recipe, reader, build_method(recipe), ALONE)(lambda: seen.append(1))
    model = load_frozen_encoder(f"random:{tmp_path / 'recipe.yaml'}", None, "class_token")
    features = FeatureExtractor(model, ALONE)(reader)
    used = min(samples, 60)
    queries, others = (
        Features(*(rows[part] for rows in features)) for part in (slice(used // 5), slice(used // 5, used))
    )
    wanted = classify(others, queries, [K], 6, ALONE)[K]["top1"]
    assert figures["knn_top1"] == wanted.share
    assert (figures["knn_top1_low"], figures["knn_top1_high"]) == wanted.interval
    assert len(seen) == -(-used // recipe.engine.micro_batch)


def test_data_that_it_cannot_be_measured_on_is_refused(labelled_sets):
    recipe = load_recipe("demo_emae", [*SETTINGS, "evals.knn_samples=20"])
    with pytest.raises(UserError, match=r"evals.knn_every: 20 samples are too few"):
        check_online(recipe, ShardReader(labelled_sets[0]))


def test_an_image_that_cannot_be_decoded_is_said_once_and_stops_nothing(labelled_sets, tmp_path, capsys):
    """Training has the next sample stand in for it, so a figure that is only watched may not end the run."""
    shards = shutil.copytree(labelled_sets[0], tmp_path / "set")
    (key,) = smuggle(shards, 1)
    task = Pretraining(load_recipe("demo_emae", SETTINGS))
    reader = ShardReader(shards)
    task.begin(tmp_path, reader, task.build(reader), ALONE)
    assert task.evaluate(5, lambda: None) == task.evaluate(10, lambda: None) == {}
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "not measured at step 5" in said and repr(key) in said
