"""Load the encoder of a discrete VAE, which turns images into visual tokens.

The format is that of transformers' FlavaImageCodebook, the encoder of DALL-E's discrete VAE: a folder with config.json
and model.safetensors (or pytorch_model.bin, read without running code).
"""

from pathlib import Path
from typing import Any

from torch import nn

from pipeline.errors import UserError
from pipeline.methods import Method
from pipeline.methods.targets import TokenTarget
from pipeline.recipe import Recipe

KEY = "method.target.tokenizer"


def attach_tokenizer(method: Method, recipe: Recipe) -> None:
    """Load the tokenizer of a method that predicts tokens. Raises UserError as `load_tokenizer`."""
    options = recipe.method.target
    if isinstance(method.target, TokenTarget) and options.tokenizer:
        method.target.tokenizer.codebook = load_tokenizer(options.tokenizer, options.vocabulary)


def load_tokenizer(folder: str, vocabulary: int) -> nn.Module:
    """Load a tokenizer in fp32 on the CPU, in eval mode, without gradients.

    Args:
        folder: As transformers' `save_pretrained` writes it.
        vocabulary: Number of tokens that the recipe states.

    Raises:
        UserError: If the folder is no complete tokenizer or has another vocabulary.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{KEY}: {path}: no such folder; give one with the weights of transformers' FlavaImageCodebook")
    if not (path / "config.json").is_file():
        raise UserError(f"{KEY}: {path}: has no config.json; save the tokenizer with save_pretrained")
    import transformers  # optional, and slow to import

    transformers.utils.logging.disable_progress_bar()
    codebook_class: Any = transformers.FlavaImageCodebook  # its stubs do not know `output_loading_info`
    try:
        tokenizer, info = codebook_class.from_pretrained(
            str(path), local_files_only=True, output_loading_info=True, dtype="float32"
        )
    except Exception as error:  # transformers raises almost any type for a damaged folder
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{KEY}: {path}: cannot be loaded as FlavaImageCodebook: {reason}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, info[problem])):
            raise UserError(f"{KEY}: {path}: not the weights of a FlavaImageCodebook: {problem} {keys[0]}, ...")
    if tokenizer.vocab_size != vocabulary:
        raise UserError(
            f"method.target.vocabulary: {vocabulary}, but {path} has {tokenizer.vocab_size} tokens; set it to that"
        )
    return tokenizer.eval().requires_grad_(False)
