"""A fine-tuned classifier's exports give its logits; what cannot be one, or cannot be read, is one line."""

import json
import re
import shutil
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
from exporting import IMAGES, assert_same, export, processed
from safetensors.torch import load_file
from small_run import small_classifier

from pipeline.__main__ import main
from pipeline.data.reader import ShardReader
from pipeline.errors import UserError
from pipeline.export import command
from pipeline.recipe.finetune import FinetuneRecipe
from pipeline.recipe.loading import load
from pipeline.tasks.classification import Finetuning
from pipeline.tasks.finetuned_run import load_finetuned_run
from pipeline.tasks.run_metadata import load_initial_weights, load_or_create
from pipeline.weights.encoder import load_encoder

FORMATS = ["timm", "official", "onnx"]


@pytest.fixture(scope="module")
def tuned(labelled_sets, tmp_path_factory):
    return small_classifier(tmp_path_factory.mktemp("tuned") / "run", labelled_sets, "train.ema_decay=0.9")


@pytest.fixture
def mine(tuned, tmp_path):
    """The run, to be damaged."""
    return shutil.copytree(tuned, tmp_path / "run")


@pytest.fixture
def complaint(tmp_path, capsys):
    """Runs an export that must be refused; returns its line."""

    def refused(run, target: str = "timm", *options: str) -> str:
        assert main(["export", str(run), str(tmp_path / "out"), "--format", target, *options]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and not (tmp_path / "out").exists()
        return said

    return refused


def classes(sets) -> list[str]:
    return json.loads((sets[0] / "manifest.json").read_text())["classes"]


def test_what_is_read_from_the_run_is_what_was_trained(tuned, labelled_sets):
    recipe = load(FinetuneRecipe, tuned / "recipe.yaml")
    trained = Finetuning(recipe, str(labelled_sets[1])).build(ShardReader(labelled_sets[0], recipe.data))
    trained.load_state_dict(load_file(tuned / "checkpoints/step-00000030/weights.safetensors"))
    assert_same(load_finetuned_run(tuned).classifier.scores(IMAGES), trained.scores(IMAGES))


def test_timm_has_the_logits_and_the_names(tuned, labelled_sets, tmp_path):
    loaded = export(tuned, tmp_path / "out", "timm")
    ours, model = load_finetuned_run(tuned).classifier, loaded["model"]
    with torch.inference_mode():
        assert_same(model(IMAGES), ours.scores(IMAGES))
        expected = ours.scores(processed(loaded["image"]))
        assert_same(loaded["logits"], expected)
    names = classes(labelled_sets)
    assert model.pretrained_cfg["label_names"] == names and loaded["name"] == names[expected.argmax()]
    weights = tmp_path / "out" / "model.safetensors"
    shape = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    more = {"num_classes": 6, "global_pool": "avg", "checkpoint_path": str(weights)}
    peer = timm.create_model("vit_tiny_patch16_224", **shape, **more).eval()
    with torch.inference_mode():
        assert_same(peer(IMAGES), ours.scores(IMAGES))


@pytest.mark.parametrize("resize", [48, 55, 59, 81])  # 48 / (48 / 59) is less than 59
def test_timm_resizes_as_the_accuracy_was_measured(mine, tmp_path, resize):
    recipe = (mine / "recipe.yaml").read_text()
    (mine / "recipe.yaml").write_text(recipe.replace("resize: null", f"resize: {resize}"))
    found = export(mine, tmp_path / "out", "timm")["transform"].transforms
    assert (found[0].size, found[1].size) == (resize, (48, 48))
    assert f"resized (bicubic) to {resize} px" in (tmp_path / "out" / "README.md").read_text()


def test_the_documentation_loads_it_as_its_model_card_does(tuned):
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    assert f"```python\n{command.OF_CLASSIFIERS['timm'].usage(load_finetuned_run(tuned))}```" in page


def test_readable_names_of_classes_are_timms_descriptions(mine, tmp_path):
    begun = json.loads((mine / "weights.json").read_text())
    readable = [f"a {name} with ears" for name in begun["classes"]]
    (mine / "weights.json").write_text(json.dumps({**begun, "class_names": readable}))
    model = export(mine, tmp_path / "out", "timm")["model"]
    described = model.pretrained_cfg["label_descriptions"]
    assert [described[name] for name in model.pretrained_cfg["label_names"]] == readable
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"\n   5 {begun['classes'][5]} {readable[5]}\n" in card


def test_the_official_checkpoint_has_the_keys_of_models_vit_with_global_pool(tuned, tmp_path):
    loaded = export(tuned, tmp_path / "out", "official")
    with torch.inference_mode():
        assert_same(loaded["logits"], load_finetuned_run(tuned).classifier.scores(IMAGES))
    state = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)["model"]
    layers = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    layers = [f"blocks.{number}.{layer}" for number in (0, 1) for layer in layers]
    layers += ["patch_embed.proj", "fc_norm", "head"]  # written out from facebookresearch/mae: no norm
    wanted = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert state.keys() == wanted | {"cls_token", "pos_embed"}


