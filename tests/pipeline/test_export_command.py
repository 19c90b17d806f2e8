"""`python -m pipeline export`: each format loads as its model card says, with our outputs, or is not written."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import timm
import torch
import transformers
from exporting import IMAGES, assert_same, export, preprocess
from small_run import small_run
from timm.models.beit import Beit

from pipeline.__main__ import main
from pipeline.errors import UserError
from pipeline.export import command, load_official_state_dict
from pipeline.export.formats import predict_patches
from pipeline.export.model_card import training_compute
from pipeline.masking import random_split
from pipeline.methods import build_method
from pipeline.recipe import load_recipe
from pipeline.weights.encoder import load_encoder
from pipeline.weights.run import LoadedRun, load_run

FORMATS = ["timm", "hf", "hf-mae", "official", "onnx"]


@pytest.fixture(scope="module", params=["vitb16_mae", "vitb16_emae", "vitb16_efficient_mae"])
def run(request, tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("run") / "run", request.param)


@pytest.fixture(scope="module")
def mae(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("run") / "mae")


@pytest.fixture
def failing(tmp_path, capsys):
    """A function that runs an export that must fail; returns its one-line message."""

    def fail(*arguments: str | Path) -> str:
        capsys.readouterr()
        assert main(["export", *map(str, arguments)]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    return fail


def tokens_of(run: Path, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return load_run(run).method.forward_features(images)


def test_timm_loads_folder_and_file(run, tmp_path):
    loaded = export(run, tmp_path / "out", "timm")
    with torch.inference_mode():
        assert_same(loaded["model"].forward_features(IMAGES), tokens_of(run, IMAGES))
    assert_same(loaded["tokens"], tokens_of(run, preprocess(loaded["image"])))
    shape = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    weights = str(tmp_path / "out" / "model.safetensors")
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, checkpoint_path=weights, **shape)
    with torch.inference_mode():
        assert_same(model.eval().forward_features(IMAGES), tokens_of(run, IMAGES))


def test_transformers_loads_encoder_and_preprocessing(run, tmp_path):
    loaded = export(run, tmp_path / "out", "hf")
    _, report = transformers.AutoModel.from_pretrained(
        tmp_path / "out", add_pooling_layer=False, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.inference_mode():
        assert_same(loaded["model"](pixel_values=IMAGES).last_hidden_state, tokens_of(run, IMAGES))
    pixels = loaded["processor"](loaded["image"], return_tensors="pt")["pixel_values"]
    assert (pixels - preprocess(loaded["image"])).abs().mean() < 0.5 / 255 / 0.225


def test_transformers_loads_encoder_and_decoder(run, tmp_path):
    model = export(run, tmp_path / "out", "hf-mae")["model"]
    _, report = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    loaded = load_run(run)
    noise = torch.rand(3, 36, generator=torch.Generator().manual_seed(1))
    visible_ids, masked_ids = random_split(noise, loaded.recipe.num_visible)
    with torch.inference_mode():
        output = model(pixel_values=IMAGES, noise=noise)
    assert output.mask.sum() == masked_ids.numel()
    predicted = output.logits.gather(1, masked_ids[..., None].expand(-1, -1, 192))
    assert_same(predicted, predict_patches(loaded.method, IMAGES, visible_ids, masked_ids))


def test_official_checkpoint_restores_every_weight(run, tmp_path):
    assert main(["export", str(run), str(tmp_path / "out"), "--format", "official"]) == 0
    state = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)["model"]
    assert {"mask_token", "decoder_pos_embed", "decoder_blocks.1.attn.qkv.weight"} < state.keys()
    loaded = load_run(run)
    restored = build_method(loaded.recipe)
    load_official_state_dict(restored, state)
    assert all(torch.equal(v, restored.state_dict()[k]) for k, v in loaded.method.state_dict().items())


def test_official_encoder_loads_into_timm(mae, tmp_path):
    loaded = export(mae, tmp_path / "out", "official", "--encoder-only")
    assert_same(loaded["tokens"], tokens_of(mae, IMAGES))
    state = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)["model"]
    assert not any(key.startswith(("decoder", "mask_token")) for key in state)


def test_onnxruntime_runs_the_encoder_on_any_batch_size(run, tmp_path):
    session = export(run, tmp_path / "out", "onnx")["session"]
    for batch in (IMAGES, IMAGES[:1], IMAGES.repeat(3, 1, 1, 1)):
        (tokens,) = session.run(["tokens"], {"images": batch.numpy()})
        assert_same(torch.from_numpy(tokens), tokens_of(run, batch))
    assert session.get_modelmeta().custom_metadata_map["mean"] == "(0.485, 0.456, 0.406)"


@pytest.mark.parametrize("format_name", FORMATS)
def test_export_with_other_outputs_is_removed(mae, tmp_path, format_name, monkeypatch):
    original = command.FORMATS[format_name]

    def write(loaded, folder):
        method = build_method(loaded.recipe)
        method.load_state_dict(loaded.method.state_dict())
        with torch.no_grad():
            method.encoder.blocks[1].mlp.fc2.bias[3] += 1e-3
        original.write(loaded._replace(method=method.eval()), folder)

    monkeypatch.setitem(command.FORMATS, format_name, original._replace(write=write))
    with pytest.raises(UserError, match=f"--format {format_name}: outputs of the reloaded model differ by"):
        command.export(mae, tmp_path / "out", format_name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format_name", FORMATS)
def test_relative_positions_cannot_be_exported(tmp_path, format_name, failing):
    run = small_run(tmp_path / "run", "vitb16_lomar", "method.lomar.window_size=3")
    message = failing(run, tmp_path / "out", "--format", format_name)
    assert f"--format {format_name}: LoMaR's encoder has relative positions" in message
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def beit(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("run") / "beit", "vitb16_beit", "method.target.vocabulary=11")


def test_beit_loads_into_timm_and_onnxruntime(beit, tmp_path):
    loaded = export(beit, tmp_path / "timm", "timm")
    assert isinstance(loaded["model"], Beit)
    with torch.inference_mode():
        assert_same(loaded["model"].forward_features(IMAGES), tokens_of(beit, IMAGES))
        encoder = load_encoder(tmp_path / "timm" / "model.safetensors")
        assert_same(encoder(IMAGES), tokens_of(beit, IMAGES))
    (tokens,) = export(beit, tmp_path / "onnx", "onnx")["session"].run(["tokens"], {"images": IMAGES.numpy()})
    assert_same(torch.from_numpy(tokens), tokens_of(beit, IMAGES))


def test_transformers_loads_beit_with_its_head(beit, tmp_path):
    loaded = export(beit, tmp_path / "out", "hf")
    assert loaded["tokens"].shape == (1, 37, 32) and loaded["logits"].shape == (1, 36, 11)
    method, masked = load_run(beit).method, torch.arange(36).expand(3, -1) % 3 == 0
    with torch.inference_mode():
        logits = loaded["model"](IMAGES, bool_masked_pos=masked).logits
        expected = method.head(method.encoder(method.patchify(IMAGES), masked)[:, 1:])
        encoder = load_encoder(tmp_path / "out")
        assert_same(encoder(IMAGES), tokens_of(beit, IMAGES))
    assert_same(logits, expected)


def test_formats_without_beit_reject_it(beit, tmp_path, failing):
    for options, text in (
        (("official", "--encoder-only"), "official MAE code has no relative positions"),
        (("official",), "official MAE code has no relative positions"),
        (("hf-mae",), "Beit has no decoder"),
    ):
        assert text in failing(beit, tmp_path / "out", "--format", *options)
    pixels = small_run(tmp_path / "pixels", "vitb16_beit", "method.target={name: pixels, tokenizer: null}")
    assert "predicts tokens only" in failing(pixels, tmp_path / "out", "--format", "hf")
    assert not (tmp_path / "out").exists()


def test_existing_export_needs_overwrite(mae, tmp_path, failing):
    out, arguments = tmp_path / "out", [mae, tmp_path / "out", "--format", "timm"]
    assert main(["export", *map(str, arguments)]) == 0
    (out / "README.md").write_text("edited")
    (out / "notes").mkdir()
    assert "--overwrite" in failing(*arguments)
    assert (out / "README.md").read_text() == "edited"
    assert main(["export", *map(str, arguments), "--overwrite"]) == 0
    written = ["README.md", "config.json", "export.json", "model.safetensors"]
    assert sorted(path.name for path in out.iterdir()) == written
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_replaces_only_exports(mae, tmp_path, failing):
    mine = tmp_path / "out" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    message = failing(mae, mine.parent, "--format", "timm", "--overwrite")
    assert f"{mine.parent}: already exists and is not an export" in message
    assert mine.read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["out.partial", "out.old.partial"])
def test_only_leftovers_of_killed_exports_are_removed(mae, tmp_path, failing, name):
    arguments = [mae, tmp_path / "out", "--format", "timm", "--overwrite"]
    assert main(["export", *map(str, arguments)]) == 0
    mine = tmp_path / name / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert f"{mine.parent}: export needs this name" in failing(*arguments)
    assert mine.read_text() == "mine"
    (mine.parent / "export.json").touch()
    assert main(["export", *map(str, arguments)]) == 0 and not mine.parent.exists()


def test_out_may_be_a_link_to_a_directory(mae, tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "out"
    link.symlink_to(tmp_path / "disk")
    for more in ([], ["--overwrite"]):
        assert main(["export", str(mae), str(link), "--format", "timm", *more]) == 0
        assert link.is_symlink() and (tmp_path / "disk" / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]


@pytest.mark.parametrize("format_name", ["timm", "hf-mae"])
def test_files_have_the_permissions_of_the_umask(mae, tmp_path, format_name):
    before = os.umask(0o027)
    try:
        assert main(["export", str(mae), str(tmp_path / "out"), "--format", format_name]) == 0
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["RUN", "OUT", "--format", "hf-mae", "--encoder-only"], "--encoder-only"),
        (["OUT", "RUN", "--format", "timm"], "is not an export"),
        (["nowhere", "OUT", "--format", "timm"], "nowhere: not a run directory"),
        (["RUN", "OUT", "--format", "timm", "--ema"], "train.ema_decay"),
        (["RUN", "OUT", "--format", "timm", "--results", "missing.json"], "missing.json"),
        (["RUN", "RUN/recipe.yaml/x", "--format", "timm"], "cannot be written"),
    ],
)
def test_wrong_arguments_are_one_line_errors(mae, tmp_path, failing, arguments, text):
    paths = {"RUN": str(mae), "OUT": str(tmp_path / "out")}
    assert text in failing(*(paths.get(word, word.replace("RUN", str(mae))) for word in arguments))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format_name", ["timm", "hf-mae", "official"])
def test_full_disk_leaves_nothing(mae, tmp_path, failing, format_name):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        assert "cannot be written: " in failing(mae, tmp_path / "out", "--format", format_name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["export", "reconstruct"])
def test_weights_that_are_not_finite_are_rejected(tmp_path, photographs, capsys, name):
    run = small_run(tmp_path / "run", broken="decoder.pred.weight")
    if name == "export":
        arguments = ["export", str(run), str(tmp_path / "out"), "--format", "official"]
    else:
        arguments = ["reconstruct", str(run), "--images", str(photographs), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "weights.safetensors: decoder.pred.weight has NaN or infinite" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"no graph", b"\x08\x07"])  # the last: only a version
def test_file_that_cannot_be_reloaded_is_removed(mae, tmp_path, failing, monkeypatch, content):
    broken = command.FORMATS["onnx"]._replace(write=lambda _, out: (out / "encoder.onnx").write_bytes(content))
    monkeypatch.setitem(command.FORMATS, "onnx", broken)
    assert "--format onnx: the export cannot be reloaded" in failing(mae, tmp_path / "out", "--format", "onnx")
    assert not list(tmp_path.iterdir())


def test_out_needs_a_name(mae, tmp_path, failing, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "give the name of a new directory" in failing(mae, ".", "--format", "timm")
    assert not list(tmp_path.iterdir())


def test_results_are_read_before_anything_is_written(mae, tmp_path, monkeypatch):
    never = command.FORMATS["timm"]._replace(write=lambda *_: pytest.fail("written"))
    monkeypatch.setitem(command.FORMATS, "timm", never)
    (tmp_path / "knn.json").write_text('{"knn": ')
    with pytest.raises(UserError, match=r"knn\.json"):
        command.export(mae, tmp_path / "out", "timm", results=[tmp_path / "knn.json"])


def test_model_card_ignores_an_incomplete_last_line(mae, tmp_path):
    run = shutil.copytree(mae, tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "samples": 10900, "ima')
    assert main(["export", str(run), str(tmp_path / "out"), "--format", "timm"]) == 0
    assert "| images | 10,800 |" in (tmp_path / "out" / "README.md").read_text()


def test_model_card_marks_what_the_run_did_not_record(mae, tmp_path):
    results = tmp_path / "knn.json"
    results.write_text(json.dumps({"knn": [{"k": 20, "top1": 0.5}]}))
    export(mae, tmp_path / "out", "timm", "--results", str(results))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| photos | folder | train | 960 | not recorded: **to be filled in** |" in card
    assert "| device hours | 10 (3 h of training steps," in card  # one hour on 2 ranks, two on 4
    assert "| images | 10,800 |" in card and "2 x A GPU; then 4 x A GPU" in card
    assert '"top1": 0.5' in card and "License of these weights: **to be filled in**" in card
    assert "license" not in card.partition("---\n#")[0]  # the front matter omits unknown fields


def test_compute_is_summed_up_to_the_exported_step(mae):
    lines = [json.loads(line) for line in (mae / "metrics.jsonl").read_text().splitlines()]
    starts = json.loads((mae / "environment.json").read_text())["starts"]
    assert training_compute(lines, starts, 40) == (14400, 4.0, 14.0)
    assert training_compute(lines, starts, 10) == (3600, 1.0, 2.0)


def test_documentation_shows_the_code_of_the_model_cards():
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    recipe = load_recipe("vitb16_mae")
    with torch.device("meta"):
        loaded = LoadedRun(recipe, build_method(recipe), 0)
    for export_format in [*command.FORMATS.values(), command.OFFICIAL_VIT]:
        assert f"```python\n{export_format.usage(loaded)}```" in page
