"""Graphs of DALI operators that decode and augment images. The only module that imports DALI.

On a GPU, DALI decodes, resizes, flips and normalizes. On the CPU it only decodes, and `PipelineDef.postprocess` does
the rest with torch and numpy, because DALI's CPU resize takes several times as long. The GPU's graphs can be built with
CPU operators too, so that tests can compare their pixels with those of the CPU path.

Invariant: an image's pixels are a function of its bytes and crops alone: DALI draws no random numbers. They match
Pillow's (bicubic, antialiased) with a mean absolute difference below 0.5 of 255 levels.

Pixels are float32 in bf16 runs too: targets are computed from them, DALI has no bfloat16, and the patch embedding casts
its input.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from nvidia.dali import fn as dali_fn
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType

from pipeline.data.decode_options import DEVICE_PADDING, HOST_PADDING, DecodeOptions
from pipeline.data.pixels import known_good_jpeg, normalize, resize
from pipeline.errors import check_one_dali
from pipeline.recipe.sections import DataSection

check_one_dali()
fn: Any = dali_fn  # in DALI's stubs an operator returns a union that no operator accepts

Inputs = tuple[list[np.ndarray] | np.ndarray, ...]
"""Of n images: first a list of the encoded images, uint8 (bytes,); then int32 arrays (n, ...)."""


class PipelineDef(NamedTuple):
    """What to compute from the inputs of a batch."""

    num_dali_inputs: int
    """DALI reads the first ones of the batch's inputs; `postprocess` reads all."""
    build_graph: Callable
    """Connects DALI operators: takes a DataNode for each DALI input, returns the output's DataNode."""
    good_inputs: Inputs
    """Inputs of one image that every working decoder decodes."""
    image_shape: tuple[int, ...] | Callable[[Inputs], tuple[int, ...]] = ()
    """Shape of an image's pixels after `postprocess`, or a function of the batch's inputs that returns it."""
    postprocess: Callable[[Inputs, int, torch.Tensor, torch.Tensor], None] | None = None
    """None if DALI does everything. Otherwise: (inputs, row, image that DALI decoded for this row, (h, w, 3) uint8,
    out) -> None; writes the row's pixels to `out`, float32 of `image_shape`."""


def training_pipeline_def(
    data: DataSection,
    options: DecodeOptions,
    last_stage: Literal["decode", "augment"] = "augment",
    all_in_dali: bool | None = None,
) -> PipelineDef:
    """Decode the box of each image that contains all its crops; then crop, resize, flip and normalize.

    Inputs: encoded images; (x, y) and (width, height) of the box; then for each crop, with several crops,
    its (x, y) in the box and its (width, height), and always whether it is flipped.
    Output: (n, 3, H, W) float32, or (n, crops, 3, H, W) with several crops.

    Args:
        last_stage: "decode" stops after decoding and outputs only the boxes' shapes, for benchmarks.
        all_in_dali: Whether DALI does everything; None: on a GPU only.
    """
    num_crops, size = data.crops_per_image, [data.image_size, data.image_size]

    def augment(image, flip):
        return _normalize(fn.resize(image, size=size, **RESIZE_OPTIONS), data, mirror=flip)

    def decode_and_augment(encoded, anchor, extent, *crops):
        box = _decode_box(encoded, anchor, extent, options)
        if num_crops == 1:
            return augment(box, crops[0])
        views = []
        for first in range(0, 3 * num_crops, 3):
            xy, crop_extent, flip = crops[first : first + 3]
            views.append(augment(fn.slice(box, xy, crop_extent, axis_names="WH"), flip))
        return fn.stack(*views)

    def postprocess(inputs: Inputs, row: int, box: torch.Tensor, out: torch.Tensor) -> None:
        crops = [values[row].tolist() for values in inputs[3:]]
        if num_crops == 1:
            normalize(resize(box, size), data, out, flip=crops[0])
            return
        for crop in range(num_crops):
            (x, y), (w, h), flip = crops[3 * crop : 3 * crop + 3]
            normalize(resize(box[y : y + h, x : x + w], size), data, out[crop], flip)

    def decode(encoded, anchor, extent):
        return _decode_box(encoded, anchor, extent, options)

    good_box, unflipped = _good_box(), np.zeros(1, np.int32)
    whole_box = [np.zeros((1, 2), np.int32), good_box[2], unflipped]
    good_crops = [unflipped] if num_crops == 1 else num_crops * whole_box
    if last_stage == "decode":
        return PipelineDef(3, lambda *inputs: decode(*inputs).shape(), good_box)
    good_inputs = (*good_box, *good_crops)
    if options.backend == "mixed" if all_in_dali is None else all_in_dali:
        return PipelineDef(len(good_inputs), decode_and_augment, good_inputs)
    shape = (3, *size) if num_crops == 1 else (num_crops, 3, *size)
    return PipelineDef(3, decode, good_inputs, shape, postprocess)