def test_onnxruntime_has_the_logits_of_any_batch_and_the_names(tuned, labelled_sets, tmp_path):
    assert main(["export", str(tuned), str(tmp_path / "out"), "--format", "onnx"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'session.run(["logits"]' in card and "classifier.onnx" in card
    session = onnxruntime.InferenceSession(tmp_path / "out" / "classifier.onnx")
    for batch in (IMAGES, IMAGES[:1], IMAGES.repeat(3, 1, 1, 1)):
        (theirs,) = session.run(["logits"], {"images": batch.numpy()})
        with torch.inference_mode():
            assert_same(torch.from_numpy(theirs), load_finetuned_run(tuned).classifier.scores(batch))
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == classes(labelled_sets)


def test_the_moving_average_is_exported_where_it_is_asked_for(tuned, tmp_path):
    model = export(tuned, tmp_path / "out", "timm", "--ema")["model"]
    averaged, weights = (load_finetuned_run(tuned, ema).classifier for ema in (True, False))
    with torch.inference_mode():
        assert_same(model(IMAGES), averaged.scores(IMAGES))
        assert not torch.allclose(model(IMAGES), weights.scores(IMAGES), atol=0.1)
    assert "not of their moving average, which these are" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("target", FORMATS)
def test_logits_of_other_weights_are_too_different(tuned, tmp_path, target):
    other = load_finetuned_run(tuned)
    with torch.no_grad():
        other.classifier.vit.fc_norm.bias[3] += 1e-3
    chosen = command.OF_CLASSIFIERS[target]
    chosen.write(other, tmp_path)
    assert chosen.difference(other, tmp_path) <= command.TOLERANCE
    assert chosen.difference(load_finetuned_run(tuned), tmp_path) > command.TOLERANCE


def test_the_model_card_says_what_it_tells_apart_what_it_began_with_and_how_often_it_is_right(
    tuned, labelled_sets, tmp_path
):
    assert main(["export", str(tuned), str(tmp_path / "out"), "--format", "timm"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# Classifier of 6 classes, patch 8, 48 px" in card
    assert all(f"\n   {number} {name}\n" in card for number, name in enumerate(classes(labelled_sets)))
    begun = json.loads((tuned / "weights.json").read_text())
    assert "It began with mae on vit_tiny, random weights" in card and begun["digest"] in card
    top1 = json.loads((tuned / "accuracy.json").read_text())["top1"]
    share, low, high = (f"{top1[key]:.2%}" for key in ("accuracy", "low", "high"))
    assert re.search(rf"\| top1, 95 % interval \| +{share} \[{low}, {high}\] \|", card)
    assert f"Measured after step 30 on {labelled_sets[1].name}." in card
    assert "tags: [timm, safetensors, vit, image-classification]" in card
    about = json.loads((tmp_path / "out" / "export.json").read_text())
    assert about["method"] == "finetune" and about["difference"] <= 1e-5


def test_a_run_that_was_not_measured_yet_says_so(mine, tmp_path):
    (mine / "accuracy.json").unlink()
    assert main(["export", str(mine), str(tmp_path / "out"), "--format", "timm"]) == 0
    assert "Accuracy: not recorded: **to be filled in**." in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"top1": ', "no JSON that can be read"),
        ("[]", "is not what a fine-tuning measures"),
        ('{"step": 30}', "is not what a fine-tuning measures (KeyError('top1'))"),
        ('{"top1": {"correct": 1, "total": 0}}', "is not what a fine-tuning measures"),
    ],
)
def test_a_damaged_measurement_is_one_line(mine, complaint, content, says):
    (mine / "accuracy.json").write_text(content)
    assert f"{mine / 'accuracy.json'}: {says}" in complaint(mine)


@pytest.mark.parametrize("target", ["hf", "hf-mae"])
def test_transformers_has_no_such_classifier(tuned, complaint, target):
    said = complaint(tuned, target)
    assert f"--format {target}: transformers' ViTForImageClassification classifies by the class token" in said
    assert "take one of timm, official, onnx" in said


def test_there_is_no_decoder_to_leave_out(tuned, complaint):
    assert "--encoder-only: a fine-tuned classifier has no decoder" in complaint(
        tuned, "official", "--encoder-only"
    )


@pytest.mark.parametrize("target", FORMATS)
def test_a_classifier_with_relative_positions_is_refused_as_its_encoder_is(
    labelled_sets, tmp_path, complaint, target
):
    run = small_classifier(tmp_path / "lomar", labelled_sets, recipe="vitb16_lomar")
    said = complaint(run, target)
    assert f"--format {target}: LoMaR's encoder has relative positions" in said


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda _: None, "no JSON that can be read"),
        (lambda begun: begun | {"heads": 5}, "6 classes and 5 heads are not the checkpoint's"),
        (lambda begun: begun | {"classes": ["one"]}, "1 classes and 4 heads are not the checkpoint's"),
        (lambda begun: begun | {"class_names": ["one"]}, "class_names: 1 names of 6 classes"),
        (lambda begun: begun | {"heads": "four"}, "heads: input should be a valid integer, got 'four'"),
        (lambda begun: list(begun), "is not what a fine-tuning writes"),
        (lambda begun: {"encoder": "e", "digest": "d"}, "says nothing of heads, classes, class_names"),
    ],
)
def test_what_the_run_cannot_say_of_itself_is_one_line(mine, complaint, damage, says):
    path = mine / "weights.json"
    damaged = damage(json.loads(path.read_text()))
    path.write_text(json.dumps(damaged) if damaged else '{"encoder": ')
    said = complaint(mine)
    assert "weights.json: " in said and says in said


