"""Hugging Face transformers formats: folders for ViTModel (encoder), ViTMAEForPreTraining (with decoder) and
BeitForMaskedImageModeling (BEiT with its head).

Tensors are named as in the checkpoints on the hub. transformers 5 itself would save a ViTMAE's decoder under
names that no published checkpoint uses.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError
from pipeline.export.formats import (
    ExportFormat,
    check_images,
    import_library,
    mask_ratio,
    predict_patches,
    relative_difference,
)
from pipeline.io.tensors import save_tensors
from pipeline.masking import as_mask, random_split
from pipeline.methods.targets import TokenTarget
from pipeline.models.block import LAYER_NORM_EPS
from pipeline.recipe import Recipe
from pipeline.recipe.sections import eval_resize_size
from pipeline.weights.run import LoadedRun
from pipeline.weights.state_dicts import (
    official_state_dict,
    timm_state_dict,
    transformers_beit_state_dict,
    transformers_state_dict,
)

BICUBIC = 3
"""Pillow's constant."""


def _write(run: LoadedRun, folder: Path, decoder: bool) -> None:
    state = (official_state_dict if decoder else timm_state_dict)(run.method)
    write_model(state, run.recipe, folder, decoder)
    _write_json(folder / "preprocessor_config.json", _preprocessor_config(run.recipe))


def write_model(state: dict[str, torch.Tensor], recipe: Recipe, folder: Path, decoder: bool) -> None:
    """Write weights and config for `from_pretrained` from a state dict with the official keys."""
    save_tensors(transformers_state_dict(state, decoder), folder / "model.safetensors", {"format": "pt"})
    _write_json(folder / "config.json", _config(recipe, decoder))


def _config(recipe: Recipe, decoder: bool) -> dict[str, Any]:
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


def _write_beit(run: LoadedRun, folder: Path) -> None:
    recipe = run.recipe
    if not isinstance(run.method.target, TokenTarget):
        raise UserError(
            f"method.target.name: {recipe.method.target.name}: BeitForMaskedImageModeling predicts tokens only; export "
            "the encoder to timm"
        )
    save_tensors(transformers_beit_state_dict(run.method), folder / "model.safetensors", {"format": "pt"})
    config = _config(recipe, decoder=False) | {
        "architectures": ["BeitForMaskedImageModeling"],
        "model_type": "beit",
        "vocab_size": run.method.target.width,
        "use_mask_token": True,
        "use_absolute_position_embeddings": False,
        "use_relative_position_bias": False,
        "use_shared_relative_position_bias": True,
        "layer_scale_init_value": recipe.method.beit.layer_scale,
        "drop_path_rate": recipe.method.beit.drop_path,
    }
    del config["qkv_bias"]
    _write_json(folder / "config.json", config)
    _write_json(folder / "preprocessor_config.json", _preprocessor_config(recipe))


def _preprocessor_config(recipe: Recipe) -> dict[str, Any]:
    """Use BitImageProcessor, which crops the center; ViTImageProcessor would change the aspect ratio."""
    side = recipe.data.image_size
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": eval_resize_size(side)},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(recipe.data.mean),
        "image_std": list(recipe.data.std),
    }


def _encoder_difference(run: LoadedRun, folder: Path) -> float:
    images = check_images(run.recipe.data)
    model = _from_pretrained("ViTModel", folder, add_pooling_layer=False)
    with torch.inference_mode():
        tokens = model(pixel_values=images).last_hidden_state
        return relative_difference(tokens, run.method.forward_features(images))


