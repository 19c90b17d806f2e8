"""Convert a method's weights to the key names of the official MAE code, timm and transformers.

Invariant: every tensor has a counterpart; a state dict that does not match is rejected with the keys named.
"""

import torch

from pipeline.errors import UserError, join_names
from pipeline.methods.method import Method
from pipeline.methods.targets import PixelTarget
from pipeline.models.timm_beit import BIAS_TABLE


def official_state_dict(method: Method) -> dict[str, torch.Tensor]:
    """Return encoder and decoder with the official MAE checkpoint's keys (methods mae, emae, efficient_mae).

    Tensors are detached and share memory with the method's.

    Raises:
        UserError: If the method does not have MAE's decoder, or not as the official code has it.
    """
    _require_decoder(method)
    return {_official_key(name): tensor for name, tensor in _named_tensors(method).items()}


def load_official_state_dict(method: Method, state: dict[str, torch.Tensor]) -> None:
    """Copy a state dict with the official keys, position embeddings included, into the method.

    Raises:
        UserError: If keys are missing, unknown or of another shape; the method is unchanged then.
    """
    _require_decoder(method)
    expected = {_official_key(name): tensor for name, tensor in _named_tensors(method).items()}
    if mismatch := describe_mismatch(expected, state):
        raise UserError(f"weights do not fit this model: {mismatch}")
    with torch.no_grad():
        for key, tensor in expected.items():
            tensor.copy_(state[key])


def timm_state_dict(method: Method) -> dict[str, torch.Tensor]:
    """Return the encoder's weights as `timm.create_model(..., num_classes=0).load_state_dict` expects them.

    A mask token is left out, because whole images have no masked patches.

    Raises:
        UserError: If the encoder has LoMaR's relative positions.
    """
    state = {
        name.removeprefix("encoder."): tensor
        for name, tensor in _named_tensors(method).items()
        if name.startswith("encoder.") and name != "encoder.mask_token"
    }
    require_absolute_positions(state)
    return state


def require_absolute_positions(state: dict[str, torch.Tensor]) -> None:
    """Raise UserError if weights with timm's keys belong to an encoder with LoMaR's relative positions.

    timm and transformers have BEiT's.
    """
    if "pos_embed" not in state and BIAS_TABLE not in state:
        raise UserError("LoMaR's encoder has relative positions (iRPE), which other libraries do not support")


def transformers_state_dict(state: dict[str, torch.Tensor], decoder: bool) -> dict[str, torch.Tensor]:
    """Convert official keys to those of checkpoints on the Hugging Face hub, such as facebook/vit-mae-base.

    Query, key and value are one matrix in `state` and three in the result.

    Args:
        state: From `official_state_dict` if `decoder`, else from `timm_state_dict`.
        decoder: Return keys of ViTMAEForPreTraining instead of ViTModel.
    """
    renamed = {}
    for key, tensor in state.items():
        names = _transformers_keys(key, decoder)
        renamed |= dict(zip(names, tensor.chunk(len(names)), strict=True))
    return {key: tensor.contiguous() for key, tensor in renamed.items()}


def transformers_beit_state_dict(method: Method) -> dict[str, torch.Tensor]:
    """Return a BEiT with the keys of Hugging Face checkpoints such as microsoft/beit-base-patch16-224-pt22k.

    The model is BeitForMaskedImageModeling, whose last norm follows the encoder.
    """
    state = {}
    for name, tensor in _named_tensors(method).items():
        name = name.removeprefix("encoder.")
        number, _, part = name.removeprefix("blocks.").partition(".")
        if name in _BEIT_LAYERS:
            state[_BEIT_LAYERS[name]] = tensor
        elif name.startswith("blocks.") and part in _BEIT_BLOCK_LAYERS:
            state[f"beit.encoder.layer.{number}.{_BEIT_BLOCK_LAYERS[part]}"] = tensor
        else:
            renamed = transformers_state_dict({name: tensor}, decoder=False)
            state |= {f"beit.{key}": value for key, value in renamed.items()}
    return {key: tensor.contiguous() for key, tensor in state.items()}


def describe_mismatch(expected: dict[str, torch.Tensor], given: dict[str, torch.Tensor]) -> str:
    """List what is missing, unknown or of another shape in `given`; empty if the state dicts match."""
    shapes = [
        f"{key} is {tuple(given[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in sorted(expected.keys() & given.keys())
        if expected[key].shape != given[key].shape
    ]
    problems = {
        "missing ": sorted(expected.keys() - given.keys()),
        "unknown ": sorted(given.keys() - expected.keys()),
        "": shapes,
    }
    return "; ".join(f"{problem}{join_names(names)}" for problem, names in problems.items() if names)


_BLOCK_LAYERS = {
    "norm1": ["layernorm_before"],
    "attn.qkv": ["attention.attention.query", "attention.attention.key", "attention.attention.value"],
    "attn.proj": ["attention.output.dense"],
    "norm2": ["layernorm_after"],
    "mlp.fc1": ["intermediate.dense"],
    "mlp.fc2": ["output.dense"],
}
_ENCODER_LAYERS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}


_BEIT_LAYERS = {
    BIAS_TABLE: "beit.encoder.relative_position_bias.relative_position_bias_table",
    "mask_token": "beit.embeddings.mask_token",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
    "head.weight": "lm_head.weight",
    "head.bias": "lm_head.bias",
}
_BEIT_BLOCK_LAYERS = {
    "attn.q_bias": "attention.attention.query.bias",
    "attn.v_bias": "attention.attention.value.bias",
    "gamma_1": "lambda_1",
    "gamma_2": "lambda_2",
}


def _transformers_keys(key: str, decoder: bool) -> list[str]:
    layer, dot, kind = key.rpartition(".") if key.endswith((".weight", ".bias")) else (key, "", "")
    suffix, root = dot + kind, "vit." if decoder else ""
    if "blocks." in layer:
        part, _, number_and_name = layer.partition("blocks.")
        number, _, name = number_and_name.partition(".")
        stack = "decoder.decoder_layers" if part == "decoder_" else f"{root}encoder.layer"
        return [f"{stack}.{number}.{target}{suffix}" for target in _BLOCK_LAYERS[name]]
    if layer in _ENCODER_LAYERS:
        return [f"{root}{_ENCODER_LAYERS[layer]}{suffix}"]
    return [f"decoder.{layer}{suffix}"]


def _named_tensors(method: Method) -> dict[str, torch.Tensor]:
    """Return parameters and fixed position embeddings, which official checkpoints contain and ours do not."""
    buffers = {name: tensor for name, tensor in method.named_buffers() if name.endswith("pos_embed")}
    return {name: tensor.detach() for name, tensor in {**dict(method.named_parameters()), **buffers}.items()}


def _official_key(name: str) -> str:
    part, _, rest = name.partition(".")
    if part == "encoder" or rest == "mask_token":  # the one decoder entry without the prefix "decoder_"
        return rest
    return f"decoder_{rest}"


def _require_decoder(method: Method) -> None:
    if not hasattr(method, "decoder"):
        raise UserError(f"{type(method).__name__} has no decoder, so the official MAE code cannot load it")
    if hasattr(method.encoder, "mask_token"):
        raise UserError("method.mae.mask_tokens_in_encoder: the official MAE code cannot load such weights")
    if not isinstance(method.target, PixelTarget):
        raise UserError("method.target.name: the official MAE code predicts pixels only; use --encoder-only")
