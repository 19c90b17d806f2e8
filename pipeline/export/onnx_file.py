"""ONNX: encoder.onnx, images (B, 3, S, S) to tokens (B, 1 + L, D), any B; of a classifier classifier.onnx,
images to logits (B, C).

The graph is that of timm's VisionTransformer with our weights, whose patch embedding is a convolution, as
other runtimes expect it. What images are to look like, and the names of the classes, are in the file's
metadata.
"""

import io
import json
import logging
from contextlib import redirect_stdout
from pathlib import Path

import torch

from pipeline.export import timm_folder
from pipeline.export.target import Exportable, Target, check_images, library, relative_difference
from pipeline.weights.vit import Vit

OPSET = 18
ONE_FILE = 1.9e9
"""Bytes of weights up to which all is one file: protobuf ends at 2 GiB. More are in a .data beside it."""


class _Graph(torch.nn.Module):
    def __init__(self, vit: Vit) -> None:
        super().__init__()
        self.vit, self.model = vit, timm_folder.empty_model(vit)
        self.model.load_state_dict(vit.weights)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return timm_folder.outputs(self.vit, self.model, images)


def _name(vit: Vit) -> str:
    return "classifier.onnx" if vit.classes else "encoder.onnx"


def _write(trained: Exportable, folder: Path) -> None:
    for name in ("onnx", "onnxscript"):
        library(name)
    vit = trained.vit
    size = sum(tensor.nbytes for tensor in vit.weights.values())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with redirect_stdout(io.StringIO()):
        program = torch.onnx.export(
            _Graph(vit).eval(),
            (check_images(vit.data),),
            input_names=["images"],
            output_names=[vit.output],
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
            opset_version=OPSET,
            dynamo=True,
        )
    about = {"mean": vit.data.mean, "std": vit.data.std, "color": "RGB, 0 to 1 before mean and std"}
    if vit.classes:
        about["classes"] = json.dumps(vit.classes)
    program.model.metadata_props.update({key: str(value) for key, value in about.items()})
    program.save(str(folder / _name(vit)), external_data=size > ONE_FILE)


def _difference(trained: Exportable, folder: Path) -> float:
    vit = trained.vit
    path = str(folder / _name(vit))
    library("onnx").checker.check_model(path)
    session = library("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    images = check_images(vit.data)
    differences = []
    for batch in (images, images[:1]):
        (theirs,) = session.run([vit.output], {"images": batch.numpy()})
        with torch.inference_mode():
            differences.append(relative_difference(torch.from_numpy(theirs), vit.ours(batch)))
    return max(differences)


def _usage(trained: Exportable) -> str:
    vit = trained.vit
    side, out = vit.data.image_size, vit.output
    return f"""\
import onnxruntime

session = onnxruntime.InferenceSession("OUT/{_name(vit)}", providers=["CPUExecutionProvider"])
({out},) = session.run(["{out}"], {{"images": images}})  # float32 array (any, 3, {side}, {side})
"""


ONNX = Target(_write, _difference, _usage, ("onnx",))
