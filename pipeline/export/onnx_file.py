"""ONNX format: encoder.onnx maps images (B, 3, S, S) to tokens (B, 1 + L, D), classifier.onnx to logits.

The batch size is dynamic. The graph is that of timm's VisionTransformer with our weights: its patch embedding
is a convolution, as runtimes expect. The file's metadata has mean, std and the class names.
"""

import io
import json
import logging
from contextlib import redirect_stdout
from pathlib import Path

import torch

from pipeline.export import timm_folder
from pipeline.export.formats import Exportable, ExportFormat, check_images, import_library, relative_difference
from pipeline.weights.vit import Vit

OPSET = 18
MAX_EMBEDDED_BYTES = 1.9e9
"""More weights go to a .data file beside the model: protobuf is limited to 2 GiB."""


class _Graph(torch.nn.Module):
    def __init__(self, vit: Vit) -> None:
        super().__init__()
        self.vit, self.model = vit, timm_folder.build_model(vit)
        self.model.load_state_dict(vit.weights)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return timm_folder.compute_outputs(self.vit, self.model, images)


def _file_name(vit: Vit) -> str:
    return "classifier.onnx" if vit.classes else "encoder.onnx"


def _write(run: Exportable, folder: Path) -> None:
    for name in ("onnx", "onnxscript"):
        import_library(name)
    vit = run.vit
    size = sum(tensor.nbytes for tensor in vit.weights.values())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with redirect_stdout(io.StringIO()):
        program = torch.onnx.export(
            _Graph(vit).eval(),
            (check_images(vit.data),),
            input_names=["images"],
            output_names=[vit.output_name],
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
            opset_version=OPSET,
            dynamo=True,
        )
    assert program is not None  # with dynamo=True
    metadata = {"mean": vit.data.mean, "std": vit.data.std, "color": "RGB, 0 to 1 before mean and std"}
    if vit.classes:
        metadata["classes"] = json.dumps(vit.classes)
    program.model.metadata_props.update({key: str(value) for key, value in metadata.items()})
    program.save(str(folder / _file_name(vit)), external_data=size > MAX_EMBEDDED_BYTES)


def _max_difference(run: Exportable, folder: Path) -> float:
    vit = run.vit
    path = str(folder / _file_name(vit))
    import_library("onnx").checker.check_model(path)
    session = import_library("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    images = check_images(vit.data)
    differences = []
    for batch in (images, images[:1]):
        (outputs,) = session.run([vit.output_name], {"images": batch.numpy()})
        with torch.inference_mode():
            differences.append(relative_difference(torch.from_numpy(outputs), vit.forward(batch)))
    return max(differences)


def _usage(run: Exportable) -> str:
    vit, output = run.vit, run.vit.output_name
    side = vit.data.image_size
    return f"""\
import onnxruntime

session = onnxruntime.InferenceSession("OUT/{_file_name(vit)}", providers=["CPUExecutionProvider"])
({output},) = session.run(["{output}"], {{"images": images}})  # images: float32 array (B, 3, {side}, {side})
"""


ONNX = ExportFormat(_write, _max_difference, _usage, ("onnx",))