def test_a_run_of_an_earlier_version_is_completed_by_its_next_start(mine):
    whole = load_initial_weights(mine)
    (mine / "weights.json").write_text(json.dumps({"encoder": "as it was called", "digest": "as it was"}))
    with pytest.raises(UserError, match="start the same `finetune` command once more"):
        load_initial_weights(mine)
    found = load_or_create(mine, whole)
    assert found == load_initial_weights(mine)
    assert (found.encoder, found.digest, found.heads) == ("as it was called", "as it was", 4)


@pytest.mark.parametrize("content", ['{"encoder": ', "[]", '{"encoder": 7}'])
def test_a_damaged_beginning_is_one_line_for_the_next_start_too(mine, content):
    whole = load_initial_weights(mine)
    (mine / "weights.json").write_text(content)
    with pytest.raises(UserError, match=r"weights.json: ") as refusal:
        load_or_create(mine, whole)
    assert "\n" not in str(refusal.value)


def test_a_run_that_has_saved_nothing_is_one_line(mine, complaint):
    shutil.rmtree(mine / "checkpoints")
    assert "has no checkpoint yet" in complaint(mine)


@pytest.mark.parametrize("place", ["run", "ema:run", "timm/model.safetensors", "official/checkpoint.pth"])
def test_where_an_encoder_is_wanted_a_classifier_is_refused(mine, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    folder = place.partition("/")[0]
    if "/" in place:
        assert main(["export", "run", folder, "--format", folder]) == 0
    with pytest.raises(
        UserError, match="is a fine-tuned classifier, and an encoder is wanted here"
    ) as refusal:
        load_encoder(place)
    assert "\n" not in str(refusal.value)
