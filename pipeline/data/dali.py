"""DALI: encoded images in, float32 pixels on the device out. The only module that imports it.

    source (PrefetchThread)  batches with encoded images and crops, built in advance
      -> DALI pipeline       decodes in its own threads; on a GPU it also resizes, flips and normalizes
      -> postprocess         on the CPU: torch resizes and numpy normalizes in a thread pool, because DALI's
                             CPU resize takes several times as long
      -> Decoder.next()

Invariant: an image's pixels are a function of its bytes and crops alone: DALI draws no random numbers, and an
undecodable image changes no other image of its batch. They match Pillow's (bicubic, antialiased) with a mean
absolute difference below 0.5 of 255 levels.

DALI fails on a whole batch if one of its images cannot be decoded, and a failed pipeline is unusable. `Decoder`
then decodes each image of the batches in flight alone, lets `replace` substitute those that fail, and runs the
same batches through a new pipeline.

Pixels are float32 in bf16 runs too: targets are computed from them, DALI has no bfloat16, and the patch
embedding casts its input.
"""

import atexit
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from nvidia.dali import fn as dali_fn
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType

from pipeline.data.pixels import normalize, resize, single_threaded
from pipeline.data.prefetch_thread import PrefetchThread
from pipeline.recipe.sections import DataSection

fn: Any = dali_fn  # in DALI's stubs an operator returns a union that no operator accepts

Inputs = tuple[list[np.ndarray] | np.ndarray, ...]
"""Of n images: first a list of the encoded images, uint8 (bytes,); then int32 arrays (n, ...)."""


class PipelineInput(Protocol):
    """A batch to decode."""

    def inputs(self, rows: slice = slice(None)) -> Inputs:
        """Return the inputs of these images of the batch, in the order that the PipelineDef expects."""
        ...


class PipelineDef(NamedTuple):
    """What to compute from the inputs of a batch."""

    num_dali_inputs: int
    """DALI reads the first ones of the batch's inputs; `postprocess` reads all."""
    build_graph: Callable
    """Connects DALI operators: takes a DataNode for each DALI input, returns the output's DataNode."""
    image_shape: tuple[int, ...] | Callable[[Inputs], tuple[int, ...]] = ()
    """Shape of an image's pixels after `postprocess`, or a function of the batch's inputs that returns it."""
    postprocess: Callable[[Inputs, int, torch.Tensor, torch.Tensor], None] | None = None
    """None on a GPU. On the CPU: (inputs, row, image that DALI decoded for this row, (h, w, 3) uint8, out)
    -> None; writes the row's pixels to `out`, float32 of `image_shape`."""


BatchT = TypeVar("BatchT", bound=PipelineInput)


