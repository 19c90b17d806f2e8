"""Classifier and fine-tuning task: MAE's head, layer-wise rates, noise, and checks of a run's inputs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from pytest import approx
from small_run import SINGLE_PROCESS
from timm.models.vision_transformer import VisionTransformer

from pipeline.data.reader import ShardReader
from pipeline.errors import AllRanksError, UserError
from pipeline.estimate.memory import OVERHEAD_GIB, RESERVE_GIB, loader_bytes
from pipeline.recipe import load_recipe
from pipeline.recipe.classification import ClassificationRecipe
from pipeline.recipe.tasks import load_finetune_recipe
from pipeline.tasks.classification import ClassificationTask
from pipeline.tasks.classifier import Classifier
from pipeline.train.run_directory import RunDirectory
from pipeline.weights.encoder import load_encoder

NUM_CLASSES = 5
ALL_ON = ["classifier.drop_path=0.4", "classifier.erasing=0.5", "classifier.rand_augment=9"]
PLAIN = ["classifier.mixup=0", "classifier.cutmix=0", "data.image_size=32"]


def recipe(*overrides: str, weights: str = "random:demo_emae") -> ClassificationRecipe:
    return load_finetune_recipe("finetune_tiny", weights, ["data.image_size=32", *overrides])


def classifier(*overrides: str) -> Classifier:
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=0)
    model = Classifier(vit, NUM_CLASSES, recipe(*overrides))
    torch.nn.init.normal_(model.vit.head.weight)  # the initial head gives logits near zero
    return model


def batch(model: Classifier, count: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    images = torch.randn(count, 3, 32, 32).clamp(-2, 2)
    return images, torch.rand(count, model.noise_size), torch.arange(count) % NUM_CLASSES


def test_loss_is_a_mean_over_pairs_and_uses_no_generator():
    model = classifier(*ALL_ON)
    inputs = batch(model)
    state = torch.get_rng_state()
    loss = model(*inputs).loss
    parts = [model(*(tensor[at : at + 2] for tensor in inputs)).loss for at in range(0, 8, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert loss.item() == approx(sum(part.item() for part in parts) / 4, rel=1e-6)
    assert model(inputs[0], inputs[1].roll(2, 0), inputs[2]).loss != loss


def test_loss_is_cross_entropy_of_the_mean_patch_token():
    model = classifier(*PLAIN, "classifier.label_smoothing=0.1")
    images, noise, labels = batch(model)
    vit = model.vit
    tokens = vit.forward_features(images)
    assert isinstance(vit.norm, torch.nn.Identity)
    logits = vit.head(vit.fc_norm(tokens[:, 1:].mean(1)))
    torch.testing.assert_close(model.predict_logits(images), logits)
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    assert model(images, noise, labels).loss.item() == approx(expected.item(), rel=1e-6)


def test_head_is_initialized_near_zero():
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=4, num_classes=0)
    head = Classifier(vit, 1000, recipe()).vit.head
    assert head.weight.std().item() == approx(2e-5, rel=0.1) and not head.bias.any()


def test_learning_rates_are_those_of_maes_code():
    model = classifier("classifier.layer_decay=0.5")
    rate, decay = {}, {}
    for group in model.parameter_groups(0.05):
        for parameter in group["params"]:
            assert id(parameter) not in rate
            rate[id(parameter)], decay[id(parameter)] = group["lr_scale"], group["weight_decay"]
    layers = 3 + 1
    for name, parameter in model.vit.named_parameters():  # util/lr_decay.py
        if name.startswith(("cls_token", "pos_embed", "patch_embed")):
            layer = 0
        else:
            layer = int(name.split(".")[1]) + 1 if name.startswith("blocks") else layers
        assert rate[id(parameter)] == 0.5 ** (layers - layer), name
        no_decay = parameter.ndim == 1 or name in ("cls_token", "pos_embed")
        assert decay[id(parameter)] == (0.0 if no_decay else 0.05), name


@pytest.mark.parametrize("blocks", [0, 1, 2, 3])
def test_partial_fine_tuning_changes_only_the_last_blocks(blocks):
    model = classifier(f"classifier.trained_blocks={blocks}", *PLAIN)
    before = {name: p.detach().clone() for name, p in model.vit.named_parameters()}
    whole = {name: rate for name, rate in learning_rates(classifier(*PLAIN)).items()}
    rates = learning_rates(model)
    groups = model.parameter_groups(0.05)
    optimizer = torch.optim.AdamW([{**group, "lr": 0.1 * group["lr_scale"]} for group in groups], fused=True)
    for _ in range(2):
        model(*batch(model)).loss.backward()
        optimizer.step()
    for name, parameter in model.vit.named_parameters():
        block = int(name.split(".")[1]) if name.startswith("blocks") else None
        is_trained = block >= 3 - blocks if block is not None else name.startswith(("fc_norm", "head"))
        assert torch.equal(parameter, before[name]) != is_trained, name
        assert rates[name] == (whole[name] if is_trained else 0.0), name


def learning_rates(model: Classifier) -> dict[str, float]:
    scale = {id(p): group["lr_scale"] for group in model.parameter_groups(0.05) for p in group["params"]}
    return {name: scale[id(parameter)] for name, parameter in model.vit.named_parameters()}


def test_drop_path_rate_grows_with_depth_and_keeps_the_mean():
    model = classifier("classifier.drop_path=0.4")
    assert [drop_path.rate for drop_path in model.drop_paths] == approx([0, 0, 0.2, 0.2, 0.4, 0.4])
    drop_path = model.drop_paths[-1]
    drop_path.draw(torch.arange(1000) / 1000)
    kept = drop_path(torch.ones(1000, 1, 1))
    assert (kept == 0).sum() == 400 and kept.mean().item() == approx(1)


def test_activation_checkpointing_changes_nothing():
    models = [classifier(*ALL_ON, f"engine.activation_checkpointing={on}") for on in ("false", "true")]
    for model in models:
        model(*batch(model)).loss.backward()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_automatic_micro_batch_counts_what_autograd_saves(labelled_sets, checkpointing):
    options = recipe(f"engine.activation_checkpointing={checkpointing}", "engine.micro_batch=auto")
    train, val = labelled_sets
    task, reader = ClassificationTask(options, str(val)), ShardReader(train, options.data)
    limits = task.micro_batch_limits(reader, 1, 40.0)
    model = task.build(reader)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def saved_bytes(count: int) -> int:
        storages = {}

        def save(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            model.compute_logits(torch.rand(count, 3, 32, 32))
        return sum(storage.nbytes() for key, storage in storages.items() if key not in weights)

    if checkpointing == "false":
        states = 16 * sum(p.numel() for p in model.parameters())
        fixed, one = (loader_bytes(options.data, count) for count in (0, 1))
        image_bytes = saved_bytes(9) - saved_bytes(8) + one - fixed
        available = (40 - OVERHEAD_GIB - RESERVE_GIB) * 2**30 - states - fixed
        assert limits.fitting == approx(available / image_bytes, rel=0.03)
    else:  # recomputed activations do not count
        plain = ClassificationTask(recipe("engine.micro_batch=auto"), str(val)).micro_batch_limits(reader, 1, 40.0)
        assert limits.fitting > plain.fitting and limits.useful < plain.useful


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["engine.micro_batch=3"], "engine.micro_batch: "),
        (["evaluation.resize=16"], "evaluation.resize: "),
        (["classifier.mixup=1.5"], "classifier.mixup: "),
        (["classifier.drop_pth=0"], "classifier.drop_pth: unknown key (did you mean drop_path?)"),
    ],
)
def test_invalid_recipe_is_rejected(overrides, key):
    with pytest.raises(UserError) as caught:
        recipe(*overrides)
    assert key in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (["classifier.encoder=vit_base"], "width 128 and 4 blocks are not classifier.encoder's, vit_base"),
        (["classifier.trained_blocks=5"], "classifier.trained_blocks: 5 exceeds the 4 blocks of --weights"),
        (["data.mean=[0.5, 0.5, 0.5]"], "data.mean: "),
        (["data.image_size=36"], "image size 36 px is not a multiple of the patch size, 8 px"),
    ],
)
def test_weights_that_do_not_match_are_a_one_line_error(labelled_sets, settings, text):
    with pytest.raises(UserError) as caught:
        build(recipe(*settings), *labelled_sets)
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_training_set_is_rejected_as_validation_set(labelled_sets):
    train, _ = labelled_sets
    with pytest.raises(UserError) as caught:
        build(recipe(), train, train)
    assert f"--val {train}: " in str(caught.value)


def test_missing_weights_are_a_one_line_error(labelled_sets, tmp_path):
    with pytest.raises(UserError, match="no such run directory or file"):
        build(recipe(weights=str(tmp_path / "none")), *labelled_sets)


def test_flops_are_counted_without_moving_parameters(labelled_sets):
    task = ClassificationTask(recipe(), str(labelled_sets[1]))
    model = task.build(ShardReader(labelled_sets[0], recipe().data))
    width, depth, tokens = 128, 4, 17
    block = tokens * 12 * width**2 + 2 * tokens**2 * width
    embedding = 16 * 3 * 64 * width
    assert task.forward_flops() == 2 * (depth * block + embedding + width * 6)
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


def test_fine_tuning_starts_from_the_given_weights(labelled_sets):
    model = build(recipe(), *labelled_sets)
    given = load_encoder("random:demo_emae", 32).vit.state_dict()
    state = model.vit.state_dict()
    kept = [key for key in given if not key.startswith("norm.")]
    assert kept and all(torch.equal(given[key], state[key]) for key in kept)


def test_head_depends_on_the_seed_but_random_weights_do_not(labelled_sets):
    def start(seed: int) -> VisionTransformer:
        torch.manual_seed(seed)  # as the trainer does
        return build(recipe(), *labelled_sets).vit

    one, same, other = start(1), start(1), start(2)
    assert torch.equal(one.head.weight, same.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)
    assert torch.equal(one.patch_embed.proj.weight, other.patch_embed.proj.weight)


def test_changed_weights_are_rejected_before_a_checkpoint(labelled_sets, tmp_path):
    source, run = tmp_path / "source.yaml", tmp_path / "run"
    run.mkdir()

    def start(seed: int) -> str:
        source.write_text(load_recipe("demo_emae", [f"seed={seed}"]).to_yaml())
        task = ClassificationTask(recipe(weights=f"random:{source}"), str(labelled_sets[1]))
        reader = ShardReader(labelled_sets[0], task.recipe.data)
        task.setup(RunDirectory(run), reader, task.build(reader), SINGLE_PROCESS)
        return (run / "weights.json").read_text()

    initial = start(0)
    assert start(0) == initial
    with pytest.raises(UserError, match=r"--weights .*source\.yaml: changed since"):
        start(1)
    (run / "checkpoints/step-00000002").mkdir(parents=True)
    assert start(1) == initial


def test_run_keeps_its_classes_and_validation_set(labelled_sets, tmp_path):
    """Class names are checked before the first checkpoint, the validation set after the first evaluation."""
    train, val = labelled_sets
    run, renamed = tmp_path / "run", tmp_path / "renamed"
    run.mkdir()
    for place in labelled_sets:
        manifest = shutil.copytree(place, renamed / place.name) / "manifest.json"
        tree = json.loads(manifest.read_text())
        tree["classes"][0] = "another"
        manifest.write_text(json.dumps(tree))

    def start(train: Path, val: Path) -> ClassificationTask:
        task = ClassificationTask(recipe(), str(val))
        reader = ShardReader(train, task.recipe.data)
        task.setup(RunDirectory(run), reader, task.build(reader), SINGLE_PROCESS)
        return task

    start(train, val)
    before = (run / "weights.json").read_text()
    with pytest.raises(UserError, match=r"--data .*classes changed since .*--run"):
        start(renamed / train.name, renamed / val.name)
    start(val, train)  # nothing is evaluated yet: the sets may have been repaired
    start(train, val).evaluate(2, lambda: None)
    (run / "checkpoints/step-00000002").mkdir(parents=True)
    with pytest.raises(UserError, match=r"--val .*: not the set that .* was evaluated on"):
        start(val, train)
    start(train, val)
    assert (run / "weights.json").read_text() == before


def test_damaged_validation_set_is_found_at_the_start(labelled_sets, tmp_path):
    train, val = labelled_sets[0], shutil.copytree(labelled_sets[1], tmp_path / "val")
    shard = next(val.rglob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    task = ClassificationTask(recipe(), str(val))
    reader = ShardReader(train, task.recipe.data)
    model = task.build(reader)
    with pytest.raises(UserError, match=shard.name):
        task.setup(RunDirectory(tmp_path), reader, model, SINGLE_PROCESS)


def test_failed_write_of_the_accuracy_is_raised_on_all_ranks(labelled_sets, tmp_path):
    task = ClassificationTask(recipe(), str(labelled_sets[1]))
    reader = ShardReader(labelled_sets[0], task.recipe.data)
    task.setup(RunDirectory(tmp_path), reader, task.build(reader), SINGLE_PROCESS)
    (tmp_path / "results.json.new").mkdir()
    with pytest.raises(AllRanksError, match=r"results\.json\.new"):
        task.evaluate(1, lambda: None)


def build(recipe: ClassificationRecipe, train, val) -> Classifier:
    return ClassificationTask(recipe, str(val)).build(ShardReader(train, recipe.data))
