"""The classifier: MAE's head, layer-wise rates, and randomness by noise alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from pytest import approx
from timm.models.vision_transformer import VisionTransformer

from pipeline.data.reader import ShardReader
from pipeline.distributed.launch import DistInfo
from pipeline.errors import AllRanksError, UserError
from pipeline.recipe import load_recipe
from pipeline.recipe.finetune import FinetuneRecipe, load_finetune_recipe
from pipeline.tasks.classification import Finetuning
from pipeline.tasks.classifier import Classifier
from pipeline.weights.encoder import load_encoder

CLASSES = 5
ALONE = DistInfo(0, 1, 0, 1, torch.device("cpu"), 1)
ALL_ON = ["classifier.drop_path=0.4", "classifier.erasing=0.5", "classifier.rand_augment=9"]
PLAIN = ["classifier.mixup=0", "classifier.cutmix=0", "data.image_size=32"]


def recipe(*overrides: str, weights: str = "random:demo_emae") -> FinetuneRecipe:
    return load_finetune_recipe("finetune_tiny", weights, ["data.image_size=32", *overrides])


def classifier(*overrides: str) -> Classifier:
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=0)
    made = Classifier(vit, CLASSES, recipe(*overrides))
    torch.nn.init.normal_(made.vit.head.weight)  # as initialised it hardly says anything
    return made


def batch(learner: Classifier, count: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    images = torch.randn(count, 3, 32, 32).clamp(-2, 2)
    return images, torch.rand(count, learner.noise_size), torch.arange(count) % CLASSES


def test_the_loss_of_a_batch_is_the_mean_of_its_parts_and_asks_no_generator():
    learner = classifier(*ALL_ON)
    inputs = batch(learner)
    state = torch.get_rng_state()
    whole = learner(*inputs).loss
    parts = [learner(*(tensor[at : at + 2] for tensor in inputs)).loss for at in range(0, 8, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert whole.item() == approx(sum(part.item() for part in parts) / 4, rel=1e-6)
    assert learner(inputs[0], inputs[1].roll(2, 0), inputs[2]).loss != whole


def test_without_augmentation_it_is_the_cross_entropy_of_a_linear_layer_on_the_mean_patch():
    learner = classifier(*PLAIN, "classifier.label_smoothing=0.1")
    images, noise, labels = batch(learner)
    vit = learner.vit
    tokens = vit.forward_features(images)
    assert isinstance(vit.norm, torch.nn.Identity)
    logits = vit.head(vit.fc_norm(tokens[:, 1:].mean(1)))
    torch.testing.assert_close(learner.scores(images), logits)
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    assert learner(images, noise, labels).loss.item() == approx(expected.item(), rel=1e-6)


def test_the_head_begins_near_zero():
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=4, num_classes=0)
    head = Classifier(vit, 1000, recipe()).vit.head
    assert head.weight.std().item() == approx(2e-5, rel=0.1) and not head.bias.any()


def test_layers_learn_at_the_rates_of_maes_code():
    learner = classifier("classifier.layer_decay=0.5")
    rate, decay = {}, {}
    for group in learner.parameter_groups(0.05):
        for parameter in group["params"]:
            assert id(parameter) not in rate
            rate[id(parameter)], decay[id(parameter)] = group["lr_scale"], group["weight_decay"]
    layers = 3 + 1
    for name, parameter in learner.vit.named_parameters():  # util/lr_decay.py
        if name.startswith(("cls_token", "pos_embed", "patch_embed")):
            layer = 0
        else:
            layer = int(name.split(".")[1]) + 1 if name.startswith("blocks") else layers
        assert rate[id(parameter)] == 0.5 ** (layers - layer), name
        plain = parameter.ndim == 1 or name in ("cls_token", "pos_embed")
        assert decay[id(parameter)] == (0.0 if plain else 0.05), name


def test_blocks_are_skipped_more_often_the_deeper_they_are_and_kept_branches_make_up_for_it():
    learner = classifier("classifier.drop_path=0.4")
    assert [skip.rate for skip in learner.skips] == approx([0, 0, 0.2, 0.2, 0.4, 0.4])
    skip = learner.skips[-1]
    skip.draw(torch.arange(1000) / 1000)
    kept = skip(torch.ones(1000, 1, 1))
    assert (kept == 0).sum() == 400 and kept.mean().item() == approx(1)


def test_activation_checkpointing_changes_nothing():
    learners = [classifier(*ALL_ON, f"engine.activation_checkpointing={on}") for on in ("false", "true")]
    for learner in learners:
        learner(*batch(learner)).loss.backward()
    for one, other in zip(*(learner.parameters() for learner in learners), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (
            ["engine.micro_batch=3"],
            "engine.micro_batch: 3 is no multiple of 2; mixup and cutmix mix neighbours",
        ),
        (["evaluation.resize=16"], "evaluation.resize: 16 px hold no square of data.image_size, 32"),
        (["classifier.mixup=1.5"], "classifier.mixup: input should be less than or equal to 1, got 1.5"),
        (["classifier.drop_pth=0"], "classifier.drop_pth: unknown key (did you mean drop_path?)"),
    ],
)
def test_an_impossible_recipe_is_refused(overrides, complaint):
    with pytest.raises(UserError) as raised:
        recipe(*overrides)
    assert complaint in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (["classifier.encoder=vit_base"], "is 128 wide and 4 blocks deep; these settings are for vit_base"),
        (
            ["data.mean=[0.5, 0.5, 0.5]"],
            "data.mean: is [0.5, 0.5, 0.5], but --weights random:demo_emae was trained",
        ),
        (["data.image_size=36"], "patches of 8 px, and 36 px images are no multiple"),
    ],
)
def test_weights_that_do_not_fit_the_recipe_are_one_line(labelled_sets, settings, complaint):
    with pytest.raises(UserError) as raised:
        build(recipe(*settings), *labelled_sets)
    assert complaint in str(raised.value) and "\n" not in str(raised.value)


def test_to_be_judged_on_what_was_learned_is_refused_in_one_line(labelled_sets):
    train, _ = labelled_sets
    with pytest.raises(UserError) as raised:
        build(recipe(), train, train)
    assert f"--val {train}: holds shards of --data {train}" in str(raised.value)


def test_weights_that_are_not_there_are_one_line(labelled_sets, tmp_path):
    with pytest.raises(UserError, match="no such run directory or file"):
        build(recipe(weights=str(tmp_path / "none")), *labelled_sets)


def test_operations_are_counted_without_computing_or_copying(labelled_sets):
    task = Finetuning(recipe(), str(labelled_sets[1]))
    learner = task.build(ShardReader(labelled_sets[0], recipe().data))
    width, depth, tokens = 128, 4, 17
    block = tokens * 12 * width**2 + 2 * tokens**2 * width
    embedding = 16 * 3 * 64 * width
    assert task.forward_flops() == 2 * (depth * block + embedding + width * 6)
    assert all(parameter.device.type == "cpu" for parameter in learner.parameters())


def test_fine_tuning_begins_with_the_weights_that_it_was_given(labelled_sets):
    learner = build(recipe(), *labelled_sets)
    given = load_encoder("random:demo_emae", 32).vit.state_dict()
    own = learner.vit.state_dict()
    kept = [key for key in given if not key.startswith("norm.")]
    assert kept and all(torch.equal(given[key], own[key]) for key in kept)


def test_the_head_follows_the_fine_tunings_seed_and_random_weights_their_recipes(labelled_sets):
    def begun(seed: int) -> VisionTransformer:
        torch.manual_seed(seed)  # as the loop does
        return build(recipe(), *labelled_sets).vit

    one, same, other = begun(1), begun(1), begun(2)
    assert torch.equal(one.head.weight, same.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)
    assert torch.equal(one.patch_embed.proj.weight, other.patch_embed.proj.weight)


def test_weights_that_have_changed_since_the_run_began_are_refused_until_it_has_saved_some(
    labelled_sets, tmp_path
):
    source, run = tmp_path / "source.yaml", tmp_path / "run"
    run.mkdir()

    def begin(seed: int) -> str:
        source.write_text(load_recipe("demo_emae", [f"seed={seed}"]).to_yaml())
        task = Finetuning(recipe(weights=f"random:{source}"), str(labelled_sets[1]))
        reader = ShardReader(labelled_sets[0], task.recipe.data)
        task.begin(run, reader, task.build(reader), ALONE)
        return (run / "weights.json").read_text()

    begun = begin(0)
    assert begin(0) == begun
    with pytest.raises(UserError, match=r"source.yaml: are others .* than those that .*run began with"):
        begin(1)
    (run / "checkpoints/step-00000002").mkdir(parents=True)
    assert begin(1) == begun


def test_a_run_is_of_one_pair_of_sets(labelled_sets, tmp_path):
    """Classes by name before anything is saved (after that by the checkpoint); what judges it once it has."""
    train, val = labelled_sets
    run, renamed = tmp_path / "run", tmp_path / "renamed"
    run.mkdir()
    for place in labelled_sets:
        manifest = shutil.copytree(place, renamed / place.name) / "manifest.json"
        tree = json.loads(manifest.read_text())
        tree["classes"][0] = "another"
        manifest.write_text(json.dumps(tree))

    def begun(train: Path, val: Path) -> Finetuning:
        task = Finetuning(recipe(), str(val))
        reader = ShardReader(train, task.recipe.data)
        task.begin(run, reader, task.build(reader), ALONE)
        return task

    begun(train, val)
    before = (run / "weights.json").read_text()
    with pytest.raises(
        UserError, match=r"other names, or another order, than those that .*; give a new --run"
    ):
        begun(renamed / train.name, renamed / val.name)
    begun(val, train)  # nothing is measured yet, and a set may have been mended
    begun(train, val).evaluate(2, lambda: None)
    (run / "checkpoints/step-00000002").mkdir(parents=True)
    with pytest.raises(UserError, match=r"--val .* is another set than .* was measured on"):
        begun(val, train)
    begun(train, val)
    assert (run / "weights.json").read_text() == before


def test_a_damaged_validation_set_is_found_at_the_start(labelled_sets, tmp_path):
    train, val = labelled_sets[0], shutil.copytree(labelled_sets[1], tmp_path / "val")
    shard = next(val.rglob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    task = Finetuning(recipe(), str(val))
    reader = ShardReader(train, task.recipe.data)
    learner = task.build(reader)
    with pytest.raises(UserError, match=shard.name):
        task.begin(tmp_path, reader, learner, ALONE)


def test_accuracy_that_cannot_be_written_is_one_line_for_all_ranks(labelled_sets, tmp_path):
    task = Finetuning(recipe(), str(labelled_sets[1]))
    reader = ShardReader(labelled_sets[0], task.recipe.data)
    task.begin(tmp_path, reader, task.build(reader), ALONE)
    (tmp_path / "accuracy.json.new").mkdir()
    with pytest.raises(AllRanksError, match=r"accuracy.json.new.*start the same command again"):
        task.evaluate(1, lambda: None)


def build(recipe: FinetuneRecipe, train, val) -> Classifier:
    return Finetuning(recipe, str(val)).build(ShardReader(train, recipe.data))