class Decoder(Generic[BatchT]):
    """Decodes the batches of a source in order, `prefetch` batches ahead.

    Args:
        source: batches of at most `batch_size` images; stopped by `close`.
        replace: (batch, row, reason) -> the batch with another image in the row that DALI cannot decode.
        threads: decoding threads; on the CPU as many again for `postprocess`.
    """

    def __init__(
        self,
        pipeline_def: PipelineDef,
        source: PrefetchThread[BatchT],
        replace: Callable[[BatchT, int, str], BatchT],
        batch_size: int,
        device: torch.device,
        threads: int,
        prefetch: int,
    ):
        self._def, self._source, self._replace, self._device = pipeline_def, source, replace, device
        self._in_flight: deque[tuple[BatchT, Inputs]] = deque()  # fed to DALI, not yet decoded
        self._resubmit: deque[BatchT] = deque()  # to be fed again after an error, before new batches
        self._build = lambda: _build_pipeline(pipeline_def, self._feed, batch_size, device, threads, prefetch)
        self._pipeline: Pipeline | None = self._build()
        self._single_inputs: Inputs = ()
        self._single_pipeline: Pipeline | None = None
        self._postprocess_thread: PrefetchThread[tuple[BatchT, torch.Tensor]] | None = None
        if pipeline_def.postprocess:
            self._threads = threads
            self._pool = ThreadPoolExecutor(threads, initializer=single_threaded)
            self._postprocess_thread = PrefetchThread(self._postprocessed(pipeline_def.postprocess), prefetch)
        atexit.register(self.close)  # a thread running DALI at interpreter exit would abort the process

    def next(self) -> tuple[BatchT, torch.Tensor]:
        """Return the next batch and its images, float32 on the device.

        Raises:
            StopIteration: After the last batch.
            RuntimeError: If DALI fails on a batch, but on none of its images alone.
            Exception: What the source or `replace` raised, after the batches before it.
        """
        try:
            if self._postprocess_thread:
                return self._postprocess_thread.get()
            batch, _, decoded = self._decode()
        except StopIteration:
            for thread in (self._postprocess_thread, self._source):
                if thread and thread.error:
                    raise thread.error from None
            raise
        images = torch.from_dlpack(decoded.as_tensor())
        # DALI may reuse the memory once `decoded` is freed; the copy is on DALI's stream, torch's current one.
        return batch, images.clone() if self._device.type == "cuda" else images

    def close(self) -> None:
        """Stop the source and free DALI's pipelines."""
        atexit.unregister(self.close)
        self._source.stop()
        if self._postprocess_thread:
            self._postprocess_thread.close()
            self._pool.shutdown()
        self._pipeline = self._single_pipeline = None

    def _postprocessed(self, postprocess: Callable) -> Iterator[tuple[BatchT, torch.Tensor]]:
        """Yield decoded batches after `postprocess`, in a thread of their own."""
        while True:
            try:
                batch, inputs, decoded = self._decode()
            except StopIteration:
                return
            shape = self._def.image_shape
            images = torch.empty(len(decoded), *(shape(inputs) if callable(shape) else shape))

            def postprocess_rows(first: int, inputs=inputs, decoded=decoded, images=images) -> None:
                for row in range(first, len(decoded), self._threads):
                    postprocess(inputs, row, torch.from_dlpack(decoded[row]), images[row])

            list(self._pool.map(postprocess_rows, range(self._threads)))
            yield batch, images

    def _decode(self) -> tuple[BatchT, Inputs, Any]:
        """Return the next batch, its inputs and DALI's output for it, a TensorList."""
        on_gpu = self._device.type == "cuda"
        stream = torch.cuda.current_stream(self._device) if on_gpu else None
        while True:
            assert self._pipeline is not None
            try:
                (decoded,) = self._pipeline.run(stream)
                return *self._in_flight.popleft(), decoded
            except RuntimeError as error:
                self._recover(error)

    def _feed(self) -> Inputs:
        """Return DALI's inputs of the next batch; DALI calls this up to `prefetch` batches ahead."""
        batch = self._resubmit.popleft() if self._resubmit else self._source.get()
        inputs = batch.inputs()
        self._in_flight.append((batch, inputs))  # also keeps the arrays alive, which DALI reads in place
        return inputs[: self._def.num_dali_inputs]

    def _recover(self, error: RuntimeError) -> None:
        """Replace the undecodable images of the batches in flight and submit these to a new pipeline."""
        self._pipeline = None
        batches = [*(batch for batch, _ in self._in_flight), *self._resubmit]
        replaced = [self._replace_undecodable(batch) for batch in batches]
        if all(before is after for before, after in zip(batches, replaced, strict=True)):
            raise error
        self._in_flight.clear()
        self._resubmit = deque(replaced)
        self._pipeline = self._build()

    def _replace_undecodable(self, batch: BatchT) -> BatchT:
        for row in range(len(batch.inputs()[0])):
            while reason := self._decode_error(batch.inputs(slice(row, row + 1))):
                batch = self._replace(batch, row, reason)
        return batch

    def _decode_error(self, inputs: Inputs) -> str | None:
        """Decode a single image; return DALI's error message, or None."""
        self._single_inputs = inputs[: self._def.num_dali_inputs]
        if self._single_pipeline is None:
            self._single_pipeline = _build_pipeline(
                self._def, lambda: self._single_inputs, batch_size=1, device=self._device, threads=1, prefetch=1
            )
        try:
            self._single_pipeline.run()
        except RuntimeError as error:
            self._single_pipeline = None  # unusable after an error
            message = str(error).rpartition("encountered:")[2].partition("Current pipeline object")[0]
            return f"DALI: {' '.join(message.split())}"
        return None


