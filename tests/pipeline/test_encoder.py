"""`load_encoder`: the same tokens from every source."""

import copy
import json
import re
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.beit import Beit, checkpoint_filter_fn
from torch import nn
from torch.nn import functional as F

from pipeline.errors import UserError
from pipeline.export import official_state_dict, timm_state_dict
from pipeline.losses import patchify
from pipeline.methods import build_method
from pipeline.models.relative_position import ContextualProduct, piecewise_index
from pipeline.recipe import load_recipe
from pipeline.weights.encoder import load_encoder

TINY = ("model.name=vit_tiny", "model.depth=2", "model.decoder_depth=1", "model.decoder_width=64")
SMALL = (*TINY, "data.image_size=64")


def write_recipe(tmp_path, name="vitb16_mae", more=()):
    path = tmp_path / "recipe.yaml"
    path.write_text(load_recipe(name, [*SMALL, *more]).to_yaml())
    return path


def build_seeded(path):
    recipe = load_recipe(path)
    torch.manual_seed(recipe.seed)
    return build_method(recipe)


def images(size=64):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def encode(method, batch):
    patches = patchify(batch, method.patch_size)
    return method.encoder(patches, torch.arange(patches.shape[1]).expand(len(batch), -1))


@pytest.mark.parametrize("name", ["vitb16_emae", "vitb16_lomar", "vitb16_beit"])
def test_random_weights_are_those_of_the_method(tmp_path, name):
    path = write_recipe(tmp_path, name, ["method.lomar.window_size=2"])
    with torch.no_grad():
        tokens = load_encoder(f"random:{path}")(images())
        assert torch.allclose(build_seeded(path).forward_features(images()), tokens, atol=1e-5)


def test_every_source_gives_the_tokens_of_the_method(tmp_path):
    path = write_recipe(tmp_path)
    method = build_seeded(path)
    save_file(timm_state_dict(method), tmp_path / "timm.safetensors")
    torch.save({"model": official_state_dict(method)}, tmp_path / "official.pth")
    with torch.no_grad():
        expected = encode(method, images())
        for source in (f"random:{path}", tmp_path / "timm.safetensors", tmp_path / "official.pth"):
            encoder = load_encoder(source)
            assert (encoder.image_size, encoder.patch_size, encoder.width) == (64, 16, 192)
            assert torch.allclose(encoder(images()), expected, atol=1e-5), source


