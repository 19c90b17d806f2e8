"""A small visual tokenizer with random weights, in place of DALL-E's."""

from pathlib import Path

import torch
from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

VOCABULARY = 40


def small_codebook(seed: int = 0) -> FlavaImageCodebook:
    """Build the codebook. It gives an image of noise about all of its tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = FlavaImageCodebookConfig(hidden_size=8, num_blocks_per_group=1, vocab_size=VOCABULARY)
        codebook = FlavaImageCodebook(config).requires_grad_(False).eval()
        # Random weights assign the same token to nearly every cell.
        codebook.blocks.output.conv.bias -= codebook.blocks(torch.rand(8, 3, 32, 32)).mean(dim=(0, 2, 3))
    return codebook


def save_codebook(folder: Path, seed: int = 0) -> dict[str, object]:
    """Write the codebook to a folder and return the settings of a recipe that predicts its tokens."""
    small_codebook(seed).save_pretrained(folder)
    target = {"name": "tokens", "tokenizer": folder, "vocabulary": VOCABULARY}
    return {f"method.target.{key}": value for key, value in target.items()}
