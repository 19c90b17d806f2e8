"""The encoder that is evaluated or fine-tuned, from whatever holds one, as timm's VisionTransformer.

Invariant: every weight comes from where the user said, or the file is refused with the keys named. Only
positions may differ: at another image size they are interpolated, which is said; and so is what a file of
weights does not tell and has to be assumed.

Understood are a run directory, `ema:RUN` for the moving average of its weights, weights exported for timm
(.safetensors), checkpoints of the official MAE code (.pth), and `random:RECIPE` or `random:RUN`: the weights
that such a run begins with. LoMaR's encoder has positions of offsets alone, so it takes the whole image as
one large window.
"""

import json
import logging
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pipeline.errors import UserError
from pipeline.methods import build_method
from pipeline.models.block import LAYER_NORM_EPS
from pipeline.models.relative_position import RelativeAttention
from pipeline.recipe import Recipe, load_recipe
from pipeline.recipe.sections import SIZES, DataSection
from pipeline.weights.state_dicts import misfits

logger = logging.getLogger(__name__)

RANDOM, AVERAGE = "random:", "ema:"
Normal = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and standard deviation of what a model was trained on."""
NOT_THE_ENCODERS = ("decoder", "mask_token", "head.")  # of the official checkpoints


class Saved(NamedTuple):
    """An encoder's weights before they are a module."""

    name: str
    """What they are, in words."""
    weights: dict[str, torch.Tensor]
    """Under timm's names."""
    heads: int
    image_size: int | None
    """Trained on; None: as many positions as there are say so."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    recipe: Recipe | None


class ImageEncoder(nn.Module):
    """Whole images to tokens. `vit` is timm's, so everything that timm does with one can be done with it."""

    def __init__(self, vit: VisionTransformer, saved: Saved, image_size: int) -> None:
        super().__init__()
        self.vit = vit
        self.name, self.recipe = saved.name, saved.recipe
        self.image_size, self.patch_size = image_size, vit.patch_embed.patch_size[0]
        self.mean, self.std = saved.mean, saved.std
        self.width, self.heads = vit.embed_dim, vit.blocks[0].attn.num_heads

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images (B, 3, S, S), normalised by mean and std -> tokens (B, 1 + L, D), class token first."""
        return self.vit.forward_features(images)


def load_encoder(weights: str | Path, image_size: int | None = None) -> ImageEncoder:
    """The encoder that `weights` names (see above), in fp32 on the CPU, in eval mode.

    image_size: of the images it will see; None: the one it was trained on. UserError where there are no
    such weights or they are no encoder's.
    """
    saved = _find(str(weights))
    patch = saved.weights["patch_embed.proj.weight"].shape[-1]
    trained_on = saved.image_size or _grid(saved) * patch
    size = image_size or trained_on
    if size % patch:
        raise UserError(f"{weights}: patches of {patch} px, and {size} px images are no multiple of that")
    positions = saved.weights.get("pos_embed")
    vit = vit_for(saved.weights, saved.heads, size)
    if positions is not None and size != trained_on:
        logger.info(
            f"{weights}: trained on {trained_on} px; its positions are interpolated to {size} px (bicubic)"
        )
        # Without antialiasing, as in the official MAE code.
        grid = [size // patch] * 2
        saved.weights["pos_embed"] = resample_abs_pos_embed(positions, grid, antialias=False)
    if wrong := misfits(vit.state_dict(), saved.weights):
        raise UserError(f"--weights {weights}: do not fit a vision transformer: {wrong}")
    vit.load_state_dict(saved.weights)
    return ImageEncoder(vit, saved, size).eval()


def vit_for(weights: dict[str, torch.Tensor], heads: int, image_size: int) -> VisionTransformer:
    """A vision transformer of the shape of weights under timm's names, not filled with them, without a
    head. Relative positions where these have no others."""
    width, _, _, patch = weights["patch_embed.proj.weight"].shape
    relative = "pos_embed" not in weights
    vit = VisionTransformer(
        img_size=image_size,
        patch_size=patch,
        embed_dim=width,
        depth=_depth(weights),
        num_heads=heads,
        num_classes=0,
        norm_layer=partial(nn.LayerNorm, eps=LAYER_NORM_EPS),
        pos_embed="none" if relative else "learn",
    )
    if relative:
        for block in vit.blocks:
            block.attn = RelativeAttention(width, heads, image_size // patch)
    return vit


def _find(weights: str) -> Saved:
    if weights.startswith(RANDOM):
        recipe = _recipe_of(weights.removeprefix(RANDOM))
        with torch.random.fork_rng(devices=[]):  # whoever asks for the weights keeps a generator of its own
            torch.default_generator.manual_seed(recipe.seed)
            method = build_method(recipe)
        return _of_method(f"{_words(recipe)}, random weights", method, recipe)
    average = weights.startswith(AVERAGE)
    path = Path(weights.removeprefix(AVERAGE))
    if not (path / "recipe.yaml").is_file() and (held := [*path.glob("*.safetensors"), *path.glob("*.pth")]):
        raise UserError(f"--weights {weights}: is a folder and no run; give the file in it, {held[0]}")
    if average or path.is_dir():
        from pipeline.weights.run import load_run  # takes seconds to import, and the others do not need it

        run = load_run(path, average)
        name = f"{_words(run.recipe)}, step {run.step}" + ", moving average" * average
        return _of_method(name, run.method, run.recipe)
    if not path.is_file():
        raise UserError(
            f"--weights {weights}: no such run directory or file; random:RECIPE gives random weights"
        )
    if path.suffix == ".safetensors":
        return _exported(path)
    if path.suffix in (".pth", ".pt"):
        return _official(path)
    raise UserError(f"--weights {weights}: give a run directory, a .safetensors or a .pth file")


def _recipe_of(name: str) -> Recipe:
    begun = Path(name) / "recipe.yaml"
    return load_recipe(begun if begun.is_file() else name)


def _words(recipe: Recipe) -> str:
    return f"{recipe.method.name} on {recipe.model.name}"


def _of_method(name: str, method: nn.Module, recipe: Recipe) -> Saved:
    encoder = method.encoder
    weights = dict(encoder.named_parameters())
    if hasattr(encoder, "pos_embed"):
        weights["pos_embed"] = encoder.pos_embed
    weights.pop("mask_token", None)  # LoMaR's, for what it does not see; here it sees everything
    data = recipe.data
    return Saved(
        name,
        {key: tensor.detach().clone() for key, tensor in weights.items()},
        recipe.model.size.heads,
        data.image_size,
        data.mean,
        data.std,
        recipe,
    )


def _exported(path: Path) -> Saved:
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            weights = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"--weights {path}: cannot be read: {error}") from None
    heads = about.get("heads")
    config = path.with_name("config.json")  # timm's, beside it
    if not config.is_file():
        return _of_file(path, weights, heads)
    try:
        tree = json.loads(config.read_text())
        seen = tree["pretrained_cfg"]
        heads = heads or tree.get("model_args", {}).get("num_heads")
        return _of_file(path, weights, heads, (tuple(seen["mean"]), tuple(seen["std"])))
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError):
        raise UserError(f"{config}: no mean and std in it, as timm writes them; mend or remove it") from None


def _official(path: Path) -> Saved:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"--weights {path}: cannot be read: {error.strerror}") from None
    except Exception as error:  # of bytes that are nothing of its own torch raises nearly every type
        if "Unsupported global" not in str(error):
            raise UserError(
                f"--weights {path}: cannot be read: damaged, or no file that torch.save wrote"
            ) from None
        raise UserError(
            f"--weights {path}: holds more than tensors, which could run code when it is read; save its "
            "weights alone: torch.save({'model': checkpoint['model']}, 'weights.pth')"
        ) from None
    state = content.get("model", content) if isinstance(content, dict) else {}
    if not isinstance(state, dict):
        raise UserError(f"--weights {path}: 'model' in it is no mapping of names to tensors")
    weights = {
        key: tensor.float()
        for key, tensor in state.items()
        if isinstance(tensor, torch.Tensor) and not key.startswith(NOT_THE_ENCODERS)
    }
    return _of_file(path, weights)


def _of_file(
    path: Path, weights: dict[str, torch.Tensor], heads: int | str | None = None, normal: Normal | None = None
) -> Saved:
    """Weights under timm's names. What else is not known is assumed, and said. UserError where they are no
    encoder's."""
    if "fc_norm.weight" in weights:
        raise UserError(
            f"--weights {path}: is a fine-tuned classifier, and an encoder is wanted here; give what it was "
            "fine-tuned from"
        )
    needed = ("patch_embed.proj.weight", "pos_embed", "cls_token")
    missing = [key for key in needed if key not in weights]
    if missing or weights[needed[0]].ndim != 4 or weights[needed[1]].ndim != 3:
        what = f"no {missing[0]} in it" if missing else "its tensors have other shapes"
        raise UserError(f"--weights {path}: no vision transformer of timm's or the official MAE's: {what}")
    width = weights["patch_embed.proj.weight"].shape[0]
    assumed = []
    if heads is None:
        name = next((name for name, size in SIZES.items() if size.width == width), None)
        if name is None:
            raise UserError(
                f"--weights {path}: nothing says how many heads a model of width {width} has; "
                "give the run directory"
            )
        heads = SIZES[name].heads
        assumed.append(f"{heads} heads, as {name} has")
    if normal is None:
        plain = DataSection()
        normal = plain.mean, plain.std
        assumed.append(f"mean {list(plain.mean)} and std {list(plain.std)}, ImageNet's")
    try:
        count = int(heads)
    except (TypeError, ValueError):
        count = 0
    if count < 1 or width % count:
        raise UserError(
            f"--weights {path}: {heads!r} heads, by its metadata or the config.json beside it, do not fit a "
            f"width of {width}; mend that"
        )
    if assumed:
        logger.info(
            f"{path}: does not tell, so assumed: {'; '.join(assumed)}. The run directory, or its export for "
            "timm, tells"
        )
    return Saved(path.name, weights, count, None, *normal, None)


def _grid(saved: Saved) -> int:
    return math.isqrt(saved.weights["pos_embed"].shape[1] - 1)


def _depth(weights: dict[str, torch.Tensor]) -> int:
    return len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
