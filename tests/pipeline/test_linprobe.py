"""The probe's rate is chosen on held-out images alone, and both feeds take the same samples."""

import pytest
import torch

from pipeline.__main__ import main
from pipeline.data.reader import ShardReader
from pipeline.distributed.launch import DistInfo
from pipeline.errors import UserError
from pipeline.evals.feature_cache import FeatureExtractor, Features
from pipeline.evals.feature_extractor import load_frozen_encoder
from pipeline.evals.linear_heads import LinearHeads
from pipeline.evals.linprobe import _check, _judge, format_probe
from pipeline.evals.probe_batches import CachedFeatures, RandomCropFeatures
from pipeline.recipe.linear_probe import load_probe_recipe

CPU = torch.device("cpu")
RATES = (1.0, 0.1, 0.3)
CLASSES = 2


def heads() -> LinearHeads:
    """Of one feature x, each with a threshold of its own, above which it says class 1: 1, 2 and 3."""
    made = LinearHeads(RATES, CLASSES, width=1).eval()
    with torch.no_grad():
        made.weight.copy_(torch.tensor([[-1.0], [1.0]]))
        made.bias.copy_(torch.tensor([[at, -at] for at in (1.0, 2.0, 3.0)]))
    return made


def told(*classes: int) -> Features:
    """Samples x = 0.5, 1.5, 2.5, 3.5 of these classes."""
    return Features(torch.arange(4)[:, None] + 0.5, torch.tensor(classes))


@pytest.mark.parametrize(
    ("held_out", "val", "chosen"),
    [
        (told(0, 1, 1, 1), told(0, 0, 0, 1), 1.0),  # on val the third is best: never asked
        (told(0, 0, 0, 1), told(0, 1, 1, 1), 0.3),
        (told(0, 1, 0, 1), told(0, 1, 1, 1), 0.3),  # the first and the third are equal
        (None, told(0, 0, 0, 1), 1.0),  # nothing to choose by
    ],
)
def test_the_rate_is_chosen_on_what_was_held_out_and_of_equals_the_smallest(held_out, val, chosen):
    result = _judge(heads(), CLASSES, val, held_out, CPU)
    assert result["chosen"] == chosen
    by_rate = {row["base_lr"]: row for row in result["rates"]}
    assert result["top1"] == by_rate[chosen]["val"]["top1"]
    on_val = [((val.values[:, 0] > at).long() == val.labels).sum().item() for at in (1, 2, 3)]
    assert [by_rate[rate]["val"]["top1"]["correct"] for rate in RATES] == on_val


@pytest.mark.parametrize("subset", [1, 0.5])
def test_both_feeds_take_the_samples_of_the_streams_positions(labelled_sets, tmp_path, subset):
    """From step 1 on and over the ends of epochs, on each of two ranks."""
    data = {"global_batch": 16, "holdout": 0.2, "image_size": 24, "subset": subset}
    given = {"probe": {"weights": "pixels:24"}, "data": data, "engine": {"micro_batch": 4}}
    recipe = load_probe_recipe(given)
    reader = ShardReader(labelled_sets[0], recipe.data)
    model = load_frozen_encoder("pixels:24", None, "class_token")
    worlds = [DistInfo(rank, 2, rank, 2, CPU, 1) for rank in range(2)]
    alone = DistInfo(0, 1, 0, 1, CPU, 1)
    whole = FeatureExtractor(model, alone, cache=tmp_path)(
        reader
    )  # ranks that are not connected find it there
    stream = reader.stream(recipe.seed)
    for dist_info in worlds:
        extract = FeatureExtractor(model, dist_info, cache=tmp_path)
        kept, crops = (feed(recipe, reader, extract, 1) for feed in (CachedFeatures, RandomCropFeatures))
        for step in range(1, 5):
            positions = torch.arange(16 * step, 16 * (step + 1)).chunk(2)[dist_info.rank]
            samples = stream.locate(positions.numpy()).sample
            features, labels = kept.next()
            assert torch.equal(features, whole.values[samples])
            assert torch.equal(labels, whole.labels[samples])
            assert torch.equal(labels, torch.cat([crops.next().labels for _ in range(2)]))
        crops.close()


def test_a_probe_of_another_length_is_another_probe(tmp_path):
    given = {"probe": {"weights": "pixels:24"}}
    begun, longer = (load_probe_recipe({**given, "train": {"epochs": epochs}}) for epochs in (60, 90))
    (tmp_path / "recipe.yaml").write_text(begun.to_yaml())
    _check(tmp_path, begun)
    with pytest.raises(
        UserError, match=r"train.epochs was 60.0, is 90.0; .* another length is another probe"
    ):
        _check(tmp_path, longer)


def test_a_batch_that_is_more_than_the_set_is_said(labelled_sets, tmp_path, capsys, kept_environment):
    train, val = map(str, labelled_sets)
    command = ["linprobe", "--weights", "pixels:8", "--center-crops", "--data", train, "--val", val]
    command += ["--lr", "0.1", "--set=data.holdout=0", "--set=train.steps=1"]
    for batch, said in ((64, True), (32, False)):
        assert main([*command, f"--set=data.global_batch={batch}", "--run", str(tmp_path / f"{batch}")]) == 0
        line = f"data.global_batch: {batch} is more than the 60 training images"
        assert (line in capsys.readouterr().err) == said


@pytest.mark.parametrize(
    ("labels", "by_class", "center_crops", "said"),
    [
        (1.0, False, False, "9 training images, 3 held"),
        (0.5, False, False, "9 training images (0.5 of the labels), 3 held"),
        (
            0.5,
            True,
            True,
            "9 training images (0.5 of the labels, class-balanced), centre crops alone, 3 held",
        ),
    ],
)
def test_the_table_says_what_was_learned_from(labels, by_class, center_crops, said):
    found = {"correct": 1, "total": 2}
    result = {
        "features": "pixels",
        "train": {"samples": 9, "labels": labels, "by_class": by_class},
        "held_out": {"samples": 3},
        "val": {"samples": 4},
        "classes": 2,
        "recipe": {"probe": {"center_crops": center_crops}},
        "rates": [{"base_lr": 0.1, "held_out": None, "val": {"top1": found}}],
        "chosen": 0.1,
    }
    assert said in format_probe(result)


@pytest.mark.parametrize(
    ("chosen", "held_out", "said"),
    [(0.1, True, True), (0.3, True, False), (1.0, True, True), (0.1, False, False)],
)
def test_a_rate_chosen_at_the_edge_of_the_sweep_is_said(chosen, held_out, said):
    found = {"top1": {"correct": 1, "total": 2}}
    result = {
        "features": "pixels",
        "train": {"samples": 9, "labels": 1.0, "by_class": False},
        "held_out": {"samples": 3 * held_out},
        "val": {"samples": 4},
        "classes": 2,
        "recipe": {"probe": {"center_crops": False}},
        "rates": [
            {"base_lr": rate, "held_out": found if held_out else None, "val": found}
            for rate in (0.1, 0.3, 1.0)
        ],
        "chosen": chosen,
    }
    assert ("a better one may lie beyond" in format_probe(result)) == said
