"""The official MAE code's checkpoint: a .pth that holds {"model": state dict}, with or without the decoder.

That code is no package, so other readers of its format check it: timm, of which its encoder is a subclass,
and transformers, whose ViTMAE is a translation of it, under the names that its keys have there.
"""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from pipeline.export import timm_folder, transformers_folder
from pipeline.export.state_dicts import official_state_dict, timm_state_dict
from pipeline.export.target import Target, check_images, mask_ratio, relative_difference, tokens
from pipeline.recipe import Recipe
from pipeline.trained import Trained

WEIGHTS = "checkpoint.pth"


def _write(trained: Trained, folder: Path, decoder: bool) -> None:
    state = (official_state_dict if decoder else timm_state_dict)(trained.method)
    torch.save({"model": {key: tensor.contiguous() for key, tensor in state.items()}}, folder / WEIGHTS)


def _encoder_difference(trained: Trained, folder: Path) -> float:
    images = check_images(trained.recipe)
    model = timm_folder.empty_model(trained.recipe, checkpoint_path=str(folder / WEIGHTS))
    with torch.inference_mode():
        return relative_difference(model.forward_features(images), tokens(trained.method, images))


def _whole_difference(trained: Trained, folder: Path) -> float:
    state = torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True)["model"]
    with TemporaryDirectory(dir=folder) as renamed:
        transformers_folder.write_model(state, trained.recipe, Path(renamed), decoder=True)
        return transformers_folder.whole_difference(trained, Path(renamed))


def _encoder_usage(recipe: Recipe) -> str:
    return f"""\
import timm  # the official models_vit.py is a subclass of its VisionTransformer

model = {timm_folder.call(recipe, WEIGHTS)}
tokens = model.forward_features(images)  # (B, 1 + patches, width), the class token first
"""


def _whole_usage(recipe: Recipe) -> str:
    size, model = recipe.model.size, recipe.model
    return f"""\
from functools import partial

import models_mae  # of github.com/facebookresearch/mae
import torch

model = models_mae.MaskedAutoencoderViT(
    img_size={recipe.data.image_size},
    patch_size={model.patch_size},
    embed_dim={size.width},
    depth={size.depth},
    num_heads={size.heads},
    decoder_embed_dim={model.decoder_width},
    decoder_depth={model.decoder_depth},
    decoder_num_heads={model.decoder_heads},
    norm_pix_loss={recipe.method.normalize_targets},
    norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
)
model.load_state_dict(torch.load("OUT/{WEIGHTS}", weights_only=True)["model"])
loss, prediction, mask = model(images, mask_ratio={mask_ratio(recipe):g})
"""


OFFICIAL = Target(partial(_write, decoder=True), _whole_difference, _whole_usage, ("pytorch",))
OFFICIAL_ENCODER = Target(partial(_write, decoder=False), _encoder_difference, _encoder_usage, ("pytorch",))
