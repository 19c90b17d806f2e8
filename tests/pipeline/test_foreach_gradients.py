"""Accumulation of 16-bit gradients in chunks, and their norm."""

from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.train import engine, foreach_gradients
from pipeline.train.foreach_gradients import add_gradients, global_norm

get_global_norm_of_tensors = engine.deepspeed.runtime.utils.get_global_norm_of_tensors


@settings(max_examples=50)
@given(
    st.lists(st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=6), min_size=1, max_size=3),
    st.integers(1, 20),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_chunks_of_any_size_give_the_same_sums(groups, chunk, clear, seed):
    torch.manual_seed(seed)
    parameters = [[torch.nn.Parameter(torch.randn(size, 2).bfloat16()) for size, _ in group] for group in groups]
    sums = [[torch.randn(2 * size) for size, _ in group] for group in groups]
    expected = [[total.clone() for total in group] for group in sums]
    flags = [[False] * len(group) for group in groups]
    for group, tensors, totals in zip(groups, parameters, expected, strict=True):
        for (_, has_gradient), parameter, total in zip(group, tensors, totals, strict=True):
            if has_gradient:
                parameter.grad = torch.randn_like(parameter)
                total += parameter.grad.float().view(-1)
    optimizer = SimpleNamespace(bf16_groups=parameters, fp32_groups_gradients=sums, fp32_groups_has_gradients=flags)
    before, foreach_gradients.CHUNK_ELEMENTS = foreach_gradients.CHUNK_ELEMENTS, chunk
    try:
        add_gradients(optimizer, clear)
    finally:
        foreach_gradients.CHUNK_ELEMENTS = before
    for found, wanted in zip(sums, expected, strict=True):
        assert all(map(torch.equal, found, wanted))
    assert flags == [[has_gradient for _, has_gradient in group] for group in groups]
    gradients = [p.grad for group in parameters for p in group if p.grad is not None]
    assert all(bool(gradient.any()) != clear for gradient in gradients)


def test_norm_is_deepspeeds_and_minus_one_if_not_finite():
    tensors = [torch.randn(size) for size in (3, 1000, 7)]
    assert torch.equal(global_norm(tensors), get_global_norm_of_tensors(tensors))
    tensors[1][5] = float("nan")
    assert global_norm(tensors) == get_global_norm_of_tensors(tensors) == -1
