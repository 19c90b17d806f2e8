"""Load an encoder to evaluate or fine-tune, as timm's VisionTransformer or, for BEiT, its Beit.

Sources: a run directory; `ema:RUN` for the moving average of its weights; a .safetensors file exported for
timm; a .pth checkpoint of the official MAE or BEiT code; a folder of Hugging Face transformers; `random:RECIPE` or
`random:RUN` for initial weights.

Invariant: every weight comes from the source, or the source is rejected with the keys named. Only position
embeddings, absolute or BEiT's relative ones, may change: they are interpolated for another image size. LoMaR's
relative positions fit every size; it sees the image as one window. Interpolation and assumptions about a weights
file are logged.
"""

import json
import logging
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pipeline.errors import UserError
from pipeline.methods import build_method
from pipeline.methods.method import Method
from pipeline.models.block import LAYER_NORM_EPS
from pipeline.models.relative_position import RelativeAttention
from pipeline.models.timm_beit import BIAS_TABLE, bias_grid, build_timm_beit, resize_bias_table
from pipeline.recipe import Recipe, load_recipe
from pipeline.recipe.sections import VIT_SIZES, DataSection
from pipeline.train.run_directory import RunDirectory
from pipeline.weights.finite import check_finite
from pipeline.weights.run import FINETUNED_REJECTED, load_run
from pipeline.weights.state_dicts import describe_mismatch
from pipeline.weights.transformers_folder import is_transformers_folder, read_transformers_folder

logger = logging.getLogger(__name__)

RANDOM, EMA = "random:", "ema:"
Rgb = tuple[float, float, float]
NON_ENCODER_KEYS = ("decoder", "mask_token", "head.", "lm_head.", "rel_pos_bias.relative_position_index")
"""Prefixes of official checkpoints' keys that do not belong to the encoder."""


class EncoderWeights(NamedTuple):
    name: str
    """Description for messages."""
    state: dict[str, torch.Tensor]
    """State dict with timm's keys."""
    heads: int
    image_size: int | None
    """Image size of training; None: it follows from the number of positions."""
    mean: Rgb
    std: Rgb
    recipe: Recipe | None
    norm_eps: float = LAYER_NORM_EPS


