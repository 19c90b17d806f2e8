"""Encoder and decoder as a recipe describes them, shared by the MAE-like methods."""

from pipeline.models.decoder import Decoder
from pipeline.models.encoder import Encoder
from pipeline.recipe import Recipe


def build_encoder(recipe: Recipe, has_mask_token: bool = False) -> Encoder:
    return Encoder(
        grid=recipe.grid,
        patch_size=recipe.model.patch_size,
        **recipe.model.size._asdict(),
        activation_checkpointing=recipe.engine.activation_checkpointing,
        has_mask_token=has_mask_token,
    )


def build_decoder(recipe: Recipe, has_mask_token: bool = True, num_outputs: int | None = None) -> Decoder:
    model = recipe.model
    return Decoder(
        grid=recipe.grid,
        patch_size=model.patch_size,
        encoder_width=model.size.width,
        width=model.decoder_width,
        depth=model.decoder_depth,
        heads=model.decoder_heads,
        activation_checkpointing=recipe.engine.activation_checkpointing,
        has_mask_token=has_mask_token,
        num_outputs=num_outputs,
    )
