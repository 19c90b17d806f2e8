"""Weights for others: the official MAE checkpoint's keys, and timm's.

Invariant: nothing is left out and nothing is guessed. A state dict that does not fit is refused with the keys
named.
"""

import torch

from pipeline.errors import UserError
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
    _check_fit(own, state)
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(state[key])


def timm_state_dict(method: Method) -> dict[str, torch.Tensor]:
    """The encoder alone, as `timm.create_model(..., num_classes=0).load_state_dict` wants it.

    UserError for an encoder with relative positions, which timm's VisionTransformer cannot hold.
    """
    if not hasattr(method.encoder, "pos_embed"):
        raise UserError(
            f"{type(method).__name__}'s encoder has relative positions, which timm's VisionTransformer "
            "cannot hold"
        )
    return {
        name.removeprefix("encoder."): tensor
        for name, tensor in _tensors(method).items()
        if name.startswith("encoder.")
    }


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


def _check_fit(own: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    missing = sorted(own.keys() - state.keys())
    unknown = sorted(state.keys() - own.keys())
    shapes = [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if own[key].shape != state[key].shape
    ]
    complaints = []
    if missing:
        complaints.append(f"missing {_some(missing)}")
    if unknown:
        complaints.append(f"unknown {_some(unknown)}")
    if shapes:
        complaints.append(_some(shapes))
    if complaints:
        raise UserError("weights do not fit this model: " + "; ".join(complaints))


def _some(names: list[str], at_most: int = 4) -> str:
    return ", ".join(names[:at_most]) + (f" and {len(names) - at_most} more" if len(names) > at_most else "")
