"""The probe chooses its learning rate only on held-out images, and both kinds of features have the same samples."""

import pytest
import torch
from small_run import SINGLE_PROCESS

from pipeline.__main__ import main
from pipeline.data.reader import ShardReader
from pipeline.distributed.launch import DistInfo
from pipeline.errors import UserError
from pipeline.evals.feature_cache import Features
from pipeline.evals.feature_extractor import FeatureExtractor
from pipeline.evals.frozen_encoder import load_frozen_encoder
from pipeline.evals.linear_heads import LinearHeads
from pipeline.evals.linprobe import check_run, evaluate_heads, format_probe
from pipeline.evals.probe_batches import CachedFeatures, RandomCropFeatures
from pipeline.recipe.linear_probe import load_probe_recipe
from pipeline.train.run_directory import RunDirectory

CPU = torch.device("cpu")
RATES = (1.0, 0.1, 0.3)
THRESHOLDS = (1.0, 2.0, 3.0)
CLASSES = 2


def make_heads() -> LinearHeads:
    """Return heads of one feature that predict class 1 if it is above the head's threshold."""
    heads = LinearHeads(RATES, CLASSES, width=1).eval()
    with torch.no_grad():
        heads.weight.copy_(torch.tensor([[-1.0], [1.0]]))
        heads.bias.copy_(torch.tensor([[threshold, -threshold] for threshold in THRESHOLDS]))
    return heads


def make_features(*classes: int) -> Features:
    """Return samples with the features 0.5, 1.5, 2.5, 3.5 and these classes."""
    return Features(torch.arange(4)[:, None] + 0.5, torch.tensor(classes))


@pytest.mark.parametrize(
    ("held_out", "val", "chosen"),
    [
        (make_features(0, 1, 1, 1), make_features(0, 0, 0, 1), 1.0),  # on val the third head is better
        (make_features(0, 0, 0, 1), make_features(0, 1, 1, 1), 0.3),
        (make_features(0, 1, 0, 1), make_features(0, 1, 1, 1), 0.3),  # the first and the third head are equal
        (None, make_features(0, 0, 0, 1), 1.0),  # no held-out samples
    ],
)
def test_rate_is_best_on_held_out_and_smallest_of_equals(held_out, val, chosen):
    result = evaluate_heads(make_heads(), CLASSES, val, held_out, CPU)
    assert result["chosen"] == chosen
    by_rate = {row["base_lr"]: row for row in result["rates"]}
    assert result["top1"] == by_rate[chosen]["val"]["top1"]
    on_val = [((val.values[:, 0] > threshold).long() == val.labels).sum().item() for threshold in THRESHOLDS]
    assert [by_rate[rate]["val"]["top1"]["correct"] for rate in RATES] == on_val


@pytest.mark.parametrize("subset", [1, 0.5])
def test_cached_and_random_crops_have_the_same_samples(labelled_sets, tmp_path, subset):
    """From step 1 over several epochs, on each of two ranks."""
    data = {"global_batch": 16, "holdout": 0.2, "image_size": 24, "subset": subset}
    recipe = load_probe_recipe({"probe": {"weights": "pixels:24"}, "data": data, "engine": {"micro_batch": 4}})
    reader = ShardReader(labelled_sets[0], recipe.data)
    model = load_frozen_encoder("pixels:24", None, "class_token")
    expected = FeatureExtractor(model, SINGLE_PROCESS, cache=tmp_path)(reader)  # for the ranks, which share no group
    sampler = reader.sampler(recipe.seed)
    for rank in range(2):
        extract = FeatureExtractor(model, DistInfo(rank, 2, rank, 2, CPU, 1), cache=tmp_path)
        cached, crops = (source(recipe, reader, extract, 1) for source in (CachedFeatures, RandomCropFeatures))
        for step in range(1, 5):
            positions = torch.arange(16 * step, 16 * (step + 1)).chunk(2)[rank]
            samples = sampler.locate(positions.numpy()).sample_id
            features, labels = cached.next()
            assert torch.equal(features, expected.values[samples])
            assert torch.equal(labels, expected.labels[samples])
            assert torch.equal(labels, torch.cat([crops.next().labels for _ in range(2)]))
        crops.close()


def test_another_number_of_epochs_needs_another_run(tmp_path):
    options = {"probe": {"weights": "pixels:24"}}
    recipe, longer = (load_probe_recipe({**options, "train": {"epochs": epochs}}) for epochs in (60, 90))
    run = RunDirectory(tmp_path)
    run.recipe_file.write_text(recipe.to_yaml())
    check_run(run, recipe)
    with pytest.raises(UserError, match=r"train\.epochs was 60\.0, is 90\.0"):
        check_run(run, longer)


def test_batch_larger_than_the_set_is_a_warning(labelled_sets, tmp_path, capsys, kept_environment):
    train, val = map(str, labelled_sets)
    command = ["linprobe", "--weights", "pixels:8", "--center-crops", "--data", train, "--val", val]
    command += ["--lr", "0.1", "--set=data.holdout=0", "--set=train.steps=1"]
    for batch, warns in ((64, True), (32, False)):
        assert main([*command, f"--set=data.global_batch={batch}", "--run", str(tmp_path / f"{batch}")]) == 0
        assert (f"data.global_batch: {batch} is more than the 60 " in capsys.readouterr().err) == warns


@pytest.mark.parametrize(
    ("labels", "by_class", "center_crops", "text"),
    [
        (1.0, False, False, "9 training images, 3 held"),
        (0.5, False, False, "9 training images (0.5 of the labels), 3 held"),
        (0.5, True, True, "9 training images (0.5 of the labels, class-balanced), center crops only, 3 held"),
    ],
)
def test_table_describes_the_training_set(labels, by_class, center_crops, text):
    result = {
        "features": "pixels",
        "train": {"samples": 9, "labels": labels, "by_class": by_class},
        "held_out": {"samples": 3},
        "val": {"samples": 4},
        "classes": 2,
        "recipe": {"probe": {"center_crops": center_crops}},
        "rates": [{"base_lr": 0.1, "held_out": None, "val": {"top1": {"correct": 1, "total": 2}}}],
        "chosen": 0.1,
    }
    assert text in format_probe(result)


@pytest.mark.parametrize(
    ("chosen", "held_out", "is_noted"), [(0.1, True, True), (0.3, True, False), (1.0, True, True), (0.1, False, False)]
)
def test_rate_at_the_edge_of_the_sweep_is_noted(chosen, held_out, is_noted):
    accuracy = {"top1": {"correct": 1, "total": 2}}
    rates = [{"base_lr": rate, "held_out": accuracy if held_out else None, "val": accuracy} for rate in (0.1, 0.3, 1.0)]
    result = {
        "features": "pixels",
        "train": {"samples": 9, "labels": 1.0, "by_class": False},
        "held_out": {"samples": 3 * held_out},
        "val": {"samples": 4},
        "classes": 2,
        "recipe": {"probe": {"center_crops": False}},
        "rates": rates,
        "chosen": chosen,
    }
    assert ("edge of the sweep" in format_probe(result)) == is_noted
