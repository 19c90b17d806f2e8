"""The official MAE code's checkpoint: a .pth that holds {"model": state dict}, of models_mae.py's model, or
without the decoder of models_vit.py's; a classifier's with global_pool=True.

That code is no package, so other readers of its format check it: timm, of which its models_vit.py is a
subclass, and transformers, whose ViTMAE is a translation of it, under the names that its keys have there.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from pipeline.export import timm_folder, transformers_folder
from pipeline.export.target import Exportable, Target, mask_ratio
from pipeline.weights.run import LoadedRun
from pipeline.weights.state_dicts import official_state_dict

WEIGHTS = "checkpoint.pth"


def _save(state: dict[str, torch.Tensor], folder: Path) -> None:
    torch.save({"model": {key: tensor.contiguous() for key, tensor in state.items()}}, folder / WEIGHTS)


def _write_vit(trained: Exportable, folder: Path) -> None:
    _save(trained.vit.weights, folder)


def _write_whole(trained: LoadedRun, folder: Path) -> None:
    _save(official_state_dict(trained.method), folder)


def _vit_difference(trained: Exportable, folder: Path) -> float:
    return timm_folder.file_difference(trained.vit, folder / WEIGHTS)


def _whole_difference(trained: LoadedRun, folder: Path) -> float:
    state = torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True)["model"]
    with TemporaryDirectory(dir=folder) as renamed:
        transformers_folder.write_model(state, trained.recipe, Path(renamed), decoder=True)
        return transformers_folder.whole_difference(trained, Path(renamed))


def _vit_usage(trained: Exportable) -> str:
    vit = trained.vit
    ours = f"logits = model(images)  # (B, {len(vit.classes)})"
    if not vit.classes:
        ours = "tokens = model.forward_features(images)  # (B, 1 + patches, width), the class token first"
    return f"""\
import timm  # the official models_vit.py is a subclass of its VisionTransformer

model = {timm_folder.call(vit, WEIGHTS)}
{ours}
"""


def _whole_usage(trained: LoadedRun) -> str:
    recipe, model = trained.recipe, trained.recipe.model
    size = model.size
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
loss, prediction, mask = model(images, mask_ratio={mask_ratio(recipe)})
"""


OFFICIAL = Target(_write_whole, _whole_difference, _whole_usage, ("pytorch",))
OFFICIAL_VIT = Target(_write_vit, _vit_difference, _vit_usage, ("pytorch",))
