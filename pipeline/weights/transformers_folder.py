"""Read the encoder of a Hugging Face transformers folder, with timm's keys.

    config.json                 model_type "vit", "vit_mae" or "beit", and the shape
    model.safetensors           or its shards with model.safetensors.index.json, or pytorch_model.bin
    preprocessor_config.json    mean and std; may be missing

Invariant: the encoder's tokens are those of transformers. Heads and decoders are left out; a setting that timm's
VisionTransformer, or our use of its Beit, lacks is an error.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors.torch import load_file

from pipeline.errors import UserError, join_names
from pipeline.models.timm_beit import BIAS_TABLE

Number = TypeVar("Number", int, float)
Rgb = tuple[float, float, float]
CONFIG = "config.json"
MODEL_TYPES = ("vit", "vit_mae", "beit")
HEADS = ("decoder.", "classifier.", "pooler.", "lm_head.", "embeddings.mask_token")
"""Prefixes of keys that do not belong to the encoder."""
_LAYERS = {  # transformers' names up to version 4, with which weights are saved, and from version 5 on
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.attention.query": "attn.q",
    "attention.attention.key": "attn.k",
    "attention.attention.value": "attn.v",
    "attention.output.dense": "attn.proj",
    "attention.q_proj": "attn.q",
    "attention.k_proj": "attn.k",
    "attention.v_proj": "attn.v",
    "attention.o_proj": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "lambda_1": "gamma_1",
    "lambda_2": "gamma_2",
    "encoder.relative_position_bias.relative_position_bias_table": BIAS_TABLE,
    "shared_position_bias.relative_position_bias_table": BIAS_TABLE,
}
_SUPPORTED = {"hidden_act": "gelu", "qkv_bias": True, "num_channels": 3}
_SUPPORTED_BEIT = {  # as pre-training leaves it; transformers' defaults are False
    "use_shared_relative_position_bias": True,
    "use_relative_position_bias": False,
    "use_absolute_position_embeddings": False,
}
_BLOCK = re.compile(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)")


class TransformersEncoder(NamedTuple):
    """An encoder and its settings."""

    state: dict[str, torch.Tensor]
    """State dict with timm's keys, float32."""
    heads: int
    norm_eps: float
    mean_std: tuple[Rgb, Rgb] | None
    """None: the folder has no preprocessor_config.json."""
    left_out: list[str]
    """Parts of the weights that do not belong to the encoder."""


def is_transformers_folder(folder: Path) -> bool:
    """Return whether a folder's config.json is one of transformers; timm's has no model_type."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config


def read_transformers_folder(folder: Path) -> TransformersEncoder:
    """Read the encoder of a ViT, a ViTMAE or a BEiT with a shared relative position bias.

    Raises:
        UserError: If it is another model, a file is missing or damaged, or timm has no such encoder.
    """
    config = _read_json(folder / CONFIG)
    if config["model_type"] not in MODEL_TYPES:
        raise UserError(
            f"--weights {folder}: transformers' {config['model_type']} is not supported; only vit, vit_mae and beit are"
        )
    is_beit = config["model_type"] == "beit"
    for key, supported in (_SUPPORTED | (_SUPPORTED_BEIT if is_beit else {})).items():
        value = config.get(key, key not in _SUPPORTED_BEIT and supported)
        if value != supported:
            raise UserError(f"--weights {folder}: {CONFIG} has {key} {value!r}; only {supported!r} is supported")
    heads = _read_number(config, "num_attention_heads", 12, folder)
    norm_eps = _read_number(config, "layer_norm_eps", 1e-12, folder)
    tensors = {
        key.removeprefix("vit.").removeprefix("beit."): tensor.float()
        for key, tensor in _read_tensors(folder).items()
        if not key.endswith("relative_position_index")  # a constant
    }
    left_out = sorted({key.partition(".")[0] for key in tensors if key.startswith(HEADS)} - {"embeddings"})
    state = _rename({key: tensor for key, tensor in tensors.items() if not key.startswith(HEADS)}, folder)
    return TransformersEncoder(state, heads, norm_eps, _read_mean_std(folder), left_out)


def _read_number(config: dict[str, Any], key: str, default: Number, folder: Path) -> Number:
    """Return a number of config.json, of the type of the default."""
    value = config.get(key, default)
    try:
        return type(default)(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / CONFIG}: {key} is {value!r}, not a number; download it again") from error


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({str(name) for name in _read_json(index).get("weight_map", {}).values()})
    else:
        names = ("model.safetensors", "pytorch_model.bin")
        files = [name for name in names if (folder / name).is_file()][:1]
    if not files:
        raise UserError(f"--weights {folder}: has no model.safetensors or pytorch_model.bin; download it again")
    tensors: dict[str, torch.Tensor] = {}
    for path in (folder / name for name in files):
        is_pickle = path.suffix == ".bin"
        try:
            tensors |= torch.load(path, map_location="cpu", weights_only=True) if is_pickle else load_file(path)
        except Exception as error:  # for arbitrary bytes torch raises almost any type
            reason = " ".join(str(error).split())[:100]
            raise UserError(f"--weights {path}: cannot be read ({reason}); download it again") from error
    return tensors


def _rename(tensors: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    """Return a state dict with timm's keys; query, key and value become one matrix."""
    state: dict[str, torch.Tensor] = {}
    unknown = []
    for key, tensor in tensors.items():
        block = _BLOCK.fullmatch(key)
        prefix, name = (f"blocks.{block[1]}.", block[2]) if block else ("", key)
        layer, dot, kind = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "")
        if layer in _LAYERS:
            state[f"{prefix}{_LAYERS[layer]}{dot}{kind}"] = tensor
        else:
            unknown.append(key)
    if unknown:
        raise UserError(f"--weights {folder}: has keys that a ViT has not: {join_names(sorted(unknown))}")
    if BIAS_TABLE in state:  # BEiT's keys have no bias
        for key in [key for key in state if key.endswith((".attn.q.bias", ".attn.v.bias"))]:
            state[key.replace(".bias", "_bias")] = state.pop(key)
    for query in [key for key in state if ".attn.q." in key]:
        parts = [query.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        shapes = {state[part].shape if part in state else None for part in parts}
        if len(shapes) > 1 or None in shapes:
            raise UserError(f"--weights {folder}: {join_names(parts)} (timm's names) are missing or differ in shape")
        state[query.replace(".attn.q.", ".attn.qkv.")] = torch.cat([state.pop(part) for part in parts])
    return state


def _read_mean_std(folder: Path) -> tuple[Rgb, Rgb] | None:
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return None
    config = _read_json(path)
    if not config.get("do_normalize", True):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    try:
        (red, green, blue), (red_std, green_std, blue_std) = (config[name] for name in ("image_mean", "image_std"))
        return (float(red), float(green), float(blue)), (float(red_std), float(green_std), float(blue_std))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: has no image_mean and image_std of three channels; restore or remove it") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("no mapping")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); download it again") from error
    return content