def test_mean_and_std_come_from_timms_config(tmp_path):
    save_file(timm_state_dict(build_seeded(write_recipe(tmp_path))), tmp_path / "model.safetensors")
    assert load_encoder(tmp_path / "model.safetensors").mean == (0.485, 0.456, 0.406)
    config = {"pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    encoder = load_encoder(tmp_path / "model.safetensors")
    assert encoder.mean == (0.5, 0.5, 0.5) and encoder.std == (0.25, 0.25, 0.25)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json: "):
        load_encoder(tmp_path / "model.safetensors")


def test_assumptions_about_a_file_are_logged(tmp_path, caplog):
    recipe = write_recipe(tmp_path, more=["model.heads=4", "data.mean=[0.5, 0.5, 0.5]"])
    method, official = build_seeded(recipe), tmp_path / "official.pth"
    torch.save({"model": official_state_dict(method)}, official)
    assert load_encoder(official).heads == 3
    (message,) = caplog.messages
    assert f"{official}: " in message and "3 heads" in message and "mean [0.485," in message
    caplog.clear()
    exported = tmp_path / "model.safetensors"
    save_file(timm_state_dict(method), exported, {"heads": "4"})
    assert load_encoder(exported).heads == 4
    (message,) = caplog.messages
    assert "mean [0.485," in message and "heads" not in message
    caplog.clear()
    mean_std = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    config = {"model_args": {"num_heads": 4}, "pretrained_cfg": mean_std}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for metadata in ({"heads": "4"}, {}):
        save_file(timm_state_dict(method), exported, metadata)
        assert load_encoder(exported).vit.blocks[0].attn.num_heads == 4
    assert not caplog.messages


def test_positions_are_interpolated_for_another_image_size(tmp_path, caplog):
    path = write_recipe(tmp_path)
    encoder = load_encoder(f"random:{path}", image_size=96)
    (message,) = caplog.messages
    assert "from 64 px to 96 px" in message
    grid = build_seeded(path).encoder.pos_embed[:, 1:].reshape(1, 4, 4, 192).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(6, 6), mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
    assert torch.allclose(encoder.vit.pos_embed[:, 1:], expected, atol=1e-6)
    assert encoder(images(96)).shape == (2, 37, 192)
    caplog.clear()
    load_encoder(f"random:{path}", image_size=64)
    assert not caplog.messages


def test_positions_at_384_px_equal_timms_interpolation(tmp_path):
    path = write_recipe(tmp_path, more=["data.image_size=224", "model.depth=1"])
    trained = build_seeded(path).encoder.pos_embed
    encoder = load_encoder(f"random:{path}", image_size=384)
    expected = resample_abs_pos_embed(trained, [24, 24], antialias=False)
    assert expected.shape == (1, 577, 192)
    assert (encoder.vit.pos_embed - expected).abs().max() < 1e-6


def test_lomars_relative_positions_apply_at_384_px(tmp_path):
    small = ("data.image_size=224", "model.width=16", "model.heads=2", "model.depth=1")
    encoder = load_encoder(f"random:{write_recipe(tmp_path, 'vitb16_lomar', small)}", image_size=384)
    rpe, query = encoder.vit.blocks[0].attn.rpe_k, torch.randn(1, 2, 577, 8)
    with torch.no_grad():
        rpe.lookup_table_weight.normal_()
        bias = rpe(query)
        assert encoder(images(384)).shape == (2, 577, 16)
    table = rpe.lookup_table_weight[0]
    for i, j in ((1, 1), (1, 576), (300, 29), (576, 1), (40, 41), (5, 245)):  # queries and keys of a 24 x 24 grid
        (row, column), (key_row, key_column) = divmod(i - 1, 24), divmod(j - 1, 24)
        bucket = (piecewise_index(row - key_row) + 3) * 7 + piecewise_index(column - key_column) + 3
        assert torch.allclose(bias[0, :, i, j], query[0, :, i] @ table[:, bucket], atol=1e-5)


def test_lomar_sees_the_image_as_one_window(tmp_path):
    more = ("method.lomar.window_size=4", "model.width=32", "model.heads=4")
    path = write_recipe(tmp_path, "vitb16_lomar", more)
    encoder, wider = load_encoder(f"random:{path}"), load_encoder(f"random:{path}", image_size=96)
    torch.manual_seed(0)
    method = build_method(load_recipe(path))
    with torch.no_grad():  # the tables are initialized to zero, which would hide errors
        for block, *copies in zip(method.encoder.blocks, encoder.vit.blocks, wider.vit.blocks, strict=True):
            block.attn.rpe_k.lookup_table_weight.normal_()
            for copied in copies:
                copied.attn.rpe_k.load_state_dict(block.attn.rpe_k.state_dict())
        assert torch.allclose(encoder(images()), encode(method, images()), atol=1e-5)
        tokens = wider(images(96))
        moved = wider(images(96).roll(16, -1))  # the same patches at other positions
    assert tokens.shape == (2, 37, 32)
    assert not torch.allclose(tokens[:, 0], moved[:, 0], atol=1e-3)


def build_beit(path):
    """Build a BEiT whose biases are not zero."""
    method = build_seeded(path)
    with torch.no_grad():
        for name, parameter in method.encoder.named_parameters():
            if name.endswith(("bias", "bias_table")):
                parameter.normal_(std=0.5)
    return method


def test_beits_tokens_are_those_of_the_method_from_every_file(tmp_path):
    method = build_beit(write_recipe(tmp_path, "vitb16_beit", ["method.beit.layer_scale=0.5"])).eval()
    save_file(timm_state_dict(method), tmp_path / "timm.safetensors")
    index = {"encoder.rel_pos_bias.relative_position_index": torch.zeros(17, 17)}  # of BEiT's code, with its head
    state = {name.removeprefix("encoder."): value for name, value in {**method.state_dict(), **index}.items()}
    state = {name.replace("head.", "lm_head."): value for name, value in state.items()}
    torch.save({"model": state}, tmp_path / "beit.pth")
    with torch.no_grad():
        expected = method.forward_features(images())
        for source in ("timm.safetensors", "beit.pth"):
            encoder = load_encoder(tmp_path / source)
            assert (encoder.image_size, encoder.patch_size, encoder.heads) == (64, 16, 3)
            assert torch.allclose(encoder(images()), expected, atol=1e-5), source


def test_beits_bias_is_resized_by_timm_for_another_image_size(tmp_path, caplog):
    state = timm_state_dict(build_beit(write_recipe(tmp_path, "vitb16_beit")))
    save_file(state, tmp_path / "model.safetensors", {"heads": "3"})
    encoder = load_encoder(tmp_path / "model.safetensors", image_size=96)
    assert any("relative positions interpolated from 64 px to 96 px" in message for message in caplog.messages)
    peer = Beit(
        img_size=96, patch_size=16, embed_dim=192, depth=2, num_heads=3, num_classes=0, init_values=0.1,
        use_abs_pos_emb=False, use_shared_rel_pos_bias=True, global_pool="", norm_layer=partial(nn.LayerNorm, eps=1e-6),
    ).eval()  # fmt: skip
    peer.load_state_dict(checkpoint_filter_fn(dict(state), peer))
    with torch.no_grad():
        assert torch.allclose(encoder(images(96)), peer.forward_features(images(96)), atol=1e-5)


def test_beit_weights_of_another_shape_are_a_one_line_error(tmp_path):
    state = timm_state_dict(build_beit(write_recipe(tmp_path, "vitb16_beit")))
    state["rel_pos_bias.relative_position_bias_table"] = torch.zeros(50, 3)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"relative_position_bias_table has shape \(50, 3\)"):
        load_encoder(tmp_path / "model.safetensors")


