"""`python -m pipeline export` of fine-tuned classifiers: exports give our logits; damaged runs are rejected."""

import json
import re
import shutil
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
from exporting import IMAGES, assert_same, export, preprocess
from safetensors.torch import load_file
from small_run import small_classifier

from pipeline.__main__ import main
from pipeline.data.reader import ShardReader
from pipeline.errors import UserError
from pipeline.export import command
from pipeline.models.timm_beit import BIAS_TABLE
from pipeline.recipe.classification import ClassificationRecipe
from pipeline.recipe.loading import load
from pipeline.tasks.classification import ClassificationTask
from pipeline.tasks.loaded_classifier import load_classifier
from pipeline.tasks.run_metadata import load_initial_weights, load_or_create
from pipeline.train.run_directory import RunDirectory
from pipeline.weights.encoder import load_encoder

FORMATS = ["timm", "official", "onnx"]


@pytest.fixture(scope="module")
def tuned(labelled_sets, tmp_path_factory):
    return small_classifier(tmp_path_factory.mktemp("tuned") / "run", labelled_sets, "train.ema_decay=0.9")


@pytest.fixture
def copied(tuned, tmp_path):
    """A copy of the run, to be damaged."""
    return shutil.copytree(tuned, tmp_path / "run")


@pytest.fixture
def failing(tmp_path, capsys):
    """A function that runs an export that must fail; returns its one-line message."""

    def fail(run: Path, format_name: str = "timm", *options: str) -> str:
        assert main(["export", str(run), str(tmp_path / "out"), "--format", format_name, *options]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and not (tmp_path / "out").exists()
        return message

    return fail


def class_names(sets: tuple[Path, Path]) -> list[str]:
    return json.loads((sets[0] / "manifest.json").read_text())["classes"]


def logits_of(run: Path, images: torch.Tensor, ema: bool = False) -> torch.Tensor:
    with torch.inference_mode():
        return load_classifier(run, ema).classifier.predict_logits(images)


def test_loaded_run_has_the_trained_weights(tuned, labelled_sets):
    recipe = load(ClassificationRecipe, tuned / "recipe.yaml")
    trained = ClassificationTask(recipe, str(labelled_sets[1])).build(ShardReader(labelled_sets[0], recipe.data))
    trained.load_state_dict(load_file(tuned / "checkpoints/step-00000030/weights.safetensors"))
    assert_same(logits_of(tuned, IMAGES), trained.predict_logits(IMAGES))


def test_timm_has_the_logits_and_class_names(tuned, labelled_sets, tmp_path):
    loaded = export(tuned, tmp_path / "out", "timm")
    model, expected = loaded["model"], logits_of(tuned, preprocess(loaded["image"]))
    assert_same(loaded["logits"], expected)
    names = class_names(labelled_sets)
    assert model.pretrained_cfg["label_names"] == names and loaded["name"] == names[expected.argmax()]
    shape = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 6}
    weights = str(tmp_path / "out" / "model.safetensors")
    from_file = timm.create_model("vit_tiny_patch16_224", global_pool="avg", checkpoint_path=weights, **shape).eval()
    with torch.inference_mode():
        for timm_model in (model, from_file):
            assert_same(timm_model(IMAGES), logits_of(tuned, IMAGES))


@pytest.mark.parametrize("resize", [48, 55, 59, 81])  # 48 / (48 / 59) is less than 59
def test_timm_resizes_as_in_our_evaluation(copied, tmp_path, resize):
    recipe = (copied / "recipe.yaml").read_text()
    (copied / "recipe.yaml").write_text(recipe.replace("resize: null", f"resize: {resize}"))
    transforms = export(copied, tmp_path / "out", "timm")["transform"].transforms
    assert (transforms[0].size, transforms[1].size) == (resize, (48, 48))
    assert f"\n{resize} px (bicubic)" in (tmp_path / "out" / "README.md").read_text()


def test_documentation_shows_the_code_of_the_model_card(tuned):
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    assert f"```python\n{command.CLASSIFIER_FORMATS['timm'].usage(load_classifier(tuned))}```" in page


