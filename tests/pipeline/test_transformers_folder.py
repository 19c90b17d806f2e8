"""`--weights` of a Hugging Face folder: the tokens are those of transformers, or one line says why not."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_run import small_run

from pipeline.__main__ import main
from pipeline.data.reader import ShardReader
from pipeline.errors import UserError
from pipeline.evals.frozen_encoder import load_frozen_encoder
from pipeline.recipe.tasks import load_finetune_recipe
from pipeline.tasks.classification import ClassificationTask
from pipeline.weights.encoder import load_encoder

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
SHAPE |= {"image_size": 48, "patch_size": 8}
DECODER = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
IMAGES = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(5))
MEAN, STD = [0.4, 0.5, 0.6], [0.5, 0.25, 0.125]
MODELS = {
    "ViTModel": transformers.ViTConfig(**SHAPE),
    "ViTForImageClassification": transformers.ViTConfig(**SHAPE, num_labels=5),
    "ViTForMaskedImageModeling": transformers.ViTConfig(**SHAPE, encoder_stride=8),
    "ViTMAEModel": transformers.ViTMAEConfig(**SHAPE),
    "ViTMAEForPreTraining": transformers.ViTMAEConfig(**SHAPE, **DECODER, layer_norm_eps=1e-6),
    "BeitForMaskedImageModeling": transformers.BeitConfig(
        **SHAPE, vocab_size=11, use_mask_token=True, use_shared_relative_position_bias=True
    ),
}


def write_folder(folder: Path, name: str, **options) -> torch.nn.Module:
    """Save a model with random weights and its image processor by transformers; return its encoder."""
    torch.manual_seed(0)
    model = getattr(transformers, name)(MODELS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder, **options)
    transformers.ViTImageProcessor(image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return getattr(model, "vit", model)


def expected_tokens(encoder: torch.nn.Module) -> torch.Tensor:
    """Return transformers' tokens; a ViTMAE is told to mask nothing and to keep the order."""
    if encoder.config.model_type == "beit":
        with torch.inference_mode():
            return encoder.layernorm(encoder.beit(IMAGES).last_hidden_state)
    masking = {}
    if encoder.config.model_type == "vit_mae":
        encoder.config.mask_ratio = 0.0
        masking = {"noise": torch.linspace(0, 1, 36).expand(len(IMAGES), -1)}
    with torch.inference_mode():
        return encoder(pixel_values=IMAGES, **masking).last_hidden_state


