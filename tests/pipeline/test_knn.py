"""k-NN on frozen features: scikit-learn's answers, every sample once, a cache that can be trusted."""

import json
import resource
from argparse import Namespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.neighbors import KNeighborsClassifier

from pipeline.__main__ import main
from pipeline.commands.evaluate import _cache
from pipeline.data.reader import ShardReader
from pipeline.distributed.launch import DistInfo
from pipeline.errors import AllRanksError
from pipeline.evals.feature_cache import FeatureExtractor, Features
from pipeline.evals.feature_extractor import load_frozen_encoder
from pipeline.evals.knn import KS, TEMPERATURE, classify, counted, knn, nearest, votes
from pipeline.recipe import load_recipe

ALONE = DistInfo(0, 1, 0, 1, torch.device("cpu"), 1)
CLASSES = 12


def clouds(samples: int, seed: int) -> Features:
    """Overlapping clouds of points, one a class."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, 24, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, CLASSES, (samples,), generator=generator)
    return Features(centres[labels] + 1.5 * torch.randn(samples, 24, generator=generator), labels)


@pytest.mark.parametrize("neighbours", [64, 1 << 16])
def test_every_answer_is_scikit_learns(neighbours):
    train, val = clouds(900, 1), clouds(300, 2)
    found = classify(train, val, KS, CLASSES, ALONE)
    similarity, voters = nearest(train, val.values, max(KS), ALONE.device, neighbours=neighbours)
    for k in KS:
        theirs = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / TEMPERATURE)
        ).fit(train.values.double().numpy(), train.labels.numpy())
        wanted = theirs.predict_proba(val.values.double().numpy())
        scores = votes(similarity[:, :k], voters[:, :k], CLASSES)
        ours = torch.where(scores.isfinite(), scores, 0.0)
        ours = (ours / ours.sum(1, keepdim=True)).numpy()
        assert np.abs(ours - wanted).max() < 1e-4
        assert found[k]["top1"].correct == (wanted.argmax(1) == val.labels.numpy()).sum()
        assert found[k]["top1"].total == 300


def test_a_class_that_nobody_votes_for_is_not_among_the_first_five():
    train = Features(torch.eye(6)[:2], torch.tensor([3, 4]))
    val = Features(torch.eye(6)[:2], torch.tensor([0, 4]))
    found = classify(train, val, [2], 6, ALONE)[2]
    assert (found["top1"].correct, found["top5"].correct) == (1, 1)


def test_features_are_extracted_once_and_are_those_of_the_images(labelled_sets, tmp_path):
    model = load_frozen_encoder("pixels:16", None, "class_token")
    reader = ShardReader(labelled_sets[0])
    extract = FeatureExtractor(model, ALONE, resize=16, batch=7, cache=tmp_path / "cache")
    features = extract(reader)
    images = [batch for batch in extract.loader(reader)]
    assert torch.equal(features.values, torch.cat([batch.images.flatten(1) for batch in images]))
    assert torch.equal(features.labels, torch.cat([batch.labels for batch in images]))
    (kept,) = (tmp_path / "cache").iterdir()
    written = kept.stat().st_mtime_ns
    again = extract(reader)
    assert torch.equal(again.values, features.values) and kept.stat().st_mtime_ns == written
    extract(ShardReader(labelled_sets[1]))
    FeatureExtractor(model, ALONE, resize=20, batch=7, cache=tmp_path / "cache")(reader)
    assert len(list((tmp_path / "cache").iterdir())) == 3  # other images, or cut otherwise: others


@pytest.mark.parametrize("damage", ["cut short", "a value", "a label", "its head", "another's"])
def test_damaged_features_are_extracted_again_and_said(labelled_sets, tmp_path, capsys, damage):
    reader = ShardReader(labelled_sets[0])
    extract = FeatureExtractor(
        load_frozen_encoder("pixels:16", None, "class_token"), ALONE, resize=16, cache=tmp_path
    )
    features = extract(reader)
    (kept,) = tmp_path.iterdir()
    written = kept.read_bytes()
    if damage == "cut short":
        kept.write_bytes(written[:-100])
    elif damage == "another's":
        save_file(Features(features.values[:1], features.labels[:1])._asdict(), kept)
    else:
        data = bytearray(written)
        labels = written.index(features.labels.numpy().tobytes())
        data[{"a value": -1, "a label": labels, "its head": 3}[damage]] ^= 1
        kept.write_bytes(data)
    again = extract(reader)
    assert torch.equal(again.values, features.values) and torch.equal(again.labels, features.labels)
    said = capsys.readouterr().err
    assert (
        said == f"{kept}: cannot be read, or is damaged: its features are extracted again\n"
        and kept.read_bytes() == written
    )


def test_features_of_another_number_of_heads_are_others(tmp_path):
    digests = set()
    for heads in (2, 4):
        (tmp_path / "recipe.yaml").write_text(load_recipe("demo_emae", [f"model.heads={heads}"]).to_yaml())
        digests.add(load_frozen_encoder(f"random:{tmp_path / 'recipe.yaml'}", None, "mean").digest)
    assert len(digests) == 2


@pytest.mark.parametrize("place", ["a file in its way", "a full disk"])
def test_features_that_cannot_be_kept_are_said_once_and_used(labelled_sets, tmp_path, capsys, place):
    cache, limit = tmp_path / "cache", resource.getrlimit(resource.RLIMIT_FSIZE)
    if place == "a full disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    else:
        cache.write_text("")
    model = load_frozen_encoder("pixels:16", None, "class_token")
    extract = FeatureExtractor(model, ALONE, resize=16, cache=cache)
    try:
        found = [extract(ShardReader(part)) for part in labelled_sets]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [len(features.labels) for features in found] == [60, 42]
    said = capsys.readouterr().err
    assert said.startswith(f"features are not kept: {cache} cannot be written: ") and said.count("\n") == 1
    assert cache.is_file() or not list(cache.iterdir())


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_the_ranks_count_together_what_one_counts(ranks):
    train, val = clouds(900, 1), clouds(1700, 2)
    parts = [counted(train, val, KS, CLASSES, ALONE._replace(rank=r, size=ranks)) for r in range(ranks)]
    alone = counted(train, val, KS, CLASSES, ALONE)
    for k in KS:
        assert tuple(map(sum, zip(*(part[k] for part in parts), strict=True))) == alone[k]
    assert sum(part[KS[0]] != (0, 0) for part in parts) == min(ranks, 4)  # blocks


def test_features_of_a_run_and_of_its_average_are_kept_in_the_run(tmp_path):
    given = {"cache": None}
    assert _cache(Namespace(weights=str(tmp_path), **given)) is None  # any folder
    (tmp_path / "recipe.yaml").touch()
    for weights in (tmp_path, f"ema:{tmp_path}"):
        assert _cache(Namespace(weights=str(weights), **given)) == tmp_path / "features"
    assert _cache(Namespace(weights="random:demo_emae", **given)) is None


def test_the_command_prints_what_it_found(labelled_sets, capsys, kept_environment):
    train, val = map(str, labelled_sets)
    command = [
        "knn",
        "--weights",
        "pixels:24",
        "--resize",
        "24",
        "--data",
        train,
        "--val",
        val,
        "--k",
        "5",
        "1",
    ]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["k"] for row in result["knn"]] == [1, 5]
    assert result["train"]["samples"] == 60 and result["val"]["samples"] == 42 and result["classes"] == 6
    best = result["knn"][0]["top1"]
    assert best["total"] == 42 and 0.5 < best["low"] < best["accuracy"] == best["correct"] / 42
    assert main(command) == 0
    table = capsys.readouterr().out.splitlines()
    assert "42 to be judged, 6 classes" in table[0] and f"{best['accuracy']:.2%}" in table[2]


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"weights": "nowhere"}, "no such run"),
        ({"val": "nowhere"}, "nowhere"),
        ({"ks": [10**6]}, "--k 1000000"),
    ],
)
def test_all_ranks_agree_on_what_is_wrong_so_that_one_says_it(
    labelled_sets, wrong, complaint, kept_environment
):
    train, val = map(str, labelled_sets)
    with pytest.raises(AllRanksError, match=complaint):
        knn(**{"weights": "pixels:8", "train": train, "val": val} | wrong)


@pytest.mark.parametrize("option", ["--image-size", "--resize"])
def test_images_that_no_memory_holds_are_refused(option, capsys):
    places = ["--weights", "pixels", "--data", "train", "--val", "val"]
    with pytest.raises(SystemExit):
        main(["knn", *places, option, "100000"])
    assert f"{option}: '100000' is not a number of pixels, from 1 to 4096" in capsys.readouterr().err


def test_few_labels_are_a_share_of_every_class(labelled_sets, kept_environment):
    result = knn("pixels:24", *map(str, labelled_sets), labels=0.2, resize=24, ks=[1])
    assert result["train"]["samples"] == 12 and result["val"]["samples"] == 42


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--resize", "20"], "--resize 20: holds no square of 24 px"),
        (["--k", "61"], "--k 61: there are 60 training images"),
        (["--image-size", "8"], "--image-size 8: --weights pixels:24 has a size; leave one out"),
        (["--pool", "mean"], "--pool mean: pixels have no tokens; leave it out"),
        (["--weights", "pixels:no"], "--weights pixels:no: expected pixels:SIZE"),
        (["--weights", "runs/nothing"], "--weights runs/nothing: no such run directory or file"),
        (["--weights", "random:nothing"], "recipe 'nothing': neither a file nor a shipped recipe"),
    ],
)
def test_a_mistake_is_one_line(labelled_sets, arguments, complaint, capsys, kept_environment):
    train, val = map(str, labelled_sets)
    assert main(["knn", "--weights", "pixels:24", "--data", train, "--val", val, *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"pipeline: error: {complaint}") and said.count("\n") == 1
