"""Pictures of `reconstruct`: what they show, their numbers and their errors."""

import numpy as np
import pytest
import torch
from PIL import Image
from small_codebook import VOCABULARY, save_codebook
from small_run import small_run
from torch.nn import functional as F

from data_prep.pixels import decode_other
from pipeline.__main__ import main
from pipeline.errors import UserError
from pipeline.losses import patch_error, patchify
from pipeline.masking import as_mask
from pipeline.methods.method import Reconstruction
from pipeline.pictures.agreement import measure_agreement
from pipeline.pictures.attention import attention_weights, class_attention, plot_attention
from pipeline.pictures.canvas import (
    GAP,
    MARGIN,
    Chart,
    Column,
    Scale,
    join_tiles,
    render_grid,
    split_columns,
    split_tiles,
    to_maps,
    upscale,
)
from pipeline.pictures.difficulty_map import masked_distances, masked_errors, mean_error_by_distance
from pipeline.pictures.feature_pca import principal_components
from pipeline.pictures.images import open_images, to_batch, to_pixels, to_rgb
from pipeline.pictures.reconstruction import plot_reconstruction, reconstruct_tiles
from pipeline.recipe.sections import DataSection
from pipeline.weights.encoder import load_encoder
from pipeline.weights.run import load_run

KINDS = ["grid", "agreement", "difficulty", "attention", "features"]
IMAGES = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = folder / "tokenizer"
    save_codebook(tokenizer)
    tokens = [f"method.target.tokenizer={tokenizer}", f"method.target.vocabulary={VOCABULARY}"]
    options = {"lomar": ["method.lomar.window_size=3"], "beit": tokens}
    return {
        name: small_run(folder / name, f"vitb16_{name}", *options.get(name, ()))
        for name in ("mae", "emae", "efficient_mae", "lomar", "beit")
    }


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        pixels = generator.integers(0, 256, (6, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((80, 60)).save(folder / f"{name}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.mark.parametrize("name", ["mae", "emae", "efficient_mae", "lomar", "beit"])
def test_every_kind_is_drawn_for_every_method(runs, name, photographs, tmp_path, capsys):
    arguments = ["reconstruct", str(runs[name]), "--images", str(photographs), "--tiles", "2"]
    kinds = KINDS if name != "beit" else ["grid", "attention", "features"]  # of predicted tokens
    assert main([*arguments, "--out", str(tmp_path), "--kind", *kinds]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{name}-{kind}.png" for kind in kinds)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [str(tmp_path / f"{name}-{k}.png") for k in kinds]
    if name != "beit":
        assert "disagreement" in lines[1] and "(3 mask seeds, 2 images)" in lines[1]


def test_first_images_come_from_all_class_folders(tmp_path):
    shades = {"a/1.png": 0, "a/2.png": 60, "a/3.png": 120, "b/1.png": 180, "c/1.png": 240}
    for name, shade in shades.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (shade,) * 3).save(tmp_path / name)
    data = DataSection()
    drawn = to_pixels(to_batch(open_images([tmp_path], 4), data, 8), data)[:, 0, 0, 0]
    assert drawn.tolist() == [0, 180, 240, 60]


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "I", "F", "LA", "P", "RGBA", "RGB", "CMYK", "transparency"])
def test_rgb_conversion_equals_data_preps(tmp_path, mode):
    generator = np.random.default_rng(0)
    path = tmp_path / "image.tiff"
    if mode in ("I;16", "I", "F"):
        values = generator.random((9, 7)) * (1 if mode == "F" else 65535)
        Image.fromarray(values.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])).save(path)
    else:
        image = Image.fromarray(generator.integers(0, 256, (9, 7, 4), np.uint8), "RGBA")
        path = path if mode == "CMYK" else tmp_path / "image.png"
        options = {"transparency": 3} if mode == "transparency" else {}
        image.convert("P" if options else mode).save(path, **options)
    expected, _, _ = decode_other(path.read_bytes(), max_pixels=100)
    with Image.open(path) as image:
        assert mode == "transparency" or image.mode == mode
        assert (np.asarray(to_rgb(image)) == expected).all()
    assert expected.min() < expected.max()


