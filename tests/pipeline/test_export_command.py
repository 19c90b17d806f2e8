"""Each format is loaded by its library as its model card says, with our features; nothing else is kept."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import timm
import torch
import transformers
from exporting import IMAGES, assert_same, export, processed
from small_run import small_run

from pipeline.__main__ import main
from pipeline.errors import UserError
from pipeline.export import command, load_official_state_dict
from pipeline.export.model_card import spent
from pipeline.export.target import predictions, tokens
from pipeline.masking import random_split
from pipeline.methods import build_method
from pipeline.recipe import load_recipe
from pipeline.weights.run import LoadedRun, load_run


@pytest.fixture(scope="module", params=["vitb16_mae", "vitb16_emae", "vitb16_efficient_mae"])
def run(request, tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("run") / "run", request.param)


@pytest.fixture(scope="module")
def mae(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("run") / "mae")


def test_timm_loads_its_folder_and_its_file(run, tmp_path):
    loaded = export(run, tmp_path / "out", "timm")
    method = load_run(run).method
    with torch.inference_mode():
        assert_same(loaded["model"].forward_features(IMAGES), tokens(method, IMAGES))
        assert_same(loaded["tokens"], tokens(method, processed(loaded["image"])))
    shape = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    weights = tmp_path / "out" / "model.safetensors"
    peer = timm.create_model("vit_tiny_patch16_224", num_classes=0, checkpoint_path=str(weights), **shape)
    with torch.inference_mode():
        assert_same(peer.eval().forward_features(IMAGES), tokens(method, IMAGES))


def test_transformers_loads_the_encoder_and_its_preprocessing(run, tmp_path):
    loaded = export(run, tmp_path / "out", "hf")
    _, found = transformers.AutoModel.from_pretrained(
        tmp_path / "out", add_pooling_layer=False, output_loading_info=True
    )
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    method = load_run(run).method
    with torch.inference_mode():
        assert_same(loaded["model"](pixel_values=IMAGES).last_hidden_state, tokens(method, IMAGES))
    pixels = loaded["processor"](loaded["image"], return_tensors="pt")["pixel_values"]
    assert (pixels - processed(loaded["image"])).abs().mean() < 0.5 / 255 / 0.225


def test_transformers_loads_the_whole_method(run, tmp_path):
    model = export(run, tmp_path / "out", "hf-mae")["model"]
    _, found = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    trained = load_run(run)
    noise = torch.rand(3, 36, generator=torch.Generator().manual_seed(1))
    visible, masked = random_split(noise, trained.recipe.num_visible)
    with torch.inference_mode():
        output = model(pixel_values=IMAGES, noise=noise)
    assert output.mask.sum() == masked.numel()
    theirs = output.logits.gather(1, masked[..., None].expand(-1, -1, 192))
    assert_same(theirs, predictions(trained.method, IMAGES, visible, masked))


def test_the_official_checkpoint_has_the_decoder_and_comes_back_bit_by_bit(run, tmp_path):
    assert main(["export", str(run), str(tmp_path / "out"), "--format", "official"]) == 0
    state = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)["model"]
    assert {"mask_token", "decoder_pos_embed", "decoder_blocks.1.attn.qkv.weight"} < state.keys()
    trained = load_run(run)
    again = build_method(trained.recipe)
    load_official_state_dict(again, state)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in trained.method.state_dict().items())


def test_the_official_encoder_is_timms(mae, tmp_path):
    loaded = export(mae, tmp_path / "out", "official", "--encoder-only")
    assert_same(loaded["tokens"], tokens(load_run(mae).method, IMAGES))
    state = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)["model"]
    assert not any(key.startswith(("decoder", "mask_token")) for key in state)


def test_onnxruntime_runs_the_encoder_on_any_batch(run, tmp_path):
    session = export(run, tmp_path / "out", "onnx")["session"]
    method = load_run(run).method
    for batch in (IMAGES, IMAGES[:1], IMAGES.repeat(3, 1, 1, 1)):
        (theirs,) = session.run(["tokens"], {"images": batch.numpy()})
        assert_same(torch.from_numpy(theirs), tokens(method, batch))
    assert session.get_modelmeta().custom_metadata_map["mean"] == "(0.485, 0.456, 0.406)"


@pytest.mark.parametrize("target", ["timm", "hf", "hf-mae", "official", "onnx"])
def test_an_export_of_other_weights_is_refused_and_removed(mae, tmp_path, target, monkeypatch):
    whole = command.TARGETS[target]

    def write(trained, folder):
        method = build_method(trained.recipe)
        method.load_state_dict(trained.method.state_dict())
        with torch.no_grad():
            method.encoder.blocks[1].mlp.fc2.bias[3] += 1e-3
        whole.write(trained._replace(method=method.eval()), folder)

    monkeypatch.setitem(command.TARGETS, target, whole._replace(write=write))
    with pytest.raises(UserError, match=f"{target}: loaded again, its outputs differ from ours by"):
        command.export(mae, tmp_path / "out", target)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["timm", "hf", "hf-mae", "official", "onnx"])
def test_lomar_is_refused_where_its_positions_cannot_be_held(tmp_path, target, capsys):
    run = small_run(tmp_path / "run", "vitb16_lomar", "method.lomar.window_size=3")
    assert main(["export", str(run), str(tmp_path / "out"), "--format", target]) == 2
    said = capsys.readouterr().err
    assert f"--format {target}: LoMaR's encoder has relative positions" in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_overwritten_without_being_told(mae, tmp_path, capsys):
    out, arguments = tmp_path / "out", ["export", str(mae), str(tmp_path / "out"), "--format", "timm"]
    assert main(arguments) == 0
    assert main(arguments) == 2 and "--overwrite to replace it" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    written = ["README.md", "config.json", "export.json", "model.safetensors"]
    assert sorted(path.name for path in out.iterdir()) == written
    assert [p.name for p in tmp_path.iterdir()] == ["out"]

    (out / "export.json").unlink()
    assert main([*arguments, "--overwrite"]) == 2 and "is no export" in capsys.readouterr().err


def test_overwrite_removes_nothing_that_the_export_did_not_write(mae, tmp_path, capsys):
    out, arguments = tmp_path / "out", ["export", str(mae), str(tmp_path / "out"), "--format", "timm"]
    assert main(arguments) == 0
    card = (out / "README.md").read_text()
    (out / "README.md").write_text(card.replace("**to be filled in** by", "CC0, by"))
    (out / "notes").mkdir()
    assert main([*arguments, "--overwrite"]) == 2
    said = capsys.readouterr().err
    assert "changed since: README.md, notes; --overwrite would remove it" in said and said.count("\n") == 1
    assert "CC0, by" in (out / "README.md").read_text() and (out / "notes").is_dir()
    (out / "notes").rmdir()
    (out / "README.md").unlink()
    assert main([*arguments, "--overwrite"]) == 0 and (out / "README.md").is_file()
    for damaged in ("{", "[]", '{"files": ["README.md"]}'):
        (out / "export.json").write_text(damaged)
        assert main([*arguments, "--overwrite"]) == 2 and (out / "README.md").is_file()


@pytest.mark.parametrize("name", ["out.partial", "out.old.partial"])
def test_only_what_a_killed_export_left_is_cleared_away(mae, tmp_path, capsys, name):
    arguments = ["export", str(mae), str(tmp_path / "out"), "--format", "timm", "--overwrite"]
    assert main(arguments) == 0
    mine = tmp_path / name / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    capsys.readouterr()
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert f"{mine.parent}: is in the way, and no export left it" in said and said.count("\n") == 1
    assert mine.read_text() == "mine"
    (mine.parent / "export.json").touch()
    assert main(arguments) == 0 and not mine.parent.exists()


def test_a_link_is_followed(mae, tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "out"
    link.symlink_to(tmp_path / "disk")
    for more in ([], ["--overwrite"]):
        assert main(["export", str(mae), str(link), "--format", "timm", *more]) == 0
        assert link.is_symlink() and (tmp_path / "disk" / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]


@pytest.mark.parametrize("target", ["timm", "hf-mae"])
def test_whoever_may_read_the_folder_may_read_its_files(mae, tmp_path, target):
    before = os.umask(0o027)
    try:
        assert main(["export", str(mae), str(tmp_path / "out"), "--format", target]) == 0
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["RUN", "OUT", "--format", "hf-mae", "--encoder-only"], "the encoder alone is hf"),
        (["OUT", "RUN", "--format", "timm"], "is there and is no export"),
        (["nowhere", "OUT", "--format", "timm"], "nowhere: no run directory"),
        (["RUN", "OUT", "--format", "timm", "--ema"], "keeps no moving average"),
        (["RUN", "OUT", "--format", "timm", "--results", "missing.json"], "missing.json: no JSON"),
        (["RUN", "RUN/recipe.yaml/x", "--format", "timm"], "cannot be written"),
    ],
)
def test_mistakes_are_one_line(mae, tmp_path, capsys, options, says):
    paths = {"RUN": str(mae), "OUT": str(tmp_path / "out")}
    options = [paths.get(option, option.replace("RUN", str(mae))) for option in options]
    assert main(["export", *options]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["timm", "hf-mae", "official"])
def test_a_full_disk_is_one_line_and_nothing_is_left(mae, tmp_path, capsys, target):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        assert main(["export", str(mae), str(tmp_path / "out"), "--format", target]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    said = capsys.readouterr().err
    assert "cannot be written: " in said and said.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"no graph", b"\x08\x07"])  # the last: a version and nothing else
def test_a_graph_that_onnx_refuses_is_one_line_and_removed(mae, tmp_path, capsys, monkeypatch, content):
    broken = command.TARGETS["onnx"]._replace(
        write=lambda _, out: (out / "encoder.onnx").write_bytes(content)
    )
    monkeypatch.setitem(command.TARGETS, "onnx", broken)
    assert main(["export", str(mae), str(tmp_path / "out"), "--format", "onnx"]) == 2
    said = capsys.readouterr().err
    assert "--format onnx: it does not load again" in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_name_is_refused(mae, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(mae), ".", "--format", "timm"]) == 2
    assert "give the name of a new one" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_the_card_cannot_quote_is_found_before_anything_is_written(mae, tmp_path, monkeypatch):
    never = command.TARGETS["timm"]._replace(write=lambda *_: pytest.fail("written"))
    monkeypatch.setitem(command.TARGETS, "timm", never)
    (tmp_path / "knn.json").write_text('{"knn": ')
    with pytest.raises(UserError, match=r"knn.json: no JSON that can be read"):
        command.export(mae, tmp_path / "out", "timm", results=[tmp_path / "knn.json"])


def test_a_last_line_that_a_kill_cut_short_is_not_on_the_card(mae, tmp_path):
    run = shutil.copytree(mae, tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "samples": 10900, "ima')
    assert main(["export", str(run), str(tmp_path / "out"), "--format", "timm"]) == 0
    assert "| images | 10,800 |" in (tmp_path / "out" / "README.md").read_text()


def test_the_model_card_says_what_the_run_recorded_and_what_nobody_did(mae, tmp_path):
    results = tmp_path / "knn.json"
    results.write_text(json.dumps({"knn": [{"k": 20, "top1": 0.5}]}))
    export(mae, tmp_path / "out", "timm", "--results", str(results))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| photos | folder | train | 960 | not recorded: **to be filled in** |" in card
    assert "| device hours | 10 (3 h of training steps;" in card  # an hour on 2 ranks, two on 4
    assert "| images | 10,800 |" in card and "2 x A GPU; then 4 x A GPU" in card
    assert '"top1": 0.5' in card and "Licence of these weights: **to be filled in**" in card
    assert "license" not in card.partition("---\n#")[0]  # of the front matter: unknown, so not there


def test_compute_of_a_checkpoint_before_the_last_line(mae):
    lines = [json.loads(line) for line in (mae / "metrics.jsonl").read_text().splitlines()]
    starts = json.loads((mae / "environment.json").read_text())["starts"]
    assert spent(lines, starts, 40) == (14400, 4.0, 14.0) and spent(lines, starts, 10) == (3600, 1.0, 2.0)


def test_the_documentation_loads_each_format_as_its_model_card_does():
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    recipe = load_recipe("vitb16_mae")
    with torch.device("meta"):
        trained = LoadedRun(recipe, build_method(recipe), 0)
    for target in [*command.TARGETS.values(), command.OFFICIAL_VIT]:
        assert f"```python\n{target.usage(trained)}```" in page