def eval_pipeline_def(data: DataSection, options: DecodeOptions, all_in_dali: bool | None = None) -> PipelineDef:
    """Decode whole images, resize them, cut out a square and normalize.

    Inputs: encoded images; (height, width) to resize to; (x, y) of the square in the resized image.
    Output: (n, 3, H, W) float32.

    Args:
        all_in_dali: Whether DALI does everything; None: on a GPU only.
    """
    side = data.image_size

    def decode_and_crop(encoded, size, anchor):
        image = _decode_image(encoded, options)
        image = fn.resize(image, size=fn.cast(size, dtype=DALIDataType.FLOAT), **RESIZE_OPTIONS)
        return _normalize(fn.slice(image, anchor, np.array([side, side], np.int32), axis_names="WH"), data)

    def postprocess(inputs: Inputs, row: int, image: torch.Tensor, out: torch.Tensor) -> None:
        size, (x, y) = inputs[1][row].tolist(), inputs[2][row].tolist()
        normalize(resize(image, size)[y : y + side, x : x + side], data, out)

    good_inputs = ([known_good_jpeg()], np.array([[side, side]], np.int32), np.zeros((1, 2), np.int32))
    if options.backend == "mixed" if all_in_dali is None else all_in_dali:
        return PipelineDef(3, decode_and_crop, good_inputs)
    return PipelineDef(1, lambda encoded: _decode_image(encoded, options), good_inputs, (3, side, side), postprocess)


def placed_pipeline_def(data: DataSection, options: DecodeOptions, all_in_dali: bool | None = None) -> PipelineDef:
    """Decode whole images and place them on a canvas: flip, resize, crop, normalize, pad with zeros.

    The filter is Pillow's bilinear one, as in detectron2.

    Inputs: encoded images; whether to flip; (height, width) to resize to; (x, y) and (width, height) of the part of
    the resized image that is on the canvas; (height, width) of the canvas, the same for all images of a batch.
    Output: (n, 3, *canvas) float32.

    Args:
        all_in_dali: Whether DALI does everything; None: on a GPU only.
    """

    def decode_and_place(encoded, flip, size, corner, extent, canvas):
        image = fn.flip(_decode_image(encoded, options), horizontal=flip)
        size = fn.cast(size, dtype=DALIDataType.FLOAT)
        image = fn.resize(image, size=size, interp_type=DALIInterpType.INTERP_LINEAR, antialias=True)
        image = _normalize(fn.slice(image, corner, extent, axis_names="WH"), data)
        return fn.pad(image, axis_names="HW", shape=canvas, fill_value=0.0)

    def postprocess(inputs: Inputs, row: int, image: torch.Tensor, out: torch.Tensor) -> None:
        flip, size, (x, y), (width, height) = (values[row].tolist() for values in inputs[1:5])
        if flip:
            image = image.flip(1)
        image = resize(image, size, mode="bilinear")[y : y + height, x : x + width]
        out.zero_()
        normalize(image, data, out[:, :height, :width])

    square = np.full((1, 2), data.image_size, np.int32)
    good_inputs = ([known_good_jpeg()], np.zeros(1, np.int32), square, np.zeros((1, 2), np.int32), square, square)
    if options.backend == "mixed" if all_in_dali is None else all_in_dali:
        return PipelineDef(6, decode_and_place, good_inputs)
    return PipelineDef(
        1,
        lambda encoded: _decode_image(encoded, options),
        good_inputs,
        lambda inputs: (3, *inputs[5][0].tolist()),
        postprocess,
    )


