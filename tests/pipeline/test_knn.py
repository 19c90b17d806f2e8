"""k-NN on frozen features: as scikit-learn's, every sample once, features cached safely."""

import json
import resource
from argparse import Namespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.neighbors import KNeighborsClassifier

from pipeline.__main__ import main
from pipeline.commands.evaluate import _cache_directory
from pipeline.data.reader import ShardReader
from pipeline.distributed.launch import DistInfo
from pipeline.errors import AllRanksError
from pipeline.evals import progress
from pipeline.evals.feature_cache import Features
from pipeline.evals.feature_extractor import FeatureExtractor
from pipeline.evals.frozen_encoder import load_frozen_encoder
from pipeline.evals.knn import KS, TEMPERATURE, classify, count_correct, knn, nearest_neighbors, score_classes
from pipeline.recipe import load_recipe

SINGLE = DistInfo(0, 1, 0, 1, torch.device("cpu"), 1)
CLASSES = 12


def gaussian_clusters(samples: int, seed: int) -> Features:
    """Draw overlapping clusters of points, one per class."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(CLASSES, 24, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, CLASSES, (samples,), generator=generator)
    return Features(centers[labels] + 1.5 * torch.randn(samples, 24, generator=generator), labels)


@pytest.mark.parametrize("train_block", [64, 1 << 16])
def test_predictions_equal_scikit_learns(train_block):
    train, val = gaussian_clusters(900, 1), gaussian_clusters(300, 2)
    accuracies = classify(train, val, list(KS), CLASSES, SINGLE)
    cosines, classes = nearest_neighbors(train, val.values, max(KS), train_block=train_block)
    for k in KS:
        reference = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / TEMPERATURE)
        ).fit(train.values.double().numpy(), train.labels.numpy())
        expected = reference.predict_proba(val.values.double().numpy())
        scores = score_classes(cosines[:, :k], classes[:, :k], CLASSES)
        shares = torch.where(scores.isfinite(), scores, 0.0)
        shares = (shares / shares.sum(1, keepdim=True)).numpy()
        assert np.abs(shares - expected).max() < 1e-4
        assert accuracies[k]["top1"].correct == (expected.argmax(1) == val.labels.numpy()).sum()
        assert accuracies[k]["top1"].total == 300


def test_class_without_votes_is_not_in_top5():
    train = Features(torch.eye(6)[:2], torch.tensor([3, 4]))
    val = Features(torch.eye(6)[:2], torch.tensor([0, 4]))
    accuracies = classify(train, val, [2], 6, SINGLE)[2]
    assert (accuracies["top1"].correct, accuracies["top5"].correct) == (1, 1)


def test_features_are_extracted_once_per_setting(labelled_sets, tmp_path):
    model = load_frozen_encoder("pixels:16", None, "class_token")
    reader = ShardReader(labelled_sets[0])
    extract = FeatureExtractor(model, SINGLE, resize=16, batch=7, cache=tmp_path / "cache")
    features = extract(reader)
    batches = list(extract.loader(reader))
    assert torch.equal(features.values, torch.cat([batch.images.flatten(1) for batch in batches]))
    assert torch.equal(features.labels, torch.cat([batch.labels for batch in batches]))
    (file,) = (tmp_path / "cache").iterdir()
    written = file.stat().st_mtime_ns
    again = extract(reader)
    assert torch.equal(again.values, features.values) and file.stat().st_mtime_ns == written
    extract(ShardReader(labelled_sets[1]))
    FeatureExtractor(model, SINGLE, resize=20, batch=7, cache=tmp_path / "cache")(reader)
    assert len(list((tmp_path / "cache").iterdir())) == 3  # one more per set and per resize


@pytest.mark.parametrize("damage", ["truncated", "a value", "a label", "header", "other content"])
def test_damaged_features_are_extracted_again(labelled_sets, tmp_path, capsys, damage):
    reader = ShardReader(labelled_sets[0])
    extract = FeatureExtractor(load_frozen_encoder("pixels:16", None, "class_token"), SINGLE, resize=16, cache=tmp_path)
    features = extract(reader)
    (file,) = tmp_path.iterdir()
    written = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(written[:-100])
    elif damage == "other content":
        save_file(Features(features.values[:1], features.labels[:1])._asdict(), file)
    else:
        data = bytearray(written)
        labels = written.index(features.labels.numpy().tobytes())
        data[{"a value": -1, "a label": labels, "header": 3}[damage]] ^= 1
        file.write_bytes(data)
    again = extract(reader)
    assert torch.equal(again.values, features.values) and torch.equal(again.labels, features.labels)
    log = capsys.readouterr().err
    assert str(file) in log and log.count("\n") == 1 and file.read_bytes() == written


def test_number_of_heads_changes_digest(tmp_path):
    digests = set()
    for heads in (2, 4):
        (tmp_path / "recipe.yaml").write_text(load_recipe("demo_emae", [f"model.heads={heads}"]).to_yaml())
        digests.add(load_frozen_encoder(f"random:{tmp_path / 'recipe.yaml'}", None, "mean").digest)
    assert len(digests) == 2


@pytest.mark.parametrize("obstacle", ["a file in its place", "a full disk"])
def test_unwritable_cache_is_logged_once(labelled_sets, tmp_path, capsys, obstacle):
    cache, limit = tmp_path / "cache", resource.getrlimit(resource.RLIMIT_FSIZE)
    if obstacle == "a full disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    else:
        cache.write_text("")
    model = load_frozen_encoder("pixels:16", None, "class_token")
    extract = FeatureExtractor(model, SINGLE, resize=16, cache=cache)
    try:
        features = [extract(ShardReader(path)) for path in labelled_sets]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [len(each.labels) for each in features] == [60, 42]
    log = capsys.readouterr().err
    assert str(cache) in log and log.count("\n") == 1
    assert cache.is_file() or not list(cache.iterdir())


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_counts_add_up_over_ranks(ranks):
    train, val = gaussian_clusters(900, 1), gaussian_clusters(1700, 2)
    parts = [
        count_correct(train, val, list(KS), CLASSES, SINGLE._replace(rank=rank, world_size=ranks))
        for rank in range(ranks)
    ]
    total = count_correct(train, val, list(KS), CLASSES, SINGLE)
    for k in KS:
        assert tuple(map(sum, zip(*(part[k] for part in parts), strict=True))) == total[k]
    assert sum(part[KS[0]] != (0, 0) for part in parts) == min(ranks, 4)  # blocks


def test_features_of_runs_are_cached_in_the_run(tmp_path):
    assert _cache_directory(Namespace(weights=str(tmp_path), cache=None)) is None  # any folder
    (tmp_path / "recipe.yaml").touch()
    for weights in (tmp_path, f"ema:{tmp_path}"):
        assert _cache_directory(Namespace(weights=str(weights), cache=None)) == tmp_path / "features"
    assert _cache_directory(Namespace(weights="random:demo_emae", cache=None)) is None


def test_progress_is_logged_with_rate_and_remaining_time(labelled_sets, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LOG_EVERY", 1e-9)
    model = load_frozen_encoder("pixels:16", None, "class_token")
    FeatureExtractor(model, SINGLE, resize=16, batch=20)(ShardReader(labelled_sets[0]))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all("images/s" in line and "left" in line for line in lines)
    assert "features: 100% of 60" in lines[-1]


def test_command_prints_json_and_table(labelled_sets, capsys, kept_environment):
    train, val = map(str, labelled_sets)
    command = ["knn", "--weights", "pixels:24", "--resize", "24", "--data", train, "--val", val]
    command += ["--k", "5", "1"]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["k"] for row in result["knn"]] == [1, 5]
    assert result["train"]["samples"] == 60 and result["val"]["samples"] == 42 and result["classes"] == 6
    top1 = result["knn"][0]["top1"]
    assert top1["total"] == 42 and 0.5 < top1["low"] < top1["accuracy"] == top1["correct"] / 42
    assert main(command) == 0
    table = capsys.readouterr().out.splitlines()
    assert "42 validation images, 6 classes" in table[0] and f"{top1['accuracy']:.2%}" in table[2]


@pytest.mark.parametrize(
    ("invalid", "message"),
    [({"weights": "nowhere"}, "nowhere"), ({"val": "nowhere"}, "nowhere"), ({"ks": [10**6]}, "--k 1000000")],
)
def test_invalid_arguments_raise_on_all_ranks(labelled_sets, invalid, message, kept_environment):
    train, val = map(str, labelled_sets)
    with pytest.raises(AllRanksError, match=message):
        knn(**{"weights": "pixels:8", "train": train, "val": val} | invalid)


@pytest.mark.parametrize("option", ["--image-size", "--resize"])
def test_huge_images_are_rejected(option, capsys):
    arguments = ["--weights", "pixels", "--data", "train", "--val", "val"]
    with pytest.raises(SystemExit):
        main(["knn", *arguments, option, "100000"])
    assert f"{option}: '100000'" in capsys.readouterr().err


def test_labels_are_a_share_of_every_class(labelled_sets, kept_environment):
    result = knn("pixels:24", *map(str, labelled_sets), labels=0.2, resize=24, ks=[1])
    assert result["train"]["samples"] == 12 and result["val"]["samples"] == 42


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["--resize", "20"], "--resize 20: "),
        (["--k", "61"], "--k 61: "),
        (["--image-size", "8"], "--image-size 8: --weights pixels:24 "),
        (["--pool", "mean"], "--pool mean: "),
        (["--weights", "pixels:no"], "--weights pixels:no: "),
        (["--weights", "runs/nothing"], "--weights runs/nothing: "),
        (["--weights", "random:nothing"], "recipe 'nothing': "),
    ],
)
def test_invalid_arguments_give_one_error_line(labelled_sets, arguments, key, capsys, kept_environment):
    train, val = map(str, labelled_sets)
    assert main(["knn", "--weights", "pixels:24", "--data", train, "--val", val, *arguments]) == 2
    log = capsys.readouterr().err
    assert log.startswith(f"pipeline: error: {key}") and log.count("\n") == 1
