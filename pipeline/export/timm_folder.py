"""timm: model.safetensors and config.json, what timm itself saves for the hub."""

import json
import math
from pathlib import Path

import timm
import torch

from pipeline.export.target import Exportable, Target, check_images, relative_difference
from pipeline.io.tensors import save_tensors
from pipeline.recipe.sections import SIZES, crop_share, resize_of
from pipeline.weights.vit import Vit

WEIGHTS = "model.safetensors"
ARCHITECTURES = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
    "vit_huge": "vit_huge_patch14_224",
}


def architecture(vit: Vit) -> str:
    """timm's name of the model that is nearest in width; `model_arguments` says everything else."""
    nearest = min(ARCHITECTURES, key=lambda name: abs(SIZES[name].width - vit.size.width))
    return ARCHITECTURES[nearest]


def model_arguments(vit: Vit) -> dict[str, object]:
    """What `timm.create_model` is to be told beside the architecture's name."""
    arguments = {
        "num_classes": len(vit.classes),
        "img_size": vit.data.image_size,
        "patch_size": vit.patch_size,
        "embed_dim": vit.size.width,
        "depth": vit.size.depth,
        "num_heads": vit.size.heads,
    }
    return arguments | ({"global_pool": "avg"} if vit.classes else {})


def empty_model(vit: Vit, **more: object) -> torch.nn.Module:
    """timm's model of this shape, in eval mode."""
    return timm.create_model(architecture(vit), **model_arguments(vit), **more).eval()


def outputs(vit: Vit, model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What timm's model makes of images, as `vit.ours` does."""
    return model(images) if vit.classes else model.forward_features(images)


def call(vit: Vit, weights: str) -> str:
    """The Python expression that makes the model from a file of weights in OUT."""
    arguments = "".join(f"    {name}={_source(value)},\n" for name, value in model_arguments(vit).items())
    name = architecture(vit)
    return f'timm.create_model(\n    "{name}",\n{arguments}    checkpoint_path="OUT/{weights}",\n).eval()'


def file_difference(vit: Vit, weights: Path) -> float:
    """Between what timm's model gives with a file of weights, and ours."""
    return _model_difference(vit, empty_model(vit, checkpoint_path=str(weights)))


def _source(value: object) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _write(trained: Exportable, folder: Path) -> None:
    vit = trained.vit
    about = {"format": "pt", "heads": str(vit.size.heads)}
    save_tensors({key: tensor.contiguous() for key, tensor in vit.weights.items()}, folder / WEIGHTS, about)
    (folder / "config.json").write_text(json.dumps(_config(vit), indent=2) + "\n")


def _config(vit: Vit) -> dict:
    side = vit.data.image_size
    return {
        "architecture": architecture(vit),
        "num_classes": len(vit.classes),
        "num_features": vit.size.width,
        "global_pool": "avg" if vit.classes else "token",
        **_labels(vit),
        "model_args": model_arguments(vit),
        "pretrained_cfg": {
            "tag": vit.origin,
            "custom_load": False,
            "input_size": [3, side, side],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": _crop_share(side, vit.resize),
            "crop_mode": "center",
            "mean": list(vit.data.mean),
            "std": list(vit.data.std),
            "num_classes": len(vit.classes),
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _crop_share(side: int, resize: int) -> float:
    """From which timm finds `resize`, as floor(side / share)."""
    return crop_share(side) if resize == resize_of(side) else math.nextafter(side / resize, 0)


def _labels(vit: Vit) -> dict:
    """Where timm reads them: it has them in the loaded model's `pretrained_cfg`."""
    labels = {"label_names": vit.classes} if vit.classes else {}
    if vit.descriptions:
        labels["label_descriptions"] = dict(zip(vit.classes, vit.descriptions, strict=True))
    return labels


def _difference(trained: Exportable, folder: Path) -> float:
    by_folder = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    vit = trained.vit
    return max(_model_difference(vit, by_folder), file_difference(vit, folder / WEIGHTS))


def _model_difference(vit: Vit, model: torch.nn.Module) -> float:
    images = check_images(vit.data)
    with torch.inference_mode():
        return relative_difference(outputs(vit, model, images), vit.ours(images))


def _usage(trained: Exportable) -> str:
    return f"""\
import timm

model = timm.create_model("local-dir:OUT", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
{_last_lines(trained.vit)}
"""


def _last_lines(vit: Vit) -> str:
    if not vit.classes:
        whole = "the class token first"
        return f"tokens = model.forward_features(transform(image)[None])  # (1, 1 + patches, width), {whole}"
    return f"""\
logits = model(transform(image)[None])  # (1, {len(vit.classes)})
name = model.pretrained_cfg["label_names"][logits.argmax()]"""


TIMM = Target(_write, _difference, _usage, ("timm", "safetensors"))
