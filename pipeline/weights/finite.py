"""Reject weights with NaN or infinite values, which would make every result meaningless."""

from collections.abc import Mapping

import torch

from pipeline.errors import UserError, join_names


def check_finite(tensors: Mapping[str, torch.Tensor], where: object) -> None:
    """Raise UserError, naming the tensors, if any value is NaN or infinite. `where` is the source of the weights."""
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(
            f"{where}: {join_names(broken)} {'have' if len(broken) > 1 else 'has'} NaN or infinite values; use an "
            "earlier checkpoint or download the file again"
        )
