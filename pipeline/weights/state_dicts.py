"""Convert a method's weights to the key names of the official MAE code, timm and transformers.

Invariant: every tensor has a counterpart; a state dict that does not match is rejected with the keys named.
"""

import torch

from pipeline.errors import UserError, join_names
from pipeline.methods.method import Method
from pipeline.methods.targets import PixelTarget


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
        UserError: If the encoder has relative positions.
    """
    state = {
        name.removeprefix("encoder."): tensor
        for name, tensor in _named_tensors(method).items()
        if name.startswith("encoder.") and name != "encoder.mask_token"
    }
    require_absolute_positions(state)
    return state


def require_absolute_positions(state: dict[str, torch.Tensor]) -> None:
    """Raise UserError if weights with timm's keys belong to an encoder with relative positions."""
    if "pos_embed" not in state:
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
