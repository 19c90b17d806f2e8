"""Hugging Face transformers: folders for ViTModel (the encoder) and ViTMAEForPreTraining (with decoder).

The tensors have the names of the checkpoints on the hub; transformers 5 itself would save a ViTMAE's decoder
under names that no published checkpoint has.
"""

import json
from functools import partial
from pathlib import Path

import torch

from pipeline.errors import UserError
from pipeline.export.target import (
    Target,
    check_images,
    library,
    mask_ratio,
    predictions,
    relative_difference,
    tokens,
)
from pipeline.io.tensors import save_tensors
from pipeline.masking import random_split
from pipeline.models.block import LAYER_NORM_EPS
from pipeline.recipe import Recipe
from pipeline.recipe.sections import resize_of
from pipeline.weights.run import LoadedRun
from pipeline.weights.state_dicts import official_state_dict, timm_state_dict, transformers_state_dict

BICUBIC = 3  # Pillow's number


def _write(trained: LoadedRun, folder: Path, decoder: bool) -> None:
    state = (official_state_dict if decoder else timm_state_dict)(trained.method)
    write_model(state, trained.recipe, folder, decoder)
    _write_json(folder / "preprocessor_config.json", _preprocessor(trained.recipe))


def write_model(state: dict[str, torch.Tensor], recipe: Recipe, folder: Path, decoder: bool) -> None:
    """What `from_pretrained` needs, from a state dict with the official keys."""
    save_tensors(transformers_state_dict(state, decoder), folder / "model.safetensors", {"format": "pt"})
    _write_json(folder / "config.json", _config(recipe, decoder))


def _config(recipe: Recipe, decoder: bool) -> dict:
    width, depth, heads = recipe.model.size
    config = {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": LAYER_NORM_EPS,
        "image_size": recipe.data.image_size,
        "patch_size": recipe.model.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "torch_dtype": "float32",
    }
    if not decoder:
        return config
    return config | {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        "decoder_hidden_size": recipe.model.decoder_width,
        "decoder_num_hidden_layers": recipe.model.decoder_depth,
        "decoder_num_attention_heads": recipe.model.decoder_heads,
        "decoder_intermediate_size": 4 * recipe.model.decoder_width,
        "mask_ratio": mask_ratio(recipe),
        "norm_pix_loss": recipe.method.normalize_targets,
    }


def _preprocessor(recipe: Recipe) -> dict:
    """The processor that resizes the shorter side and cuts out the centre; ViT's own would squeeze."""
    side = recipe.data.image_size
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": resize_of(side)},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(recipe.data.mean),
        "image_std": list(recipe.data.std),
    }


def _encoder_difference(trained: LoadedRun, folder: Path) -> float:
    images = check_images(trained.recipe.data)
    model = _loaded("ViTModel", folder, add_pooling_layer=False)
    with torch.inference_mode():
        theirs = model(pixel_values=images).last_hidden_state
    return relative_difference(theirs, tokens(trained.method, images))


def whole_difference(trained: LoadedRun, folder: Path) -> float:
    """Of the tokens of whole images and of the pixels predicted behind a mask, the larger difference."""
    model = _loaded("ViTMAEForPreTraining", folder)
    images = check_images(trained.recipe.data)
    in_order = torch.linspace(0, 1, trained.recipe.num_patches).expand(len(images), -1)
    noise = torch.rand(in_order.shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits = model(pixel_values=images, noise=noise).logits
        model.config.mask_ratio = 0.0
        everything = model.vit(pixel_values=images, noise=in_order).last_hidden_state
    visible_ids, masked_ids = random_split(noise, trained.recipe.num_visible)
    theirs = logits.gather(1, masked_ids[..., None].expand(-1, -1, logits.shape[2]))
    return max(
        relative_difference(everything, tokens(trained.method, images)),
        relative_difference(theirs, predictions(trained.method, images, visible_ids, masked_ids)),
    )


def _loaded(name: str, folder: Path, **options: object) -> torch.nn.Module:
    transformers = library("transformers")
    transformers.utils.logging.disable_progress_bar()
    kind = getattr(transformers, name)
    model, found = kind.from_pretrained(folder, output_loading_info=True, local_files_only=True, **options)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[what]:
            raise UserError(f"transformers' {name} reports {what} {sorted(found[what])[:3]}")
    return model.eval()


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _encoder_usage(_: LoadedRun) -> str:
    return """\
from transformers import AutoImageProcessor, ViTModel

processor = AutoImageProcessor.from_pretrained("OUT")
model = ViTModel.from_pretrained("OUT", add_pooling_layer=False).eval()  # pre-training makes no pooler
tokens = model(**processor(image, return_tensors="pt")).last_hidden_state  # the class token first
"""


def _whole_usage(trained: LoadedRun) -> str:
    scale = ", normalised per patch" if trained.recipe.method.normalize_targets else ""
    return f"""\
from transformers import AutoImageProcessor, ViTMAEForPreTraining

processor = AutoImageProcessor.from_pretrained("OUT")
model = ViTMAEForPreTraining.from_pretrained("OUT").eval()
output = model(**processor(image, return_tensors="pt"))  # masks at random: output.mask, 1 is masked
pixels = model.unpatchify(output.logits)  # predictions{scale}
"""


HF = Target(
    partial(_write, decoder=False), _encoder_difference, _encoder_usage, ("transformers", "safetensors")
)
HF_MAE = Target(
    partial(_write, decoder=True), whole_difference, _whole_usage, ("transformers", "safetensors")
)
