"""timm format: model.safetensors and config.json, as timm itself saves models for the hub."""

import json
import math
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pipeline.export.formats import Exportable, ExportFormat, check_images, relative_difference
from pipeline.io.tensors import save_tensors
from pipeline.recipe.sections import VIT_SIZES, eval_crop_pct, eval_resize_size
from pipeline.weights.vit import Vit

WEIGHTS = "model.safetensors"
ARCHITECTURES = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
    "vit_huge": "vit_huge_patch14_224",
}


BEIT_ARCHITECTURES = {"vit_base": "beit_base_patch16_224", "vit_large": "beit_large_patch16_224"}


def _architecture(vit: Vit) -> str:
    """Return timm's model name that is nearest in width; `_model_args` overrides the rest."""
    architectures = BEIT_ARCHITECTURES if vit.is_beit else ARCHITECTURES
    nearest = min(architectures, key=lambda name: abs(VIT_SIZES[name].width - vit.size.width))
    return architectures[nearest]


def _model_args(vit: Vit) -> dict[str, Any]:
    arguments = {
        "num_classes": len(vit.classes),
        "img_size": vit.data.image_size,
        "patch_size": vit.patch_size,
        "embed_dim": vit.size.width,
        "depth": vit.size.depth,
        "num_heads": vit.size.heads,
    }
    if vit.is_beit:  # pre-trained models share the bias, which the named ones do not
        arguments |= {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "global_pool": "token"}
    return arguments | ({"global_pool": "avg"} if vit.classes else {})


def build_model(vit: Vit, weights: Path | None = None) -> nn.Module:
    """Build timm's model of this shape, in eval mode, and load a weights file if one is given."""
    return timm.create_model(_architecture(vit), checkpoint_path=weights, **_model_args(vit)).eval()


def compute_outputs(vit: Vit, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return timm's outputs for images (B, 3, S, S), comparable with those of `vit.forward`."""
    assert isinstance(model, VisionTransformer | Beit)
    return model(images) if vit.classes else model.forward_features(images)


def file_difference(vit: Vit, weights: Path) -> float:
    """Load a weights file into timm's model and return its `relative_difference` from ours."""
    return _model_difference(vit, build_model(vit, weights))


def create_model_call(vit: Vit, weights: str) -> str:
    """Return Python code that creates the model from the weights file in OUT."""
    values = {
        name: json.dumps(value) if isinstance(value, str) else repr(value) for name, value in _model_args(vit).items()
    }
    arguments = "".join(f"    {name}={value},\n" for name, value in values.items())
    name = _architecture(vit)
    return f'timm.create_model(\n    "{name}",\n{arguments}    checkpoint_path="OUT/{weights}",\n).eval()'


def _write(run: Exportable, folder: Path) -> None:
    vit = run.vit
    metadata = {"format": "pt", "heads": str(vit.size.heads)}
    save_tensors({key: value.contiguous() for key, value in vit.weights.items()}, folder / WEIGHTS, metadata)
    (folder / "config.json").write_text(json.dumps(_config(vit), indent=2) + "\n")


def _config(vit: Vit) -> dict:
    side = vit.data.image_size
    labels: dict[str, Any] = {"label_names": vit.classes} if vit.classes else {}
    if vit.descriptions:
        labels["label_descriptions"] = dict(zip(vit.classes, vit.descriptions, strict=True))
    return {
        "architecture": _architecture(vit),
        "num_classes": len(vit.classes),
        "num_features": vit.size.width,
        "global_pool": "avg" if vit.classes else "token",
        **labels,
        "model_args": _model_args(vit),
        "pretrained_cfg": {
            "tag": vit.origin,
            "custom_load": False,
            "input_size": [3, side, side],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": _crop_pct(side, vit.resize),
            "crop_mode": "center",
            "mean": list(vit.data.mean),
            "std": list(vit.data.std),
            "num_classes": len(vit.classes),
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _crop_pct(side: int, resize: int) -> float:
    """Return the share from which timm computes the resize as floor(side / share)."""
    return eval_crop_pct(side) if resize == eval_resize_size(side) else math.nextafter(side / resize, 0)


def _max_difference(run: Exportable, folder: Path) -> float:
    vit, from_folder = run.vit, timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return max(_model_difference(vit, from_folder), file_difference(vit, folder / WEIGHTS))


def _model_difference(vit: Vit, model: nn.Module) -> float:
    images = check_images(vit.data)
    with torch.inference_mode():
        return relative_difference(compute_outputs(vit, model, images), vit.forward(images))


def _usage(run: Exportable) -> str:
    vit = run.vit
    outputs = """\
tokens = model.forward_features(transform(image)[None])  # (1, 1 + patches, width), class token first"""
    if vit.classes:
        outputs = f"""\
logits = model(transform(image)[None])  # (1, {len(vit.classes)})
name = model.pretrained_cfg["label_names"][logits.argmax()]"""
    return f"""\
import timm

model = timm.create_model("local-dir:OUT", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
{outputs}
"""


TIMM = ExportFormat(_write, _max_difference, _usage, ("timm", "safetensors"))