def assert_same_tokens(weights: str | Path, expected: torch.Tensor) -> None:
    with torch.inference_mode():
        torch.testing.assert_close(load_encoder(weights)(IMAGES), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_tokens_equal_those_of_transformers(tmp_path, name, caplog):
    expected = expected_tokens(write_folder(tmp_path / "hf", name))
    encoder = load_encoder(tmp_path / "hf")
    assert (encoder.image_size, encoder.patch_size, encoder.width, encoder.heads) == (48, 8, 32, 4)
    assert (list(encoder.mean), list(encoder.std)) == (MEAN, STD)
    assert_same_tokens(tmp_path / "hf", expected)
    assert_same_tokens(tmp_path / "hf" / "model.safetensors", expected)
    logged = [record.getMessage() for record in caplog.records if record.name.startswith("pipeline.")]
    assert not any("assuming" in message for message in logged)


def test_names_of_transformers_5_and_other_files_are_read(tmp_path):
    encoder = write_folder(tmp_path / "hf", "ViTModel", max_shard_size="20KB")
    expected = expected_tokens(encoder)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    assert_same_tokens(tmp_path / "hf", expected)
    for path in (tmp_path / "hf").glob("model*"):
        path.unlink()
    torch.save(encoder.state_dict(), tmp_path / "hf" / "pytorch_model.bin")
    assert "layers.0.attention.q_proj.weight" in encoder.state_dict()
    assert_same_tokens(tmp_path / "hf", expected)


@pytest.mark.parametrize("format", ["hf", "hf-mae"])
def test_own_export_gives_the_tokens_of_the_run(tmp_path, format):
    run = small_run(tmp_path / "run")
    assert main(["export", str(run), str(tmp_path / "hf"), "--format", format]) == 0
    with torch.inference_mode():
        assert_same_tokens(tmp_path / "hf", load_encoder(run)(IMAGES))


def test_other_layer_norm_eps_is_another_digest(tmp_path):
    write_folder(tmp_path, "ViTModel")
    first = load_frozen_encoder(str(tmp_path), None, "class_token").digest
    change_config(tmp_path / "config.json", layer_norm_eps=1e-3)
    assert load_frozen_encoder(str(tmp_path), None, "class_token").digest != first


def test_knn_and_finetune_accept_a_folder(tmp_path, labelled_sets, kept_environment, capsys):
    write_folder(tmp_path / "hf", "ViTMAEForPreTraining")
    train, val = map(str, labelled_sets)
    assert main(["knn", "--weights", str(tmp_path / "hf"), "--data", train, "--val", val]) == 0
    assert "42 validation images" in capsys.readouterr().out
    settings = ["data.image_size=48", f"data.mean={MEAN}", f"data.std={STD}"]
    recipe = load_finetune_recipe("finetune_tiny", str(tmp_path / "hf"), settings)
    classifier = ClassificationTask(recipe, val).build(ShardReader(train, recipe.data))
    eps = {module.eps for module in classifier.modules() if isinstance(module, torch.nn.LayerNorm)}
    assert eps == {1e-6}, "a run does not record it"


def change_config(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def edit_weights(folder: Path, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def test_beit_with_a_bias_per_block_is_rejected(tmp_path):
    write_folder(tmp_path, "BeitForMaskedImageModeling")
    change_config(tmp_path / "config.json", use_relative_position_bias=True)
    with pytest.raises(UserError, match="use_relative_position_bias True"):
        load_encoder(tmp_path)


KEY = "encoder.layer.1.attention.attention.key.weight"
FAULTS = {
    "model type": (lambda f: change_config(f / "config.json", model_type="swin"), "swin"),
    "activation": (lambda f: change_config(f / "config.json", hidden_act="relu"), "hidden_act"),
    "heads": (lambda f: change_config(f / "config.json", num_attention_heads="many"), "num_attention_heads is 'many'"),
    "no weights": (remove_weights, "model.safetensors"),
    "cut weights": (lambda f: (f / "model.safetensors").write_bytes(b"cut"), "model.safetensors"),
    "no key": (lambda f: edit_weights(f, lambda state: state.pop(KEY)), "blocks.1.attn.k.weight"),
    "no norm": (lambda f: edit_weights(f, lambda state: state.pop("layernorm.weight")), "norm.weight"),
    "more": (lambda f: edit_weights(f, lambda state: state.update(more=torch.zeros(2))), "more"),
    "NaN": (lambda f: edit_weights(f, lambda state: state["layernorm.bias"].fill_(torch.nan)), "norm.bias"),
    "processor": (lambda f: change_config(f / "preprocessor_config.json", image_mean=[0.5]), "preprocessor_config"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "hf"
    write_folder(folder, "ViTModel")
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_folders_that_cannot_be_loaded_are_one_line(folder, tmp_path, fault):
    damage, named = FAULTS[fault]
    copy = tmp_path / "hf"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    damage(copy)
    with pytest.raises(UserError) as error:
        load_encoder(copy)
    assert named in str(error.value) and str(copy) in str(error.value) and "\n" not in str(error.value)


def test_missing_processor_is_assumed_and_logged(folder, tmp_path, caplog):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert load_encoder(tmp_path).mean == (0.485, 0.456, 0.406)
    assert any("assuming" in message and "mean" in message for message in caplog.messages)
