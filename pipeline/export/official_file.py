"""Official MAE code's format: a .pth file with {"model": state dict}.

Its keys are those of models_mae.py; without the decoder, those of models_vit.py, for a classifier with
global_pool=True. The official code is not a package, so other libraries check the file: timm, whose
VisionTransformer models_vit.py subclasses, and transformers, whose ViTMAE is a port of models_mae.py.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from pipeline.export import timm_folder, transformers_folder
from pipeline.export.formats import Exportable, ExportFormat, mask_ratio
from pipeline.weights.run import LoadedRun
from pipeline.weights.state_dicts import official_state_dict

WEIGHTS = "checkpoint.pth"


def _save(state: dict[str, torch.Tensor], folder: Path) -> None:
    torch.save({"model": {key: tensor.contiguous() for key, tensor in state.items()}}, folder / WEIGHTS)


def _write_vit(run: Exportable, folder: Path) -> None:
    _save(run.vit.weights, folder)


def _write_mae(run: LoadedRun, folder: Path) -> None:
    _save(official_state_dict(run.method), folder)


def _vit_difference(run: Exportable, folder: Path) -> float:
    return timm_folder.file_difference(run.vit, folder / WEIGHTS)


def _mae_difference(run: LoadedRun, folder: Path) -> float:
    state = torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True)["model"]
    with TemporaryDirectory(dir=folder) as renamed:
        transformers_folder.write_model(state, run.recipe, Path(renamed), decoder=True)
        return transformers_folder.mae_difference(run, Path(renamed))


def _vit_usage(run: Exportable) -> str:
    vit = run.vit
    outputs = "tokens = model.forward_features(images)  # (B, 1 + patches, width), class token first"
    if vit.classes:
        outputs = f"logits = model(images)  # (B, {len(vit.classes)})"
    return f"""\
import timm  # the official models_vit.py subclasses timm's VisionTransformer

model = {timm_folder.create_model_call(vit, WEIGHTS)}
{outputs}
"""


def _mae_usage(run: LoadedRun) -> str:
    recipe, model, size = run.recipe, run.recipe.model, run.recipe.model.size
    return f"""\
from functools import partial

import models_mae  # from github.com/facebookresearch/mae
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


OFFICIAL = ExportFormat(_write_mae, _mae_difference, _mae_usage, ("pytorch",))
OFFICIAL_VIT = ExportFormat(_write_vit, _vit_difference, _vit_usage, ("pytorch",))
