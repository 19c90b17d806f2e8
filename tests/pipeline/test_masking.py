"""Masks as functions of noise."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.masking import as_mask, gather_tokens, parallel_parts, random_split


def make_noise(batch: int, length: int, seed: int) -> torch.Tensor:
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 4), st.integers(1, 40), st.data(), st.integers(0, 10**6))
def test_patches_with_the_smallest_noise_are_visible_in_order(batch, length, data, seed):
    num_visible = data.draw(st.integers(0, length))
    noise = make_noise(batch, length, seed)
    visible, masked = random_split(noise, num_visible)
    assert visible.shape == (batch, num_visible)
    for row, order in zip(noise.tolist(), torch.cat([visible, masked], dim=1).tolist(), strict=True):
        assert order == sorted(range(length), key=row.__getitem__)


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 8), st.integers(0, 10**6))
def test_each_patch_is_in_exactly_one_part(batch, num_parts, part_size, seed):
    noise = make_noise(batch, num_parts * part_size, seed)
    parts = parallel_parts(noise, num_parts)
    assert parts.shape == (batch, num_parts, part_size)
    assert parts.flatten(1).sort(dim=1).values.tolist() == [list(range(num_parts * part_size))] * batch
    assert torch.equal(parts.flatten(1), random_split(noise, 0)[1])


def test_equal_noise_is_ordered_by_position():
    visible, masked = random_split(torch.zeros(1, 7), 3)
    assert visible.tolist() == [[0, 1, 2]] and masked.tolist() == [[3, 4, 5, 6]]


def test_unequal_parts_raise():
    with pytest.raises(ValueError, match=r"num_parts: 10 patches .* 4"):
        parallel_parts(torch.rand(2, 10), 4)


def test_more_visible_patches_than_exist_raise():
    with pytest.raises(ValueError, match="num_visible: 11"):
        random_split(torch.rand(2, 10), 11)


def test_gather_tokens_and_as_mask_equal_indexing():
    tokens, ids = torch.rand(2, 5, 3), torch.tensor([[4, 0], [1, 2]])
    assert torch.equal(gather_tokens(tokens, ids), torch.stack([tokens[b, ids[b]] for b in range(2)]))
    assert as_mask(ids, 5).tolist() == [[True, False, False, False, True], [False, True, True, False, False]]