def test_damaged_image_in_a_folder_is_skipped_and_logged(photographs, tmp_path, capsys):
    intact = (photographs / "a.png").read_bytes()
    for name, content in {"a.png": intact, "cut.png": intact[: len(intact) // 2], "notes.txt": b"no"}.items():
        (tmp_path / name).write_bytes(content)
    assert len(open_images([tmp_path], 9)) == 1
    log = capsys.readouterr().err
    assert str(tmp_path / "cut.png") in log and log.count("\n") == 1 and "notes" not in log


def test_disagreement_is_mean_difference_where_both_predict(runs):
    recipe = load_run(runs["mae"]).recipe
    levels = torch.tensor(recipe.data.std) * 255
    truth = patchify(IMAGES, 8)
    visible = torch.stack([as_mask(torch.tensor([[0, 1], [2, 3]]), 36)] * 3)
    visible[1] = visible[1].roll(4, 1)

    def shift(by: float, seen: torch.Tensor) -> Reconstruction:
        moved = truth + by / levels.repeat(64)  # by so many levels of 255
        return Reconstruction(seen[:, None], torch.where(seen[..., None], 1e6, moved)[:, None])

    same = measure_agreement(IMAGES, [shift(5.0, seen) for seen in visible], recipe)
    assert same.disagreement == pytest.approx(0, abs=1e-3) and same.error == pytest.approx(5, rel=1e-4)
    shifted = [shift(by, seen) for by, seen in zip((0.0, 3.0, 9.0), visible, strict=True)]
    agreement = measure_agreement(IMAGES, shifted, recipe)
    assert agreement.disagreement == pytest.approx((3 + 9 + 6) / 3, rel=1e-4)
    assert agreement.error == pytest.approx((0 + 3 + 9) / 3, rel=1e-4)
    assert agreement.by_patch[0, 0].isnan()  # visible to the first and the third
    assert agreement.by_patch[0, 4].item() == pytest.approx(9, rel=1e-4)  # visible to the second
    assert agreement.by_patch[0, 20].item() == pytest.approx(6, rel=1e-4)


def test_mae_and_emae_mask_the_same_patches_for_a_seed(runs):
    visible = [
        reconstruct_tiles(load_run(runs[name]).method, IMAGES, seed=3)[1].visible[:, 0] for name in ("mae", "emae")
    ]
    assert torch.equal(*visible)


@pytest.mark.parametrize("target", ["pixels", "normalized_pixels"])
def test_error_of_a_patch_is_its_loss(tmp_path, target):
    run = small_run(tmp_path / "run", "vitb16_mae", f"method.target.name={target}")
    recipe, method, _ = load_run(run)
    noise = torch.rand(2, 36, generator=torch.Generator().manual_seed(0))
    out, result = method(IMAGES, noise), method.reconstruct(IMAGES, noise)
    error, distance = masked_errors(result, IMAGES, recipe)[:, 0], masked_distances(result, 8)[:, 0]
    expected = patch_error(out.prediction, out.target)
    assert torch.allclose(error.gather(1, out.predicted_ids), expected, rtol=1e-3)
    assert torch.equal(error.isnan(), result.visible[:, 0]) and torch.equal(distance.isnan(), error.isnan())
    assert error.nanmean().item() == pytest.approx(out.loss.item(), rel=1e-4)


def test_mean_error_is_over_patches_of_one_distance():
    distance = torch.tensor([2.0] * 60 + [10.0] * 80 + [30.0] * 3 + [torch.nan])
    error = torch.cat([torch.full((60,), 1.0), torch.tensor([2.0, 4.0] * 40), torch.full((4,), 99.0)])
    x, means, bars = mean_error_by_distance(distance, error, width=4.0)
    assert x == [2.0, 10.0] and means == pytest.approx([1.0, 3.0])  # three patches are too few
    assert bars == pytest.approx([0.0, 2 * error[60:140].std().item() / 80**0.5])


def test_too_few_patches_for_chart_is_an_error(tmp_path, photographs, capsys):
    run = small_run(tmp_path / "run", "vitb16_mae", "data.image_size=16")  # 3 of 4 patches, 16 times
    arguments = ["reconstruct", str(run), "--images", str(photographs / "a.png"), "--kind", "difficulty"]
    out = tmp_path / "out.png"
    assert main([*arguments, "--out", str(out)]) == 2
    log = capsys.readouterr().err
    assert "--kind difficulty: " in log and "50 masked patches" in log and log.count("\n") == 1
    assert not out.exists() and main([*arguments, "--out", str(out), "--tiles", "3"]) == 0


def test_out_below_a_file_is_rejected_before_drawing(runs, photographs, tmp_path, capsys):
    (tmp_path / "notes").write_text("mine")
    for out in ("notes/x.png", "notes/deep/x.png", "notes/folder"):
        arguments = [str(runs["mae"]), "--images", str(photographs), "--out", str(tmp_path / out)]
        assert main(["reconstruct", *arguments]) == 2
        log = capsys.readouterr().err
        assert f"--out {tmp_path / out}" in log and log.count("\n") == 1
    assert (tmp_path / "notes").read_text() == "mine"


def test_unwritable_out_is_one_error_line(runs, photographs, capsys):
    arguments = ["reconstruct", str(runs["mae"]), "--images", str(photographs / "a.png"), "--out"]
    for out in ("/proc/none/x.png", "/proc/none.png"):
        assert main([*arguments, out]) == 2
        log = capsys.readouterr().err
        assert f"--out {out}: " in log and log.count("\n") == 1


def test_output_folder_may_have_a_dot_in_its_name(runs, photographs, tmp_path, capsys):
    arguments = ["reconstruct", str(runs["mae"]), "--images", str(photographs / "a.png")]
    assert main([*arguments, "--out", str(tmp_path / "pics.v2")]) == 0
    assert (tmp_path / "pics.v2" / "mae-grid.png").is_file()
    assert "mae-grid.png: 1 image after step 30" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["mae", "lomar"])
def test_recomputed_attention_is_what_layers_use(runs, name):
    encoder = load_encoder(runs[name])
    attention, tokens = encoder.vit.blocks[0].attn, torch.randn(2, 37, 32)
    weights = attention_weights(attention, tokens)
    value = attention.qkv(tokens)[..., 64:].unflatten(2, (4, 8)).transpose(1, 2)
    mixed = attention.proj((weights @ value).transpose(1, 2).flatten(2))
    assert torch.allclose(mixed, attention(tokens), atol=1e-5)
    heads, rollout = class_attention(encoder, IMAGES)
    assert heads.shape == (2, 4, 36) and rollout.shape == (2, 36)
    assert (heads > 0).all() and (heads.sum(2) < 1).all() and (rollout.sum(1) < 1).all()


def test_beits_recomputed_attention_is_what_layers_use(runs):
    encoder = load_encoder(runs["beit"])
    attention, tokens = encoder.vit.blocks[0].attn, torch.randn(2, 37, 32)
    bias = encoder.vit.rel_pos_bias()
    assert bias.std() > 0.01
    value = attention.project(tokens)[2]
    mixed = attention.proj((attention_weights(attention, tokens, bias) @ value).transpose(1, 2).flatten(2))
    assert torch.allclose(mixed, attention(tokens, bias), atol=1e-5)
    heads, rollout = class_attention(encoder, IMAGES)
    assert heads.shape == (2, 4, 36) and rollout.shape == (2, 36)


def test_attention_beyond_memory_is_rejected(runs):
    encoder = load_encoder(runs["mae"])
    encoder.image_size = 2048 * encoder.patch_size
    with pytest.raises(UserError, match=r"--kind attention: .* 4194305 tokens need \d+ GiB .*--tiles"):
        plot_attention(encoder, DataSection(), IMAGES)


def test_principal_components_are_those_of_the_covariance():
    features = torch.randn(200, 16) * torch.linspace(3, 0.1, 16)
    components, share = principal_components(features)
    values = torch.linalg.eigvalsh(torch.cov(features.T)).flip(0)
    assert torch.allclose(components.var(dim=0), values[:3], rtol=1e-3)
    assert share == pytest.approx((values[:3].sum() / values.sum()).item(), rel=1e-3)
    again, _ = principal_components(features.flip(0))
    assert torch.allclose(again.flip(0), components, atol=1e-3)


def test_joining_tiles_inverts_splitting():
    images = torch.arange(2 * 3 * 12 * 12.0).view(2, 3, 12, 12)
    assert torch.equal(join_tiles(split_tiles(images, 3), 3), images)
    patch_means = F.avg_pool2d(images[:, :1], 2)[:, 0]
    by_patch = patchify(split_tiles(images, 3), 2)[..., ::3].mean(dim=2)
    assert torch.allclose(to_maps(by_patch, 3), patch_means)


@pytest.mark.parametrize("name", ["mae", "emae"])
def test_columns_are_split_out_of_a_grid(runs, name):
    recipe, method, _ = load_run(runs[name])
    first, *_, last = split_columns(plot_reconstruction(method, recipe, IMAGES, seed=0), 48)
    tile = 4 * 48
    assert first.size == last.size == (tile, 2 * tile + GAP)
    originals = upscale(to_pixels(IMAGES, recipe.data), tile)
    assert (np.asarray(first)[:tile] == originals[0]).all()
    assert (np.asarray(first)[-tile:] == originals[1]).all()
    assert (np.asarray(last) < 255).any(axis=2)[:, -1].any()


@pytest.mark.parametrize("columns", [1, 2, 9])
def test_no_text_is_clipped(columns):
    tiles = [np.full((40, 40, 3), 90, np.uint8)] * 2
    titled = [Column(f"a title of many words {n}", tiles) for n in range(columns)]
    scales = [Scale("meaning of the colors", "0", "99th percentile")] * 2
    chart = Chart("mean error", "P2Dist, pixels", [1.0, 30.0], [0.01, 0.4], [0.01, 0.05])
    caption = "Some words that describe the picture. " * 12
    drawn = np.asarray(render_grid(titled, caption, scales if columns > 1 else (), chart))
    edge = MARGIN // 2
    for border in (drawn[:edge], drawn[-edge // 2 :], drawn[:, :edge], drawn[:, -edge:]):
        assert (border == 255).all()


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (["MAE", "--images", "nowhere", "--out", "x.png"], "--images nowhere: "),
        (["MAE", "--images", "IMAGES/notes.txt", "--out", "x.png"], "notes.txt: "),
        (["MAE", "--images", "IMAGES", "--out", "x.jpg"], "--out x.jpg: "),
        (["MAE", "EMAE", "--images", "IMAGES", "--out", "x.png"], "--out x.png: "),
        (["MAE", "MAE", "--images", "IMAGES", "--out", "x"], "two runs are named mae"),
        (["MAE", "--images", "IMAGES", "--out", "x", "--seeds", "1"], "--seeds 1: "),
        (["MAE", "--images", "IMAGES", "--out", "x", "--tiles", "17"], "--tiles 17: at most 16"),
        (["IMAGES", "--images", "IMAGES", "--out", "x"], "IMAGES: "),
        (
            ["BEIT", "--images", "IMAGES", "--out", "x", "--kind", "grid", "agreement"],
            "--kind agreement: compares pixels",
        ),
    ],
)
def test_invalid_arguments_give_one_error_line(runs, photographs, tmp_path, capsys, monkeypatch, options, key):
    monkeypatch.chdir(tmp_path)
    paths = {name.upper(): run for name, run in runs.items()}
    options = [str(paths.get(o, o.replace("IMAGES", str(photographs)))) for o in options]
    assert main(["reconstruct", *options]) == 2
    log = capsys.readouterr().err
    assert key.replace("IMAGES", str(photographs)) in log
    assert log.count("\n") == 1 and not list(tmp_path.iterdir())
