"""Encoder and decoder as a recipe describes them, shared by the MAE-like methods."""

from pipeline.models.decoder import Decoder
from pipeline.models.encoder import Encoder
from pipeline.recipe import Recipe


def build_encoder(recipe: Recipe) -> Encoder:
    return Encoder(
        grid=recipe.grid,
        patch_size=recipe.model.patch_size,
        **recipe.model.size._asdict(),
        activation_checkpointing=recipe.engine.activation_checkpointing,
    )


def build_decoder(recipe: Recipe) -> Decoder:
    model = recipe.model
    return Decoder(
        grid=recipe.grid,
        patch_size=model.patch_size,
        encoder_width=model.size.width,
        width=model.decoder_width,
        depth=model.decoder_depth,
        heads=model.decoder_heads,
        activation_checkpointing=recipe.engine.activation_checkpointing,
    )