def decode_boxes(inputs: Inputs, options: DecodeOptions, device: torch.device, threads: int = 1) -> list[np.ndarray]:
    """Decode a box of each image, in one batch, for checks of a decoder.

    Args:
        inputs: The first three inputs of `training_pipeline_def`.

    Returns:
        Pixels on the host, (height, width, 3) uint8 each.

    Raises:
        RuntimeError: If DALI fails; see `error_reason`.
    """

    def build_graph(encoded, anchor, extent):
        return _decode_box(encoded, anchor, extent, options)

    pipeline_def = PipelineDef(3, build_graph, _good_box())
    pipeline = build_pipeline(pipeline_def, lambda: inputs[:3], len(inputs[0]), device, threads, prefetch=1)
    (boxes,) = pipeline.run()
    boxes = boxes.as_cpu()
    return [np.array(boxes[row]) for row in range(len(boxes))]


def build_pipeline(
    pipeline_def: PipelineDef,
    feed: Callable[[], Sequence],
    batch_size: int,
    device: torch.device,
    threads: int,
    prefetch: int,
) -> Pipeline:
    """Build a pipeline that calls `feed` for its inputs, up to `prefetch` batches ahead."""
    on_gpu = device.type == "cuda"
    pipeline = Pipeline(
        batch_size=batch_size,
        num_threads=threads,
        device_id=device.index if on_gpu else None,
        prefetch_queue_depth=prefetch,
        exec_dynamic=True,  # an output stays valid while it is referenced
    )
    with pipeline:
        inputs = fn.external_source(
            source=feed,
            num_outputs=pipeline_def.num_dali_inputs,
            batch=True,
            dtype=[DALIDataType.UINT8] + (pipeline_def.num_dali_inputs - 1) * [DALIDataType.INT32],
            # On a GPU DALI copies the inputs: kernels may still read them after `run` has returned their batch. The
            # copy (4 ms for 512 photographs) runs in the decoding thread.
            no_copy=not on_gpu,
        )
        pipeline.set_outputs(pipeline_def.build_graph(*inputs))
    pipeline.build()
    return pipeline


def error_reason(error: Exception) -> str:
    """Return what went wrong, on one line, without DALI's trace of the pipeline's definition."""
    message = str(error).rpartition("encountered:")[2].partition("Current pipeline object")[0]
    return f"DALI: {' '.join(message.split())}"


RESIZE_OPTIONS = {"interp_type": DALIInterpType.INTERP_CUBIC, "antialias": True}


def _decode_box(encoded, anchor, extent, options: DecodeOptions):
    if options.roi:
        return fn.decoders.image_slice(encoded, anchor, extent, axis_names="WH", **_decoder_arguments(options))
    return fn.slice(_decode_image(encoded, options), anchor, extent, axis_names="WH")


def _decode_image(encoded, options: DecodeOptions):
    return fn.decoders.image(encoded, **_decoder_arguments(options))


def _decoder_arguments(options: DecodeOptions) -> dict:
    arguments = {
        "device": options.backend,
        "output_type": DALIImageType.RGB,
        "jpeg_fancy_upsampling": True,  # as libjpeg-turbo and Pillow
        "adjust_orientation": False,  # the shard builder applies the EXIF orientation
    }
    if options.backend == "mixed":
        arguments |= {
            "hw_decoder_load": options.hw_decoder_load,
            "device_memory_padding": DEVICE_PADDING,
            "host_memory_padding": HOST_PADDING,
        }
    return arguments


def _normalize(image, data: DataSection, **options):
    return fn.crop_mirror_normalize(
        image,
        **options,
        dtype=DALIDataType.FLOAT,
        output_layout="CHW",
        mean=[255 * value for value in data.mean],
        std=[255 * value for value in data.std],
    )


def _good_box() -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Return the inputs to decode half of a good image."""
    return [known_good_jpeg()], np.array([[16, 0]], np.int32), np.array([[32, 48]], np.int32)
