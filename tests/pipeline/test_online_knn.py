"""k-NN during training: as the command computes it, on a part of the set."""

import shutil

import pytest
import torch

from pipeline.data.reader import ShardReader
from pipeline.distributed.launch import DistInfo
from pipeline.errors import UserError
from pipeline.evals.feature_cache import Features
from pipeline.evals.feature_extractor import FeatureExtractor
from pipeline.evals.frozen_encoder import load_frozen_encoder
from pipeline.evals.knn import classify
from pipeline.evals.online_knn import K, OnlineKnn, check_knn_data
from pipeline.methods import build_method
from pipeline.recipe import load_recipe
from pipeline.tasks.pretraining import Pretraining
from pipeline.train.run_directory import RunDirectory
from tests.integration.corrupt_samples import make_undecodable

SINGLE = DistInfo(0, 1, 0, 1, torch.device("cpu"), 1)
SETTINGS = ("model.width=32", "model.depth=2", "data.image_size=32", "evals.knn_every=5")


@pytest.mark.parametrize("samples", [50, 5000])
def test_online_knn_equals_knn_on_first_samples(labelled_sets, tmp_path, samples):
    recipe = load_recipe("demo_emae", [*SETTINGS, f"evals.knn_samples={samples}"])
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    reader = ShardReader(labelled_sets[0])
    torch.manual_seed(recipe.seed)
    heartbeats = []
    metrics = OnlineKnn(recipe, reader, build_method(recipe), SINGLE)(lambda: heartbeats.append(1))
    model = load_frozen_encoder(f"random:{tmp_path / 'recipe.yaml'}", None, "class_token")
    features = FeatureExtractor(model, SINGLE)(reader)
    used = min(samples, 60)
    queries, train = (
        Features(*(rows[part] for rows in features)) for part in (slice(used // 5), slice(used // 5, used))
    )
    expected = classify(train, queries, [K], 6, SINGLE)[K]["top1"]
    assert metrics["knn_top1"] == expected.share
    assert (metrics["knn_top1_low"], metrics["knn_top1_high"]) == expected.interval
    assert len(heartbeats) == -(-used // recipe.engine.micro_batch)


def test_too_few_samples_are_rejected(labelled_sets):
    recipe = load_recipe("demo_emae", [*SETTINGS, "evals.knn_samples=20"])
    with pytest.raises(UserError, match=r"evals.knn_every: 20 samples"):
        check_knn_data(recipe, ShardReader(labelled_sets[0]))


def test_undecodable_image_is_logged_once_and_training_goes_on(labelled_sets, tmp_path, capsys):
    shards = shutil.copytree(labelled_sets[0], tmp_path / "set")
    (key,) = make_undecodable(shards, 1)
    task = Pretraining(load_recipe("demo_emae", SETTINGS))
    reader = ShardReader(shards)
    task.setup(RunDirectory(tmp_path), reader, task.build(reader), SINGLE)
    assert task.evaluate(5, lambda: None) == task.evaluate(10, lambda: None) == {}
    log = capsys.readouterr().err
    assert log.count("\n") == 1 and "evals.knn_every" in log and "step 5" in log and repr(key) in log