def test_small_window_has_the_relative_positions_of_a_large_one():
    torch.manual_seed(0)
    large, small = ContextualProduct(8, 6), ContextualProduct(8, 4)
    with torch.no_grad():
        large.lookup_table_weight.normal_()
        small.load_state_dict(large.state_dict())
        query = torch.randn(1, 2, 17, 8)
        assert torch.equal(large(query), small(query))


@pytest.mark.parametrize("heads", ["five", "5", "0", "-3"])
def test_heads_that_do_not_divide_the_width_are_rejected(tmp_path, heads):
    path = tmp_path / "model.safetensors"
    save_file(timm_state_dict(build_seeded(write_recipe(tmp_path))), path, {"heads": heads})
    with pytest.raises(UserError, match=f"'{heads}' heads do not divide width 192"):
        load_encoder(path)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda s: s.pop("norm.weight"), "missing norm.weight"),
        (lambda s: s.update({"head.bias": torch.zeros(3)}), "unknown head.bias"),
        (lambda s: s.update({"norm.weight": torch.zeros(3)}), "norm.weight is (3,) instead of (192,)"),
        (lambda s: s.pop("pos_embed"), "pos_embed is missing"),
    ],
)
def test_weights_that_do_not_match_are_a_one_line_error(tmp_path, damage, text):
    state = copy.deepcopy(timm_state_dict(build_seeded(write_recipe(tmp_path))))
    damage(state)
    save_file(state, tmp_path / "damaged.safetensors")
    with pytest.raises(UserError, match=re.escape(text)) as caught:
        load_encoder(tmp_path / "damaged.safetensors")
    assert "\n" not in str(caught.value)


def test_sources_without_an_encoder_are_a_one_line_error(tmp_path):
    (tmp_path / "text.safetensors").write_text("no tensors")
    (tmp_path / "text.pth").write_text("no tensors")
    (tmp_path / "word.pth").write_text("hello")
    (tmp_path / "empty.pth").write_text("")
    (tmp_path / "bare").mkdir()
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "recipe.yaml").write_text("probe: {weights: pixels}")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("")
    torch.save({"model": {}, "args": load_recipe("vitb16_mae")}, tmp_path / "objects.pth")
    torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "other.pth")
    torch.save({"model": "vit_large"}, tmp_path / "named.pth")
    for name, text in (
        ("named.pth", "its 'model' is not a state dict"),
        ("text.safetensors", "cannot be read"),
        ("text.pth", "damaged"),
        ("word.pth", "damaged"),
        ("empty.pth", "damaged"),
        ("out", r"is not a run directory; pass the weights file, .*out/model\.safetensors"),
        ("objects.pth", "could run code"),
        ("other.pth", r"patch_embed\.proj\.weight is missing"),
        ("nothing", "no such run directory or file"),
        ("probe", "linprobe"),
        ("bare", "not a run directory"),
    ):
        with pytest.raises(UserError, match=rf"{name}.*{text}") as caught:
            load_encoder(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="image size 100 px is not a multiple of the patch size, 16 px"):
        load_encoder(f"random:{write_recipe(tmp_path)}", image_size=100)