class ImageEncoder(nn.Module):
    """Encode whole images to tokens; `vit` is timm's model."""

    def __init__(self, vit: VisionTransformer, source: EncoderWeights, image_size: int) -> None:
        super().__init__()
        self.vit = vit
        self.name, self.recipe, self.heads = source.name, source.recipe, source.heads
        self.norm_eps = source.norm_eps
        self.mean, self.std = source.mean, source.std
        self.image_size, self.patch_size = image_size, _patch_size(source.state)
        self.width = vit.embed_dim

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (B, 3, S, S), normalized by mean and std, to tokens (B, 1 + L, D), class token first."""
        return self.vit.forward_features(images)


def load_encoder(weights: str | Path, image_size: int | None = None) -> ImageEncoder:
    """Load an encoder in fp32 on the CPU, in eval mode.

    Args:
        weights: One of the sources that the module docstring lists.
        image_size: Image size in pixels; None: that of training.

    Raises:
        UserError: If the source does not exist, is not an encoder, has a weight that is not finite, or its patches do
            not divide the size.
    """
    source = _read_source(str(weights))
    check_finite(source.state, f"--weights {weights}")
    patch, positions = _patch_size(source.state), source.state.get("pos_embed")
    table = source.state.get(BIAS_TABLE)
    grid = bias_grid(table) if table is not None else None
    trained_size = source.image_size or (grid or math.isqrt(source.state["pos_embed"].shape[1] - 1)) * patch
    size = image_size or trained_size
    if size % patch:
        raise UserError(f"{weights}: image size {size} px is not a multiple of the patch size, {patch} px")
    if positions is not None and size != trained_size:
        logger.info(f"{weights}: positions interpolated from {trained_size} px to {size} px (bicubic)")
        # Without antialiasing, as in the official MAE code.
        grid = [size // patch] * 2
        source.state["pos_embed"] = resample_abs_pos_embed(positions, grid, antialias=False)
    if table is not None and size != trained_size:
        logger.info(f"{weights}: relative positions interpolated from {trained_size} px to {size} px")
        source.state[BIAS_TABLE] = resize_bias_table(table, size // patch)
    vit = build_vit(source.state, source.heads, size, source.norm_eps)
    if mismatch := describe_mismatch(vit.state_dict(), source.state):
        raise UserError(
            f"--weights {weights}: do not fit a vision transformer: {mismatch}; give weights of timm's "
            "VisionTransformer or Beit, of the official MAE code, of transformers or of a run"
        )
    vit.load_state_dict(source.state)
    return ImageEncoder(vit, source, size).eval()


def build_vit(
    state: dict[str, torch.Tensor], heads: int, image_size: int, norm_eps: float = LAYER_NORM_EPS
) -> VisionTransformer:
    """Build timm's model without a head in the shape of a state dict; the weights are not loaded.

    The model has BEiT's relative positions if the state dict has, else LoMaR's if it has no absolute ones.
    """
    width, patch = state["patch_embed.proj.weight"].shape[0], _patch_size(state)
    relative = "pos_embed" not in state
    hidden = state.get("blocks.0.mlp.fc1.bias", torch.empty(4 * width, device="meta")).numel()
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    mlp_ratio = (hidden + 0.5) / width  # timm rounds down
    if BIAS_TABLE in state:
        beit = build_timm_beit(
            image_size=image_size,
            patch_size=patch,
            width=width,
            depth=depth,
            heads=heads,
            mlp_ratio=mlp_ratio,
            norm_eps=norm_eps,
        )
        return cast(VisionTransformer, beit)
    vit = VisionTransformer(
        img_size=image_size,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=mlp_ratio,
        num_classes=0,
        norm_layer=partial(nn.LayerNorm, eps=norm_eps),
        pos_embed="none" if relative else "learn",
    )
    if relative:
        for block in vit.blocks:
            block.attn = RelativeAttention(width, heads, image_size // patch)
    return vit


def _patch_size(state: dict[str, torch.Tensor]) -> int:
    return state["patch_embed.proj.weight"].shape[-1]


def _read_source(weights: str) -> EncoderWeights:
    if weights.startswith(RANDOM):
        name = weights.removeprefix(RANDOM)
        run_recipe = RunDirectory(Path(name)).recipe_file
        recipe = load_recipe(run_recipe if run_recipe.is_file() else name)
        with torch.random.fork_rng(devices=[]):  # leaves the caller's random state unchanged
            torch.default_generator.manual_seed(recipe.seed)
            method = build_method(recipe)
        return _from_method(method, recipe, "random weights")
    ema = weights.startswith(EMA)
    path = Path(weights.removeprefix(EMA))
    folder = path if path.is_dir() else path.parent if path.suffix in (".safetensors", ".bin") else None
    if folder and not ema and is_transformers_folder(folder):
        return _from_transformers_folder(folder)
    files = [*path.glob("*.safetensors"), *path.glob("*.pth")]
    if files and not RunDirectory(path).recipe_file.is_file():
        raise UserError(f"--weights {weights}: is not a run directory; pass the weights file, {files[0]}")
    if ema or path.is_dir():
        run = load_run(path, ema)
        return _from_method(run.method, run.recipe, f"step {run.step}{', moving average' * ema}")
    if not path.is_file():
        raise UserError(f"--weights {weights}: no such run directory or file; random:RECIPE gives random weights")
    if path.suffix == ".safetensors":
        return _from_safetensors(path)
    if path.suffix in (".pth", ".pt"):
        return _from_checkpoint(path)
    raise UserError(f"--weights {weights}: pass a run directory, a transformers folder, a .safetensors or a .pth file")


def _from_method(method: Method, recipe: Recipe, origin: str) -> EncoderWeights:
    encoder, data = method.encoder, recipe.data
    state: dict[str, torch.Tensor] = dict(encoder.named_parameters())
    state |= {name: buffer for name, buffer in encoder.named_buffers() if name == "pos_embed"}
    state.pop("mask_token", None)  # of LoMaR and BEiT, for masked patches; here every patch is visible
    return EncoderWeights(
        f"{recipe.method.name} on {recipe.model.name}, {origin}",
        {key: tensor.detach().clone() for key, tensor in state.items()},
        recipe.model.size.heads,
        data.image_size,
        data.mean,
        data.std,
        recipe,
    )


def _from_transformers_folder(folder: Path) -> EncoderWeights:
    encoder = read_transformers_folder(folder)
    if encoder.left_out:
        logger.info(f"{folder}: only the encoder is loaded, without {', '.join(encoder.left_out)}")
    weights = _from_state_dict(folder, encoder.state, encoder.heads, encoder.mean_std)
    return weights._replace(norm_eps=encoder.norm_eps)


def _from_safetensors(path: Path) -> EncoderWeights:
    try:
        with safe_open(path, "pt") as file:
            heads = (file.metadata() or {}).get("heads")
            state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"--weights {path}: cannot be read: {error}") from error
    config_file = path.with_name("config.json")  # timm's
    if not config_file.is_file():
        return _from_state_dict(path, state, heads)
    try:
        config = json.loads(config_file.read_text())
        mean, std = (tuple(config["pretrained_cfg"][name]) for name in ("mean", "std"))
        heads = heads or config.get("model_args", {}).get("num_heads")
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise UserError(f"{config_file}: has no pretrained_cfg with mean and std; fix or remove it") from error
    return _from_state_dict(path, state, heads, (mean, std))


def _from_checkpoint(path: Path) -> EncoderWeights:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(
            f"--weights {path}: cannot be read: {error.strerror}; check the path and its permissions"
        ) from error
    except Exception as error:  # for arbitrary bytes torch raises almost any type
        if "Unsupported global" in str(error):
            raise UserError(
                f"--weights {path}: contains objects that could run code; save only tensors: "
                "torch.save({'model': checkpoint['model']}, 'weights.pth')"
            ) from error
        raise UserError(f"--weights {path}: damaged, or not written by torch.save") from error
    state = content.get("model", content) if isinstance(content, dict) else {}
    if not isinstance(state, dict):
        raise UserError(f"--weights {path}: its 'model' is not a state dict")
    return _from_state_dict(
        path,
        {
            key: tensor.float()
            for key, tensor in state.items()
            if isinstance(tensor, torch.Tensor) and not key.startswith(NON_ENCODER_KEYS)
        },
    )


def _from_state_dict(
    path: Path, state: dict[str, torch.Tensor], heads: int | str | None = None, mean_std: tuple[Rgb, Rgb] | None = None
) -> EncoderWeights:
    """Check a state dict with timm's keys; assume and log what is None."""
    if "fc_norm.weight" in state:
        raise UserError(f"--weights {path}: {FINETUNED_REJECTED}")
    table = state.get(BIAS_TABLE)
    if table is not None and not bias_grid(table):
        raise UserError(f"--weights {path}: {BIAS_TABLE} has shape {tuple(table.shape)}, which fits no square image")
    positions = {"pos_embed": 3} if table is None else {}
    for key, dimensions in {"patch_embed.proj.weight": 4, **positions, "cls_token": 3}.items():
        if key not in state or state[key].ndim != dimensions:
            problem = f"{key} has shape {tuple(state[key].shape)}" if key in state else f"{key} is missing"
            raise UserError(f"--weights {path}: not a vision transformer of timm or the MAE code: {problem}")
    width, assumed = state["patch_embed.proj.weight"].shape[0], []
    if table is not None:
        heads = table.shape[1]
    if heads is None:
        name = next((name for name, size in VIT_SIZES.items() if size.width == width), None)
        if name is None:
            raise UserError(
                f"--weights {path}: the number of heads is unknown for width {width}; pass the run directory"
            )
        heads = VIT_SIZES[name].heads
        assumed.append(f"{heads} heads, as in {name}")
    if mean_std is None:
        mean_std = DataSection().mean, DataSection().std
        assumed.append(f"ImageNet's mean {list(mean_std[0])} and std {list(mean_std[1])}")
    try:
        num_heads = int(heads)
    except (TypeError, ValueError):
        num_heads = 0
    if num_heads < 1 or width % num_heads:
        raise UserError(
            f"--weights {path}: {heads!r} heads do not divide width {width}; fix the file's metadata or the "
            "config.json beside it"
        )
    if assumed:
        logger.info(f"{path}: assuming {'; '.join(assumed)}; a run directory or its timm export records them")
    return EncoderWeights(path.name, state, num_heads, None, *mean_std, None)