def mae_difference(run: LoadedRun, folder: Path) -> float:
    """Return the larger difference of whole images' tokens and of the patches predicted behind a mask."""
    model = _from_pretrained("ViTMAEForPreTraining", folder)
    images = check_images(run.recipe.data)
    in_order = torch.linspace(0, 1, run.recipe.num_patches).expand(len(images), -1)
    noise = torch.rand(in_order.shape, generator=torch.Generator().manual_seed(1))
    visible_ids, masked_ids = random_split(noise, run.recipe.num_visible)
    with torch.inference_mode():
        logits = model(pixel_values=images, noise=noise).logits
        model.config.mask_ratio = 0.0
        tokens = model.vit(pixel_values=images, noise=in_order).last_hidden_state
        tokens_difference = relative_difference(tokens, run.method.forward_features(images))
    patches = logits.gather(1, masked_ids[..., None].expand(-1, -1, logits.shape[2]))
    expected = predict_patches(run.method, images, visible_ids, masked_ids)
    return max(tokens_difference, relative_difference(patches, expected))


def _beit_difference(run: LoadedRun, folder: Path) -> float:
    """Return the difference of the logits of all patches, some of which are masked."""
    method, images = run.method, check_images(run.recipe.data)
    noise = torch.rand(len(images), run.recipe.num_patches, generator=torch.Generator().manual_seed(1))
    _, masked_ids = random_split(noise, run.recipe.num_visible)
    masked = as_mask(masked_ids, run.recipe.num_patches)
    model = _from_pretrained("BeitForMaskedImageModeling", folder)
    with torch.inference_mode():
        logits = model(pixel_values=images, bool_masked_pos=masked).logits
        encoded = method.encoder(method.patchify(images), masked)
        return relative_difference(logits, method.get_submodule("head")(encoded[:, 1:]))


def _from_pretrained(name: str, folder: Path, **options: object) -> Any:
    transformers = import_library("transformers")
    transformers.utils.logging.disable_progress_bar()
    model, report = getattr(transformers, name).from_pretrained(
        folder, output_loading_info=True, local_files_only=True, **options
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            raise UserError(f"transformers' {name} reports {problem} {sorted(report[problem])[:3]}")
    return model.eval()


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _encoder_usage(_: LoadedRun) -> str:
    return """\
from transformers import AutoImageProcessor, ViTModel

processor = AutoImageProcessor.from_pretrained("OUT")
model = ViTModel.from_pretrained("OUT", add_pooling_layer=False).eval()  # pre-training has no pooler
tokens = model(**processor(image, return_tensors="pt")).last_hidden_state  # class token first
"""


def _mae_usage(run: LoadedRun) -> str:
    scale = ", normalized per patch" if run.recipe.method.normalize_targets else ""
    return f"""\
from transformers import AutoImageProcessor, ViTMAEForPreTraining

processor = AutoImageProcessor.from_pretrained("OUT")
model = ViTMAEForPreTraining.from_pretrained("OUT").eval()
output = model(**processor(image, return_tensors="pt"))  # random mask: output.mask is 1 where masked
pixels = model.unpatchify(output.logits)  # predictions{scale}
"""


def _beit_usage(run: LoadedRun) -> str:
    patches = run.recipe.num_patches
    return f"""\
import torch
from transformers import AutoImageProcessor, BeitForMaskedImageModeling

processor = AutoImageProcessor.from_pretrained("OUT")
model = BeitForMaskedImageModeling.from_pretrained("OUT").eval()
pixels = processor(image, return_tensors="pt")["pixel_values"]
tokens = model.layernorm(model.beit(pixels).last_hidden_state)  # class token first
masked = torch.arange({patches})[None] < {patches - run.recipe.num_visible}  # patches to mask, in raster order
logits = model(pixels, bool_masked_pos=masked).logits  # (1, {patches}, {run.method.target.width}): of visual tokens
"""


TAGS = ("transformers", "safetensors")
HF = ExportFormat(partial(_write, decoder=False), _encoder_difference, _encoder_usage, TAGS)
HF_MAE = ExportFormat(partial(_write, decoder=True), mae_difference, _mae_usage, TAGS)
HF_BEIT = ExportFormat(_write_beit, _beit_difference, _beit_usage, TAGS)
