"""Visual tokens against transformers, and folders that are no tokenizer."""

import json

import pytest
import torch
from small_codebook import VOCABULARY, save_codebook
from transformers import FlavaImageCodebook, ViTConfig, ViTModel
from transformers.models.flava.image_processing_pil_flava import FlavaImageProcessorPil

from pipeline.errors import UserError
from pipeline.methods.targets.tokens import Tokenizer
from pipeline.weights.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    save_codebook(path)
    return path


def test_tokens_equal_transformers(folder):
    codebook = FlavaImageCodebook.from_pretrained(folder)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    tokenizer = Tokenizer(mean, std, grid=4)
    tokenizer.codebook = load_tokenizer(str(folder), VOCABULARY)
    levels = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    processor = FlavaImageProcessorPil(
        codebook_size={"height": 32, "width": 32}, codebook_crop_size={"height": 32, "width": 32}
    )
    pixels = processor(list(levels), return_codebook_pixels=True, return_tensors="pt")["codebook_pixel_values"]
    expected = codebook.get_codebook_indices(pixels).flatten(1)
    images = (levels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    tokens = tokenizer.encode(images)
    assert tokens.dtype == torch.int64 and tokens.shape == (3, 16)
    assert (tokens == expected).float().mean() > 0.95  # a near tie may turn by rounding
    assert len(tokens.unique()) > 3


def test_tokens_of_larger_images_have_one_per_patch(folder):
    tokenizer = Tokenizer((0.5,) * 3, (0.5,) * 3, grid=4)
    tokenizer.codebook = load_tokenizer(str(folder), VOCABULARY)
    small = torch.rand(2, 3, 32, 32)
    assert tokenizer.encode(torch.rand(2, 3, 64, 64)).shape == (2, 16)
    assert not any(p.requires_grad for p in tokenizer.codebook.parameters())
    assert tokenizer.encode(small).shape == (2, 16)


def test_folders_that_are_no_tokenizer(folder, tmp_path):
    other = tmp_path / "vit"
    ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)).save_pretrained(
        other
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text((folder / "config.json").read_text())
    (damaged / "model.safetensors").write_bytes(b"no tensors")
    not_json = tmp_path / "not_json"
    not_json.mkdir()
    (not_json / "config.json").write_text("{")
    for path in (tmp_path / "missing", empty, damaged, not_json, other):
        with pytest.raises(UserError, match=r"^method\.target\.tokenizer: ") as raised:
            load_tokenizer(str(path), VOCABULARY)
        assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_vocabulary_must_be_that_of_the_recipe(folder):
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == VOCABULARY
    with pytest.raises(UserError, match=r"^method\.target\.vocabulary: 8192, but .* has 40 tokens"):
        load_tokenizer(str(folder), 8192)
