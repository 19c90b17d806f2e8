"""Memory that a training step's backward pass needs, counted on torch's meta device."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pipeline.methods import Method, build_method
from pipeline.methods.flops import extrapolate_depth
from pipeline.recipe import Recipe


def activation_bytes(recipe: Recipe, build: Callable[[Recipe], Method] = build_method) -> int:
    """Return the bytes that autograd saves per image of a micro batch of pre-training, in the recipe's precision.

    `build` builds the method.
    """
    recipe = recipe.with_micro_batch(1)  # whose size does not matter
    return int(extrapolate_depth(lambda shallow: _activation_bytes(shallow, build), recipe))


@lru_cache
def _activation_bytes(recipe: Recipe, build: Callable[[Recipe], Method]) -> int:
    engine = recipe.engine.model_copy(update={"activation_checkpointing": False})
    with torch.device("meta"):
        method = build(recipe.model_copy(update={"engine": engine}))
    if recipe.engine.precision != "fp32":
        method = method.to(torch.bfloat16)
    blocks = [
        block for part in (method.encoder, getattr(method, "decoder", None)) for block in getattr(part, "blocks", ())
    ]

    def forward(batch: int) -> None:
        images = torch.empty(batch, 3, recipe.data.image_size, recipe.data.image_size)
        method(images, torch.empty(batch, method.noise_size))

    return count_activation_bytes(method, blocks, forward, recipe.engine.activation_checkpointing)


def count_activation_bytes(
    module: nn.Module, blocks: Sequence[nn.Module], forward: Callable[[int], object], activation_checkpointing: bool
) -> int:
    """Return the bytes that autograd saves per image of a micro batch.

    With activation checkpointing: the inputs of all blocks, everything outside the blocks, and the inside of
    the largest block.

    Args:
        module: On the meta device, without activation checkpointing.
        blocks: Its transformer blocks.
        forward: Runs the module on a number of images.
    """
    one, two = (_saved_bytes(module, blocks, forward, batch, activation_checkpointing) for batch in (1, 2))
    return two - one


def _saved_bytes(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    forward: Callable[[int], object],
    batch: int,
    activation_checkpointing: bool,
) -> int:
    counter = _SavedTensorCounter(module)
    handles = [
        handle
        for block in blocks
        for handle in (
            block.register_forward_pre_hook(counter.enter_block),
            block.register_forward_hook(counter.leave_block),
        )
    ]
    with (
        torch.device("meta"),
        torch.autograd.graph.saved_tensors_hooks(counter.save, lambda tensor: tensor),
        _FusedAttentionMode(),
    ):
        forward(batch)
    for handle in handles:
        handle.remove()
    if not activation_checkpointing:
        return counter.outside + sum(counter.inside)
    return counter.outside + sum(counter.inputs) + max(counter.inside)


class _SavedTensorCounter:
    """Counts the bytes saved outside the transformer blocks and inside each, without weights."""

    def __init__(self, module: nn.Module) -> None:
        self.outside = 0
        self.inside: list[int] = []
        self.inputs: list[int] = []
        self._in_block = False
        self._seen = {p.untyped_storage()._cdata for p in module.parameters()}
        self._alive: list[torch.UntypedStorage] = []  # the address of a freed storage could be reused

    def enter_block(self, block: nn.Module, inputs: tuple) -> None:
        self._in_block = True
        self.inside.append(0)
        self.inputs.append(inputs[0].numel() * inputs[0].element_size())

    def leave_block(self, *_: object) -> None:
        self._in_block = False

    def save(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._alive.append(storage)
            if self._in_block:
                self.inside[-1] += storage.nbytes()
            else:
                self.outside += storage.nbytes()
        return tensor


class _FusedAttentionMode(TorchFunctionMode):
    """Makes attention save what a fused kernel saves, instead of the attention matrix."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return _FusedAttention.apply(*args[:3], (kwargs or {}).get("attn_mask"))
        return func(*args, **(kwargs or {}))


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask):
        out = torch.empty_like(query)
        log_sum_exp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, out, log_sum_exp)
        return out
