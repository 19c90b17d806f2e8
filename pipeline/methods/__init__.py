"""The methods, one paper a file. `build_method` makes the one that a recipe names."""

from typing import TYPE_CHECKING

from pipeline.methods.emae import EMAE
from pipeline.methods.mae import MAE
from pipeline.methods.method import Method, MethodOutput, Reconstruction
from pipeline.models.decoder import Decoder
from pipeline.models.encoder import Encoder

if TYPE_CHECKING:
    from pipeline.recipe import Recipe

__all__ = ["Method", "MethodOutput", "Reconstruction", "build_method"]


def build_method(recipe: "Recipe") -> Method:
    """The recipe's method with freshly initialised float32 weights (from torch's default generator)."""
    options = recipe.method
    common = {"normalize_targets": options.normalize_targets}
    if options.name == "mae":
        return MAE(_encoder(recipe), _decoder(recipe), num_visible=recipe.mae_visible, **common)
    return EMAE(
        _encoder(recipe),
        _decoder(recipe),
        num_parts=options.emae.num_parts,
        consistency_weight=options.emae.consistency_weight,
        consistency_kind=options.emae.consistency_kind,
        decode_share=options.emae.decode_share,
        **common,
    )


def _encoder(recipe: "Recipe") -> Encoder:
    width, depth, heads = recipe.model.size
    return Encoder(
        grid=recipe.grid,
        patch_size=recipe.model.patch_size,
        width=width,
        depth=depth,
        heads=heads,
        checkpointing=recipe.engine.activation_checkpointing,
    )


def _decoder(recipe: "Recipe") -> Decoder:
    model = recipe.model
    return Decoder(
        grid=recipe.grid,
        patch_size=model.patch_size,
        encoder_width=model.size.width,
        width=model.decoder_width,
        depth=model.decoder_depth,
        heads=model.decoder_heads,
        checkpointing=recipe.engine.activation_checkpointing,
    )
