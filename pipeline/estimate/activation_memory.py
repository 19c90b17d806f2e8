"""How much a training step keeps for its backward pass, counted on shapes alone."""

from functools import lru_cache

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pipeline.methods import build_method
from pipeline.methods.method import Method
from pipeline.recipe import Recipe


@lru_cache
def activation_bytes(recipe: Recipe) -> int:
    """Bytes that autograd keeps for one more image in the micro batch, in the recipe's precision.

    With activation checkpointing: every block's input, everything outside the blocks, and one block's inside.
    """
    one, two = (_saved_bytes(recipe, batch) for batch in (1, 2))
    return two - one


def _saved_bytes(recipe: Recipe, batch: int) -> int:
    plain = recipe.model_copy(
        update={"engine": recipe.engine.model_copy(update={"activation_checkpointing": False})}
    )
    with torch.device("meta"):
        method = build_method(plain)
        if recipe.engine.precision != "fp32":
            method = method.to(torch.bfloat16)
        images = torch.empty(batch, 3, recipe.data.image_size, recipe.data.image_size)
        noise = torch.empty(batch, method.noise_size)
        ledger = _SavedTensorCounter(method)
        with torch.autograd.graph.saved_tensors_hooks(ledger.keep, lambda tensor: tensor), _Flash():
            method(images, noise)
    if not recipe.engine.activation_checkpointing:
        return ledger.outside + sum(ledger.inside)
    return ledger.outside + sum(ledger.inputs) + max(ledger.inside)


class _SavedTensorCounter:
    """Bytes kept outside the transformer blocks and inside each, every storage once; weights don't count."""

    def __init__(self, method: Method) -> None:
        self.outside = 0
        self.inside: list[int] = []
        self.inputs: list[int] = []
        self.in_block = False
        self.seen = {p.untyped_storage()._cdata for p in method.parameters()}
        self.alive: list[torch.UntypedStorage] = []  # an address is taken again once its storage is gone
        stacks = [method.encoder.blocks, *([method.decoder.blocks] if hasattr(method, "decoder") else [])]
        for block in (block for stack in stacks for block in stack):
            block.register_forward_pre_hook(self.enter)
            block.register_forward_hook(self.leave)

    def enter(self, block: torch.nn.Module, inputs: tuple) -> None:
        self.in_block = True
        self.inside.append(0)
        self.inputs.append(inputs[0].numel() * inputs[0].element_size())

    def leave(self, *_: object) -> None:
        self.in_block = False

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.alive.append(storage)
            if self.in_block:
                self.inside[-1] += storage.nbytes()
            else:
                self.outside += storage.nbytes()
        return tensor


class _Flash(TorchFunctionMode):
    """Attention keeps what a fused kernel keeps: without a GPU torch would count the table of all scores
    too."""

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

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError("counted, never run")
