"""ONNX of the encoder: encoder.onnx, images (B, 3, S, S) to tokens (B, 1 + L, D), any B.

The graph is that of timm's VisionTransformer with our weights, whose patch embedding is a convolution, as
other runtimes expect it. What images are to look like is in the file's metadata.
"""

import io
import logging
from contextlib import redirect_stdout
from pathlib import Path

import torch

from pipeline.export import timm_folder
from pipeline.export.state_dicts import timm_state_dict
from pipeline.export.target import Target, check_images, library, relative_difference, tokens
from pipeline.recipe import Recipe
from pipeline.trained import Trained

WEIGHTS = "encoder.onnx"
OPSET = 18
ONE_FILE = 1.9e9
"""Bytes of weights up to which all is one file: protobuf ends at 2 GiB. More are in encoder.onnx.data."""


class _Tokens(torch.nn.Module):
    def __init__(self, vit: torch.nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.vit.forward_features(images)


def _write(trained: Trained, folder: Path) -> None:
    for name in ("onnx", "onnxscript"):
        library(name)
    vit = timm_folder.empty_model(trained.recipe)
    state = timm_state_dict(trained.method)
    vit.load_state_dict(state)
    size = sum(tensor.nbytes for tensor in state.values())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with redirect_stdout(io.StringIO()):
        program = torch.onnx.export(
            _Tokens(vit).eval(),
            (check_images(trained.recipe),),
            input_names=["images"],
            output_names=["tokens"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
            opset_version=OPSET,
            dynamo=True,
        )
    data = trained.recipe.data
    about = {"mean": data.mean, "std": data.std, "color": "RGB, 0 to 1 before mean and std"}
    program.model.metadata_props.update({key: str(value) for key, value in about.items()})
    program.save(str(folder / WEIGHTS), external_data=size > ONE_FILE)


def _difference(trained: Trained, folder: Path) -> float:
    path = str(folder / WEIGHTS)
    library("onnx").checker.check_model(path)
    session = library("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    images = check_images(trained.recipe)
    differences = []
    for batch in (images, images[:1]):
        (theirs,) = session.run(["tokens"], {"images": batch.numpy()})
        differences.append(relative_difference(torch.from_numpy(theirs), tokens(trained.method, batch)))
    return max(differences)


def _usage(recipe: Recipe) -> str:
    side = recipe.data.image_size
    return f"""\
import onnxruntime

session = onnxruntime.InferenceSession("OUT/{WEIGHTS}", providers=["CPUExecutionProvider"])
(tokens,) = session.run(["tokens"], {{"images": images}})  # float32 array (any, 3, {side}, {side})
"""


ONNX = Target(_write, _difference, _usage, ("onnx",))
