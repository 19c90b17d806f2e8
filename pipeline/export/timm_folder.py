"""timm: model.safetensors and config.json, what timm itself saves for the hub."""

import json
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from pipeline.data.crops import crop_share
from pipeline.export.state_dicts import timm_state_dict
from pipeline.export.target import Target, check_images, relative_difference, tokens
from pipeline.recipe import Recipe
from pipeline.trained import Trained

WEIGHTS = "model.safetensors"
ARCHITECTURES = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
    "vit_huge": "vit_huge_patch14_224",
}


def model_arguments(recipe: Recipe) -> dict[str, object]:
    """What `timm.create_model` is to be told beside the architecture's name."""
    size = recipe.model.size
    return {
        "num_classes": 0,
        "img_size": recipe.data.image_size,
        "patch_size": recipe.model.patch_size,
        "embed_dim": size.width,
        "depth": size.depth,
        "num_heads": size.heads,
    }


def empty_model(recipe: Recipe, **more: object) -> torch.nn.Module:
    """timm's model of the recipe's encoder, in eval mode."""
    return timm.create_model(ARCHITECTURES[recipe.model.name], **model_arguments(recipe), **more).eval()


def call(recipe: Recipe, weights: str) -> str:
    """The Python expression that makes the model from a file of weights in OUT."""
    arguments = "".join(f"    {name}={value},\n" for name, value in model_arguments(recipe).items())
    name = ARCHITECTURES[recipe.model.name]
    return f'timm.create_model(\n    "{name}",\n{arguments}    checkpoint_path="OUT/{weights}",\n).eval()'


def _write(trained: Trained, folder: Path) -> None:
    state = timm_state_dict(trained.method)
    about = {"format": "pt", "heads": str(trained.recipe.model.size.heads)}
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / WEIGHTS, about)
    (folder / "config.json").write_text(json.dumps(_config(trained.recipe), indent=2) + "\n")


def _config(recipe: Recipe) -> dict:
    side = recipe.data.image_size
    return {
        "architecture": ARCHITECTURES[recipe.model.name],
        "num_classes": 0,
        "num_features": recipe.model.size.width,
        "global_pool": "token",
        "model_args": model_arguments(recipe),
        "pretrained_cfg": {
            "tag": recipe.method.name,
            "custom_load": False,
            "input_size": [3, side, side],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": crop_share(side),
            "crop_mode": "center",
            "mean": list(recipe.data.mean),
            "std": list(recipe.data.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _difference(trained: Trained, folder: Path) -> float:
    images = check_images(trained.recipe)
    ours = tokens(trained.method, images)
    by_folder = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    by_file = empty_model(trained.recipe, checkpoint_path=str(folder / WEIGHTS))
    with torch.inference_mode():
        return max(relative_difference(m.forward_features(images), ours) for m in (by_folder, by_file))


def _usage(recipe: Recipe) -> str:
    return """\
import timm

model = timm.create_model("local-dir:OUT", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
tokens = model.forward_features(transform(image)[None])  # (1, 1 + patches, width), the class token first
"""


TIMM = Target(_write, _difference, _usage, ("timm", "safetensors"))
