"""The methods, one paper a file. `build_method` makes the one that a recipe names."""

from typing import TYPE_CHECKING

from pipeline.methods.efficient_mae import DifficultyFlatten, EfficientMAE
from pipeline.methods.emae import EMAE
from pipeline.methods.lomar import LoMaR
from pipeline.methods.mae import MAE
from pipeline.methods.method import Method, MethodOutput, Reconstruction
from pipeline.models.decoder import Decoder
from pipeline.models.encoder import Encoder
from pipeline.models.window_encoder import WindowEncoder

if TYPE_CHECKING:
    from pipeline.recipe import Recipe

__all__ = ["Method", "MethodOutput", "Reconstruction", "build_method"]


def build_method(recipe: "Recipe") -> Method:
    """The recipe's method with freshly initialised float32 weights (from torch's default generator)."""
    options = recipe.method
    common = {"normalize_targets": options.normalize_targets}
    if options.name == "mae":
        return MAE(_encoder(recipe), _decoder(recipe), num_visible=recipe.num_visible, **common)
    if options.name == "emae":
        return EMAE(
            _encoder(recipe),
            _decoder(recipe),
            num_parts=options.emae.num_parts,
            consistency_weight=options.emae.consistency_weight,
            consistency_kind=options.emae.consistency_kind,
            decode_share=options.emae.decode_share,
            flattening=_difficulty_flatten(recipe) if options.emae.difficulty_flatten else None,
            num_slots=recipe.num_predicted,
            **common,
        )
    if options.name == "efficient_mae":
        return EfficientMAE(
            _encoder(recipe),
            _decoder(recipe),
            num_visible=recipe.num_visible,
            num_predicted=recipe.num_predicted,
            flattening=_difficulty_flatten(recipe),
            scheduler=options.efficient_mae.scheduler,
            **common,
        )
    return LoMaR(
        WindowEncoder(
            window=options.lomar.window_size,
            patch_size=recipe.model.patch_size,
            **recipe.model.size._asdict(),
            checkpointing=recipe.engine.activation_checkpointing,
        ),
        grid=recipe.grid,
        num_windows=options.lomar.num_windows,
        num_visible=recipe.num_visible,
        flattening=_difficulty_flatten(recipe) if options.lomar.difficulty_flatten else None,
        **common,
    )


def _difficulty_flatten(recipe: "Recipe") -> DifficultyFlatten:
    options = recipe.method.efficient_mae
    return DifficultyFlatten(
        patch_size=recipe.model.patch_size,
        gamma=options.gamma,
        beta=options.beta,
        metric=options.metric,
        exact=options.exact_distance,
        k=options.k,
    )


def _encoder(recipe: "Recipe") -> Encoder:
    return Encoder(
        grid=recipe.grid,
        patch_size=recipe.model.patch_size,
        **recipe.model.size._asdict(),
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
