"""Masks as functions of noise."""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from pipeline.masking import (
    BLOCK_TRIES,
    as_mask,
    block_noise_size,
    block_split,
    gather_tokens,
    mask_blocks,
    parallel_parts,
    random_split,
)


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


def beit_mask(generator: random.Random, grid: int, num_masked: int) -> tuple[list[list[bool]], list[int]]:
    """Mask blocks by the loop of BEiT's code (masking_generator.py); return the mask and the areas of the blocks."""
    mask, areas, count = [[False] * grid for _ in range(grid)], [], 0
    while count < num_masked:
        new = 0
        for _ in range(10):
            area = generator.uniform(16, num_masked - count)
            aspect = math.exp(generator.uniform(math.log(0.3), math.log(1 / 0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height < grid and width < grid:
                top, left = generator.randint(0, grid - height), generator.randint(0, grid - width)
                block = [(i, j) for i in range(top, top + height) for j in range(left, left + width)]
                new = sum(not mask[i][j] for i, j in block)
                if 0 < new <= num_masked - count:
                    for i, j in block:
                        mask[i][j] = True
                    areas.append(len(block))
                    break
                new = 0
        if new == 0:
            break
        count += new
    return mask, areas


def test_blocks_are_distributed_as_by_beits_loop():
    size, generator = 2000, random.Random(0)
    masks, loop_areas = zip(*(beit_mask(generator, 14, 75) for _ in range(size)), strict=True)
    expected = torch.tensor(masks)
    mask, areas = mask_blocks(make_noise(size, 4 * BLOCK_TRIES, 1), 14, 75)
    pairs = {
        "masked patches": (mask.sum(dim=(1, 2)), expected.sum(dim=(1, 2))),
        "blocks": ((areas > 0).sum(dim=1), torch.tensor([len(row) for row in loop_areas])),
        "area of the first block": (areas[:, 0][areas[:, 0] > 0], torch.tensor([row[0] for row in loop_areas])),
        "area of the blocks": (areas[areas > 0], torch.tensor([area for row in loop_areas for area in row])),
    }
    for name, (ours, loops) in pairs.items():
        assert ks_2samp(ours, loops).pvalue > 1e-3, name
    difference = mask.double().mean(dim=0) - expected.double().mean(dim=0)  # of the frequency of each position
    assert difference.abs().max() < 5 * math.sqrt(2 * 0.25 / size)


def test_block_split_masks_75_of_196_patches_and_every_block():
    noise = make_noise(500, block_noise_size(14), 2)
    visible, masked = block_split(noise, 14, 196 - 75)
    assert torch.cat([visible, masked], dim=1).sort(dim=1).values.eq(torch.arange(196)).all()
    assert masked.shape == (500, 75)
    blocks, _ = mask_blocks(noise[:, 196:], 14, 75)
    assert (as_mask(masked, 196) | ~blocks.flatten(1)).all()
    assert blocks.sum() / blocks.shape[0] > 74  # few patches are drawn at random


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
