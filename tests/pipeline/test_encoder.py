"""The encoder that is evaluated: the same tokens from every place it can come from."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from pipeline.errors import UserError
from pipeline.export import official_state_dict, timm_state_dict
from pipeline.losses import patchify
from pipeline.methods import build_method
from pipeline.models.relative_position import ContextualProduct
from pipeline.recipe import load_recipe
from pipeline.weights.encoder import load_encoder

TINY = ("model.name=vit_tiny", "model.depth=2", "model.decoder_depth=1", "model.decoder_width=64")
SMALL = (*TINY, "data.image_size=64")


def recipe_file(tmp_path, name="vitb16_mae", more=()):
    path = tmp_path / "recipe.yaml"
    path.write_text(load_recipe(name, [*SMALL, *more]).to_yaml())
    return path


def method_of(path):
    recipe = load_recipe(path)
    torch.manual_seed(recipe.seed)
    return build_method(recipe)


def images(size=64):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def whole(method, batch):
    patches = patchify(batch, method.patch_size)
    return method.encoder(patches, torch.arange(patches.shape[1]).expand(len(batch), -1))


@pytest.mark.parametrize("name", ["vitb16_emae", "vitb16_lomar"])
def test_a_methods_own_tokens_are_the_same(tmp_path, name):
    path = recipe_file(tmp_path, name, ["method.lomar.window_size=2"])
    with torch.no_grad():
        wanted = load_encoder(f"random:{path}")(images())
        assert torch.allclose(method_of(path).tokens(images()), wanted, atol=1e-5)


def test_every_source_gives_the_tokens_of_the_methods_own_encoder(tmp_path):
    path = recipe_file(tmp_path)
    method = method_of(path)
    save_file(timm_state_dict(method), tmp_path / "timm.safetensors")
    torch.save({"model": official_state_dict(method)}, tmp_path / "official.pth")
    with torch.no_grad():
        wanted = whole(method, images())
        for source in (f"random:{path}", tmp_path / "timm.safetensors", tmp_path / "official.pth"):
            encoder = load_encoder(source)
            assert (encoder.image_size, encoder.patch_size, encoder.width) == (64, 16, 192)
            assert torch.allclose(encoder(images()), wanted, atol=1e-5), source


def test_mean_and_std_are_those_of_timms_config_beside_the_file(tmp_path):
    save_file(timm_state_dict(method_of(recipe_file(tmp_path))), tmp_path / "model.safetensors")
    assert load_encoder(tmp_path / "model.safetensors").mean == (0.485, 0.456, 0.406)
    config = {"pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    encoder = load_encoder(tmp_path / "model.safetensors")
    assert encoder.mean == (0.5, 0.5, 0.5) and encoder.std == (0.25, 0.25, 0.25)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no mean and std in it"):
        load_encoder(tmp_path / "model.safetensors")


def test_what_a_file_does_not_tell_is_assumed_aloud_and_what_it_tells_is_taken(tmp_path, capsys):
    recipe = recipe_file(tmp_path, more=["model.heads=4", "data.mean=[0.5, 0.5, 0.5]"])
    method, official = method_of(recipe), tmp_path / "official.pth"
    torch.save({"model": official_state_dict(method)}, official)
    assert load_encoder(official).vit.blocks[0].attn.num_heads == 3
    said = capsys.readouterr().err
    assert said.startswith(f"{official}: does not tell, so assumed: 3 heads, as vit_tiny has; mean [0.485,")
    assert said.count("\n") == 1
    exported = tmp_path / "model.safetensors"
    save_file(timm_state_dict(method), exported, {"heads": "4"})
    assert load_encoder(exported).vit.blocks[0].attn.num_heads == 4
    said = capsys.readouterr().err
    assert "assumed: mean [0.485," in said and "heads" not in said
    seen = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    config = {"model_args": {"num_heads": 4}, "pretrained_cfg": seen}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for metadata in ({"heads": "4"}, {}):
        save_file(timm_state_dict(method), exported, metadata)
        assert load_encoder(exported).vit.blocks[0].attn.num_heads == 4
    assert not capsys.readouterr().err


def test_another_image_size_interpolates_the_positions_bicubically_and_says_so(tmp_path, capsys):
    path = recipe_file(tmp_path)
    method = method_of(path)
    encoder = load_encoder(f"random:{path}", image_size=96)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "64 px" in said and "interpolated to 96 px" in said
    grid = method.encoder.pos_embed[:, 1:].reshape(1, 4, 4, 192).permute(0, 3, 1, 2)
    wanted = F.interpolate(grid, size=(6, 6), mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
    assert torch.allclose(encoder.vit.pos_embed[:, 1:], wanted, atol=1e-6)
    assert encoder(images(96)).shape == (2, 37, 192)
    load_encoder(f"random:{path}", image_size=64)
    assert not capsys.readouterr().err


def test_lomar_sees_the_whole_image_as_one_window(tmp_path):
    more = ("method.lomar.window_size=4", "model.width=32", "model.heads=4")
    path = recipe_file(tmp_path, "vitb16_lomar", more)
    encoder = load_encoder(f"random:{path}")
    torch.manual_seed(0)
    method = build_method(load_recipe(path))
    with torch.no_grad():  # the encodings start at zero, which would hide their mistakes
        for ours, theirs in zip(encoder.vit.blocks, method.encoder.blocks, strict=True):
            theirs.attn.rpe_k.lookup_table_weight.normal_()
            ours.attn.rpe_k.load_state_dict(theirs.attn.rpe_k.state_dict())
        assert torch.allclose(encoder(images()), whole(method, images()), atol=1e-5)
        wider = load_encoder(f"random:{path}", image_size=96)
        for ours, theirs in zip(wider.vit.blocks, method.encoder.blocks, strict=True):
            ours.attn.rpe_k.load_state_dict(theirs.attn.rpe_k.state_dict())
        tokens = wider(images(96))
        moved = wider(images(96).roll(16, -1))  # the same patches elsewhere
    assert tokens.shape == (2, 37, 32)
    assert not torch.allclose(tokens[:, 0], moved[:, 0], atol=1e-3)


def test_relative_positions_of_a_small_square_are_those_inside_a_larger_one():
    torch.manual_seed(0)
    large, small = ContextualProduct(8, 6), ContextualProduct(8, 4)
    with torch.no_grad():
        large.lookup_table_weight.normal_()
        small.load_state_dict(large.state_dict())
        query = torch.randn(1, 2, 17, 8)
        assert torch.equal(large(query), small(query))


@pytest.mark.parametrize("heads", ["five", "5", "0", "-3"])
def test_heads_that_a_width_cannot_have_are_refused_in_one_line(tmp_path, heads):
    path = tmp_path / "model.safetensors"
    save_file(timm_state_dict(method_of(recipe_file(tmp_path))), path, {"heads": heads})
    with pytest.raises(UserError, match=rf"'{heads}' heads, by its metadata .* do not fit a width of 192"):
        load_encoder(path)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda s: s.pop("norm.weight"), "missing norm.weight"),
        (lambda s: s.update({"head.bias": torch.zeros(3)}), "unknown head.bias"),
        (lambda s: s.update({"norm.weight": torch.zeros(3)}), r"norm.weight is \(3,\) instead of \(192,\)"),
        (lambda s: s.pop("pos_embed"), "no pos_embed in it"),
    ],
)
def test_a_file_of_another_shape_is_refused_in_one_line(tmp_path, damage, complaint):
    state = copy.deepcopy(timm_state_dict(method_of(recipe_file(tmp_path))))
    damage(state)
    save_file(state, tmp_path / "damaged.safetensors")
    with pytest.raises(UserError, match=complaint) as refusal:
        load_encoder(tmp_path / "damaged.safetensors")
    assert "\n" not in str(refusal.value)


def test_what_is_no_encoder_is_refused_in_one_line(tmp_path):
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
    for name, complaint in (
        ("named.pth", "'model' in it is no mapping of names to tensors"),
        ("text.safetensors", "cannot be read"),
        ("text.pth", "cannot be read: damaged, or no file that torch.save wrote"),
        ("word.pth", "cannot be read: damaged, or no file that torch.save wrote"),
        ("empty.pth", "cannot be read: damaged, or no file that torch.save wrote"),
        ("out", r"is a folder and no run; give the file in it, .*out/model.safetensors"),
        ("objects.pth", "holds more than tensors"),
        ("other.pth", "no patch_embed.proj.weight in it"),
        ("nothing", "no such run directory or file"),
        ("probe", "is a recipe for `linprobe`"),
        ("bare", "no run directory"),
    ):
        with pytest.raises(UserError, match=complaint) as refusal:
            load_encoder(tmp_path / name)
        assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match="patches of 16 px, and 100 px"):
        load_encoder(f"random:{recipe_file(tmp_path)}", image_size=100)