def test_readable_class_names_are_timms_descriptions(copied, tmp_path):
    initial = json.loads((copied / "weights.json").read_text())
    readable = [f"a {name} with ears" for name in initial["classes"]]
    (copied / "weights.json").write_text(json.dumps({**initial, "class_names": readable}))
    model = export(copied, tmp_path / "out", "timm")["model"]
    descriptions = model.pretrained_cfg["label_descriptions"]
    assert [descriptions[name] for name in model.pretrained_cfg["label_names"]] == readable
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"\n   5 {initial['classes'][5]} {readable[5]}\n" in card


def test_official_checkpoint_has_the_keys_of_global_pool(tuned, tmp_path):
    assert_same(export(tuned, tmp_path / "out", "official")["logits"], logits_of(tuned, IMAGES))
    state = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)["model"]
    layers = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    layers = [f"blocks.{number}.{layer}" for number in (0, 1) for layer in layers]
    layers += ["patch_embed.proj", "fc_norm", "head"]  # from facebookresearch/mae: there is no "norm"
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert state.keys() == expected | {"cls_token", "pos_embed"}


def test_onnxruntime_has_the_logits_and_class_names(tuned, labelled_sets, tmp_path):
    assert main(["export", str(tuned), str(tmp_path / "out"), "--format", "onnx"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'session.run(["logits"]' in card and "classifier.onnx" in card
    session = onnxruntime.InferenceSession(tmp_path / "out" / "classifier.onnx")
    for batch in (IMAGES, IMAGES[:1], IMAGES.repeat(3, 1, 1, 1)):
        (logits,) = session.run(["logits"], {"images": batch.numpy()})
        assert_same(torch.from_numpy(logits), logits_of(tuned, batch))
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == class_names(labelled_sets)


def test_ema_exports_the_moving_average(tuned, tmp_path):
    model = export(tuned, tmp_path / "out", "timm", "--ema")["model"]
    with torch.inference_mode():
        assert_same(model(IMAGES), logits_of(tuned, IMAGES, ema=True))
        assert not torch.allclose(model(IMAGES), logits_of(tuned, IMAGES), atol=0.1)
    assert "not of their moving average" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("format_name", FORMATS)
def test_verification_notices_other_weights(tuned, tmp_path, format_name):
    other = load_classifier(tuned)
    with torch.no_grad():
        other.classifier.vit.fc_norm.bias[3] += 1e-3
    chosen = command.CLASSIFIER_FORMATS[format_name]
    chosen.write(other, tmp_path)
    assert chosen.max_difference(other, tmp_path) <= command.TOLERANCE
    assert chosen.max_difference(load_classifier(tuned), tmp_path) > command.TOLERANCE


def test_model_card_has_classes_initial_weights_and_accuracy(tuned, labelled_sets, tmp_path):
    assert main(["export", str(tuned), str(tmp_path / "out"), "--format", "timm"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# Classifier of 6 classes, patch 8, 48 px" in card
    assert all(f"\n   {number} {name}\n" in card for number, name in enumerate(class_names(labelled_sets)))
    initial = json.loads((tuned / "weights.json").read_text())
    assert "Initial weights: mae on vit_tiny, random weights" in card and initial["digest"] in card
    top1 = json.loads((tuned / "results.json").read_text())["top1"]
    share, low, high = (f"{top1[key]:.2%}" for key in ("accuracy", "low", "high"))
    assert re.search(rf"\| top1, 95 % interval \| +{share} \[{low}, {high}\] \|", card)
    assert f"Measured after step 30 on {labelled_sets[1].name}." in card
    assert "tags: [timm, safetensors, vit, image-classification]" in card
    summary = json.loads((tmp_path / "out" / "export.json").read_text())
    assert summary["method"] == "finetune" and summary["difference"] <= 1e-5


def test_model_card_marks_a_missing_accuracy(copied, tmp_path):
    (copied / "results.json").unlink()
    assert main(["export", str(copied), str(tmp_path / "out"), "--format", "timm"]) == 0
    assert "Accuracy: not recorded: **to be filled in**." in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("content", ['{"top1": ', "[]", '{"step": 30}', '{"top1": {"correct": 1, "total": 0}}'])
def test_damaged_accuracy_file_is_a_one_line_error(copied, failing, content):
    (copied / "results.json").write_text(content)
    assert f"{copied / 'results.json'}: " in failing(copied)


@pytest.mark.parametrize("format_name", ["hf", "hf-mae"])
def test_transformers_formats_are_rejected(tuned, failing, format_name):
    message = failing(tuned, format_name)
    assert f"--format {format_name}: " in message and "timm, official, onnx" in message


def test_encoder_only_is_rejected(tuned, failing):
    assert "--encoder-only: " in failing(tuned, "official", "--encoder-only")


@pytest.mark.parametrize("format_name", FORMATS)
def test_relative_positions_cannot_be_exported(labelled_sets, tmp_path, failing, format_name):
    run = small_classifier(tmp_path / "lomar", labelled_sets, recipe="vitb16_lomar")
    assert f"--format {format_name}: LoMaR's encoder has relative positions" in failing(run, format_name)


def test_a_fine_tuned_beit_has_its_logits_in_timm(labelled_sets, tmp_path, failing):
    run = small_classifier(tmp_path / "beit", labelled_sets, recipe="vitb16_beit")
    assert "no relative positions as BEiT's" in failing(run, "official")
    loaded = export(run, tmp_path / "exported", "timm")
    assert_same(loaded["logits"], logits_of(run, preprocess(loaded["image"])))
    model = load_classifier(run).classifier
    groups = model.parameter_groups(0.05)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert all(p.ndim > 1 for group in groups for p in group["params"] if group["weight_decay"])
    (bias,) = (group for group in groups if any(p is model.vit.get_parameter(BIAS_TABLE) for p in group["params"]))
    assert (bias["lr_scale"], bias["weight_decay"]) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda _: None, ""),
        (lambda tree: tree | {"heads": 5}, "6 classes and 5 heads do not match the checkpoint"),
        (lambda tree: tree | {"classes": ["one"]}, "1 classes and 4 heads do not match the checkpoint"),
        (lambda tree: tree | {"class_names": ["one"]}, "class_names: 1 names for 6 classes"),
        (lambda tree: tree | {"heads": "four"}, "heads: "),
        (lambda tree: list(tree), "not a mapping"),
        (lambda tree: {"encoder": "e", "digest": "d"}, "lacks heads, classes, class_names"),
    ],
)
def test_damaged_weights_file_is_a_one_line_error(copied, failing, damage, text):
    path = copied / "weights.json"
    damaged = damage(json.loads(path.read_text()))
    path.write_text(json.dumps(damaged) if damaged else '{"encoder": ')
    message = failing(copied)
    assert "weights.json: " in message and text in message


def test_next_start_completes_the_weights_file(copied):
    run = RunDirectory(copied)
    complete = load_initial_weights(run)
    run.initial_weights.write_text(json.dumps({"encoder": "old name", "digest": "old digest"}))
    with pytest.raises(UserError, match="run the same `finetune` command again"):
        load_initial_weights(run)
    completed = load_or_create(run, complete)
    assert completed == load_initial_weights(run)
    assert (completed.encoder, completed.digest, completed.heads) == ("old name", "old digest", 4)


@pytest.mark.parametrize("content", ['{"encoder": ', "[]", '{"encoder": 7}'])
def test_next_start_rejects_a_damaged_weights_file(copied, content):
    run = RunDirectory(copied)
    complete = load_initial_weights(run)
    run.initial_weights.write_text(content)
    with pytest.raises(UserError, match=r"weights.json: ") as caught:
        load_or_create(run, complete)
    assert "\n" not in str(caught.value)


def test_run_without_checkpoint_is_a_one_line_error(copied, failing):
    shutil.rmtree(copied / "checkpoints")
    assert "has no checkpoint yet" in failing(copied)


@pytest.mark.parametrize("place", ["run", "ema:run", "timm/model.safetensors", "official/checkpoint.pth"])
def test_classifier_is_rejected_as_an_encoder(copied, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    folder = place.partition("/")[0]
    if "/" in place:
        assert main(["export", "run", folder, "--format", folder]) == 0
    with pytest.raises(UserError, match="is a fine-tuned model, not an encoder") as caught:
        load_encoder(place)
    assert "\n" not in str(caught.value)
