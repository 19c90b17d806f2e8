"""A method's weights under the names of others: the official MAE checkpoint's, timm's and transformers'.

Invariant: nothing is left out and nothing is guessed. A state dict that does not fit is refused with the keys
named.
"""

import torch

from pipeline.errors import UserError, join_names
from pipeline.methods.method import Method

DECODER_ROOT = ("mask_token",)  # the one decoder entry that the official code keeps without "decoder_"


def official_state_dict(method: Method) -> dict[str, torch.Tensor]:
    """The whole method, encoder and decoder, under the official MAE checkpoint's keys; for mae, emae,
    efficient_mae.

    Tensors are detached and share memory with the method's. UserError for a method without MAE's decoder.
    """
    _need_decoder(method)
    return {_official_key(name): tensor for name, tensor in _tensors(method).items()}


def load_official_state_dict(method: Method, state: dict[str, torch.Tensor]) -> None:
    """Fill the method from a state dict with the official keys, positions included.

    UserError names the keys that are missing, unknown or of another shape; nothing is loaded then.
    """
    _need_decoder(method)
    own = {_official_key(name): tensor for name, tensor in _tensors(method).items()}
    if wrong := misfits(own, state):
        raise UserError(f"weights do not fit this model: {wrong}")
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(state[key])


def timm_state_dict(method: Method) -> dict[str, torch.Tensor]:
    """The encoder alone, as `timm.create_model(..., num_classes=0).load_state_dict` wants it.

    UserError for an encoder with relative positions, which timm's VisionTransformer cannot hold.
    """
    state = {
        name.removeprefix("encoder."): tensor
        for name, tensor in _tensors(method).items()
        if name.startswith("encoder.")
    }
    check_positions(state)
    return state


def check_positions(state: dict[str, torch.Tensor]) -> None:
    """UserError where weights under timm's names are of an encoder with relative positions."""
    if "pos_embed" not in state:
        raise UserError(
            "LoMaR's encoder has relative positions (iRPE), which no other library's model can hold"
        )


def transformers_state_dict(state: dict[str, torch.Tensor], decoder: bool) -> dict[str, torch.Tensor]:
    """Official keys to those of the checkpoints on the Hugging Face hub, such as facebook/vit-mae-base.

    state: `official_state_dict`'s for ViTMAEForPreTraining (`decoder`), `timm_state_dict`'s for ViTModel.
    Query, key and value, one matrix there, are three here.
    """
    renamed = {}
    for key, tensor in state.items():
        names = _transformers_keys(key, decoder)
        renamed |= dict(zip(names, tensor.chunk(len(names)), strict=True))
    return {key: tensor.contiguous() for key, tensor in renamed.items()}


_IN_A_BLOCK = {
    "norm1": ["layernorm_before"],
    "attn.qkv": ["attention.attention.query", "attention.attention.key", "attention.attention.value"],
    "attn.proj": ["attention.output.dense"],
    "norm2": ["layernorm_after"],
    "mlp.fc1": ["intermediate.dense"],
    "mlp.fc2": ["output.dense"],
}
_OF_THE_ENCODER = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}


def _transformers_keys(key: str, decoder: bool) -> list[str]:
    layer, _, kind = key.rpartition(".") if key.endswith((".weight", ".bias")) else (key, "", "")
    end = f".{kind}" if kind else ""
    root = "vit." if decoder else ""
    if "blocks." in layer:
        part, _, number_and_name = layer.partition("blocks.")
        number, _, name = number_and_name.partition(".")
        stack = "decoder.decoder_layers" if part == "decoder_" else f"{root}encoder.layer"
        return [f"{stack}.{number}.{own}{end}" for own in _IN_A_BLOCK[name]]
    if layer in _OF_THE_ENCODER:
        return [f"{root}{_OF_THE_ENCODER[layer]}{end}"]
    return [f"decoder.{layer}{end}"]


def _tensors(method: Method) -> dict[str, torch.Tensor]:
    """All parameters, and the fixed positions, which official checkpoints hold and our own leave out."""
    named = [
        *method.named_parameters(),
        *((n, b) for n, b in method.named_buffers() if n.endswith("pos_embed")),
    ]
    return {name: tensor.detach() for name, tensor in named}


def _official_key(name: str) -> str:
    part, _, rest = name.partition(".")
    if part == "encoder" or rest in DECODER_ROOT:
        return rest
    return f"decoder_{rest}"


def _need_decoder(method: Method) -> None:
    if not hasattr(method, "decoder"):
        raise UserError(f"{type(method).__name__} has no decoder, so it has no official MAE checkpoint form")


def misfits(own: dict[str, torch.Tensor], given: dict[str, torch.Tensor]) -> str:
    """What is missing, unknown or of another shape in `given`, for a message; empty where it fits."""
    missing, unknown = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    shapes = [
        f"{key} is {tuple(given[key].shape)} instead of {tuple(own[key].shape)}"
        for key in sorted(own.keys() & given.keys())
        if own[key].shape != given[key].shape
    ]
    complaints = ("missing ", missing), ("unknown ", unknown), ("", shapes)
    return "; ".join(f"{what}{join_names(names)}" for what, names in complaints if names)