def training_pipeline_def(
    data: DataSection, on_gpu: bool, last_stage: Literal["decode", "augment"] = "augment"
) -> PipelineDef:
    """Decode the box of each image that contains all its crops; then crop, resize, flip and normalize.

    Inputs: encoded images; (x, y) and (width, height) of the box; then for each crop, with several crops,
    its (x, y) in the box and its (width, height), and always whether it is flipped.
    Output: (n, 3, H, W) float32, or (n, crops, 3, H, W) with several crops.

    Args:
        last_stage: "decode" stops after decoding and outputs only the boxes' shapes, for benchmarks.
    """
    num_crops, size = data.crops_per_image, [data.image_size, data.image_size]

    def decode(encoded, anchor, extent):
        return fn.decoders.image_slice(encoded, anchor, extent, axis_names="WH", **_decoder_options(on_gpu))

    def augment(image, flip):
        return _normalize(fn.resize(image, size=size, **RESIZE_OPTIONS), data, mirror=flip)

    def decode_and_augment(encoded, anchor, extent, *crops):
        box = decode(encoded, anchor, extent)
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

    if last_stage == "decode":
        return PipelineDef(3, lambda *inputs: decode(*inputs).shape())
    if on_gpu:
        return PipelineDef(4 if num_crops == 1 else 3 + 3 * num_crops, decode_and_augment)
    return PipelineDef(3, decode, (3, *size) if num_crops == 1 else (num_crops, 3, *size), postprocess)


def eval_pipeline_def(data: DataSection, on_gpu: bool) -> PipelineDef:
    """Decode whole images, resize them, cut out a square and normalize.

    Inputs: encoded images; (height, width) to resize to; (x, y) of the square in the resized image.
    Output: (n, 3, H, W) float32.
    """
    side = data.image_size

    def decode(encoded):
        return fn.decoders.image(encoded, **_decoder_options(on_gpu))

    def decode_and_crop(encoded, size, anchor):
        image = fn.resize(decode(encoded), size=fn.cast(size, dtype=DALIDataType.FLOAT), **RESIZE_OPTIONS)
        return _normalize(fn.slice(image, anchor, np.array([side, side], np.int32), axis_names="WH"), data)

    def postprocess(inputs: Inputs, row: int, image: torch.Tensor, out: torch.Tensor) -> None:
        size, (x, y) = inputs[1][row].tolist(), inputs[2][row].tolist()
        normalize(resize(image, size)[y : y + side, x : x + side], data, out)

    return PipelineDef(3, decode_and_crop) if on_gpu else PipelineDef(1, decode, (3, side, side), postprocess)


def placed_pipeline_def(data: DataSection, on_gpu: bool) -> PipelineDef:
    """Decode whole images and place them on a canvas: flip, resize, crop, normalize, pad with zeros.

    The filter is Pillow's bilinear one, as in detectron2.

    Inputs: encoded images; whether to flip; (height, width) to resize to; (x, y) and (width, height) of the part of
    the resized image that is on the canvas; (height, width) of the canvas, the same for all images of a batch.
    Output: (n, 3, *canvas) float32.
    """

    def decode(encoded):
        return fn.decoders.image(encoded, **_decoder_options(on_gpu))

    def decode_and_place(encoded, flip, size, corner, extent, canvas):
        image = fn.flip(decode(encoded), horizontal=flip)
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

    if on_gpu:
        return PipelineDef(6, decode_and_place)
    return PipelineDef(1, decode, lambda inputs: (3, *inputs[5][0].tolist()), postprocess)


RESIZE_OPTIONS = {"interp_type": DALIInterpType.INTERP_CUBIC, "antialias": True}


def _decoder_options(on_gpu: bool) -> dict:
    return {
        "device": "mixed" if on_gpu else "cpu",  # mixed: on the GPU, with its hardware JPEG decoder if it has one
        "output_type": DALIImageType.RGB,
        "jpeg_fancy_upsampling": True,  # as libjpeg-turbo and Pillow
        "adjust_orientation": False,  # the shard builder applies the EXIF orientation
    }


def _normalize(image, data: DataSection, **options):
    return fn.crop_mirror_normalize(
        image,
        **options,
        dtype=DALIDataType.FLOAT,
        output_layout="CHW",
        mean=[255 * value for value in data.mean],
        std=[255 * value for value in data.std],
    )


def _build_pipeline(
    pipeline_def: PipelineDef,
    feed: Callable[[], Inputs],
    batch_size: int,
    device: torch.device,
    threads: int,
    prefetch: int,
) -> Pipeline:
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
            no_copy=not on_gpu,  # a GPU may still read the inputs after its batch is returned
        )
        pipeline.set_outputs(pipeline_def.build_graph(*inputs))
    pipeline.build()
    return pipeline
