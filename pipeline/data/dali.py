"""DALI: encoded images in, pixels on the device out. The only file that imports it.

Invariant: DALI decides nothing. It is given each image's bytes and where to cut it; the same inputs give the
same pixels, Pillow's (bicubic, antialiased) to less than half a level of 255 on average. An image that DALI
cannot decode costs its batch nothing: it is found, replaced by whoever feeds the decoder, and every other
image of the batch comes out as if nothing had been.

On a GPU DALI does everything. On the CPU it decodes, and `pixels` resizes and normalises, in as many threads:
DALI's own resize takes several times as long there.

The pixels are float32 whatever the model's precision: targets are computed from them, DALI has no bfloat16,
and the patch embedding casts them anyway.
"""

import atexit
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types

from pipeline.data.pixels import normalize, resize, single_threaded
from pipeline.data.prefetch_thread import PrefetchThread
from pipeline.recipe.sections import DataSection


class PipelineInput(Protocol):
    """A batch for the decoder."""

    def inputs(self, rows: slice = slice(None)) -> tuple[Sequence[np.ndarray], ...]:
        """Of some of its images: the encoded ones, uint8 (bytes,) each, then the graph's other inputs, int32,
        a row an image."""


class PipelineDef(NamedTuple):
    """What is computed."""

    num_inputs: int
    """The first so many of a batch's inputs go to DALI."""
    build: Callable
    """Connects DALI's operators from these inputs to the output."""
    shape: tuple[int, ...] = ()
    """Of the pixels of an image."""
    postprocess: Callable[[tuple, int, torch.Tensor, torch.Tensor], None] | None = None
    """On the CPU: given the batch's inputs, a row in them and what DALI decoded for it, (h, w, 3) uint8,
    writes its pixels into the last argument, float32 of `shape`."""


T = TypeVar("T", bound=PipelineInput)


class Decoder(Generic[T]):
    """Decodes the batches of a source in their order, `prefetch` of them ahead."""

    def __init__(
        self,
        pipeline_def: PipelineDef,
        source: PrefetchThread[T],
        replace: Callable[[T, int, str], T],
        batch: int,
        device: torch.device,
        threads: int,
        prefetch: int,
    ):
        """source: the batches, of at most `batch` images. replace: given a batch, the row of an image that
        DALI cannot decode and why, returns the batch with another image there, or raises."""
        self._graph, self._source, self._replace, self._device = pipeline_def, source, replace, device
        self._in_flight: deque[tuple[T, tuple]] = deque()
        self._again: deque[T] = deque()
        self._probe: Pipeline | None = None
        self._build = lambda: _pipeline(pipeline_def, self._feed, batch, device, threads, prefetch)
        self._pipeline: Pipeline | None = self._build()
        self._finished: PrefetchThread | None = None
        if pipeline_def.postprocess:
            self._threads = threads
            self._pool = ThreadPoolExecutor(threads, initializer=single_threaded)
            self._finished = PrefetchThread(self._postprocess(), prefetch)
        atexit.register(self.close)  # a thread that still runs DALI when the interpreter ends would abort it

    def next(self) -> tuple[T, torch.Tensor]:
        """The next batch and its images. StopIteration at the end, RuntimeError where DALI fails on a batch
        but on none of its images."""
        if self._finished is None:
            item, _, decoded = self._decode()
            images = torch.from_dlpack(decoded.as_tensor())
            # A copy on a GPU costs nothing and leaves no doubt whose memory it is; DALI uses torch's stream.
            return item, images.clone() if self._device.type == "cuda" else images
        try:
            return self._finished.take()
        except StopIteration:
            if self._finished.failure:
                raise self._finished.failure from None
            raise

    def close(self) -> None:
        """Stops the source, too."""
        atexit.unregister(self.close)
        self._source.stop()
        if self._finished:
            self._finished.close()
            self._pool.shutdown()
        self._pipeline = self._probe = None

    def _postprocess(self) -> Iterator[tuple[T, torch.Tensor]]:
        """On the CPU, in a thread of its own: what DALI has decoded, resized and normalised."""
        while True:
            try:
                item, inputs, decoded = self._decode()
            except StopIteration:
                return
            images = torch.empty(len(decoded), *self._graph.shape)

            def postprocess(first: int, inputs=inputs, decoded=decoded, images=images) -> None:
                for row in range(first, len(decoded), self._threads):
                    self._graph.postprocess(inputs, row, torch.from_dlpack(decoded[row]), images[row])

            list(self._pool.map(postprocess, range(self._threads)))
            yield item, images

    def _decode(self) -> tuple[T, tuple, object]:
        """The next batch, its inputs, and what DALI put out for it."""
        on_gpu = self._device.type == "cuda"
        stream = torch.cuda.current_stream(self._device) if on_gpu else None
        while True:
            try:
                (decoded,) = self._pipeline.run(stream)
                break
            except RuntimeError as error:
                self._recover(error)
        return *self._in_flight.popleft(), decoded

    def _feed(self) -> tuple:
        item = self._again.popleft() if self._again else self._source.take()
        inputs = item.inputs()
        self._in_flight.append((item, inputs))  # DALI reads the arrays in place
        return inputs[: self._graph.num_inputs]

    def _recover(self, error: RuntimeError) -> None:
        """Find what cannot be decoded in the batches on their way, replace it, and begin anew with them."""
        self._pipeline = None
        waiting = [*(item for item, _ in self._in_flight), *self._again]
        mended = [self._replace_undecodable(item) for item in waiting]
        if all(before is after for before, after in zip(waiting, mended, strict=True)):
            raise error
        self._in_flight.clear()
        self._again = deque(mended)
        self._pipeline = self._build()

    def _replace_undecodable(self, item: T) -> T:
        for row in range(len(item.inputs()[0])):
            while reason := self._failure(item.inputs(slice(row, row + 1))):
                item = self._replace(item, row, reason)
        return item

    def _failure(self, inputs: tuple) -> str | None:
        """Why DALI cannot decode a single image; None where it can."""
        self._single = inputs
        if self._probe is None:
            self._probe = _pipeline(
                self._graph,
                lambda: self._single[: self._graph.num_inputs],
                1,
                self._device,
                threads=1,
                prefetch=1,
            )
        try:
            self._probe.run()
        except RuntimeError as error:
            self._probe = None  # a pipeline that has failed once is of no use
            return _reason(error)
        return None


def training_pipeline_def(data: DataSection, on_gpu: bool, last: str = "augment") -> PipelineDef:
    """Decode a box of each image, cut its crops out of it, resize, mirror, normalise.

    Inputs: encoded, the box's (x, y) and (width, height); then for each crop its (x, y) inside that box and
    (width, height), which a single crop has not, and whether it is mirrored. Output: (n, 3, H, W) float32, or
    (n, crops, 3, H, W). last: "decode" gives no more than the decoded boxes' shapes, to measure it.
    """
    crops, size = data.crops_per_image, [data.image_size, data.image_size]
    shape = (3, *size) if crops == 1 else (crops, 3, *size)

    def decode(encoded, anchor, extent):
        return fn.decoders.image_slice(encoded, anchor, extent, axis_names="WH", **_decoding(on_gpu))

    def build(encoded, anchor, extent, *views):
        box = decode(encoded, anchor, extent)
        if crops == 1:
            return _augmented(box, size, views[0], data)
        cut = [
            _augmented(fn.slice(box, *views[at : at + 2], axis_names="WH"), size, views[at + 2], data)
            for at in range(0, 3 * crops, 3)
        ]
        return fn.stack(*cut)

    def postprocess(inputs: tuple, row: int, box: torch.Tensor, out: torch.Tensor) -> None:
        views = [view[row].tolist() for view in inputs[3:]]
        if crops == 1:
            normalize(resize(box, size), data, out, mirror=views[0])
            return
        for crop in range(crops):
            (x, y), (w, h), mirror = views[3 * crop : 3 * crop + 3]
            normalize(resize(box[y : y + h, x : x + w], size), data, out[crop], mirror)

    if last == "decode":
        return PipelineDef(3, lambda *inputs: decode(*inputs).shape())
    if on_gpu:
        return PipelineDef(4 if crops == 1 else 3 + 3 * crops, build)
    return PipelineDef(3, decode, shape, postprocess)


def eval_pipeline_def(data: DataSection, on_gpu: bool) -> PipelineDef:
    """Decode each image whole, resize it, cut a square out of it, normalise.

    Inputs: encoded, the size it takes (height, width), the square's (x, y) in it. Output: (n, 3, H, W)
    float32.
    """
    side = data.image_size

    def decode(encoded):
        return fn.decoders.image(encoded, **_decoding(on_gpu))

    def build(encoded, size, anchor):
        image = fn.resize(decode(encoded), size=fn.cast(size, dtype=types.FLOAT), **RESIZE)
        square = np.array([side, side], np.int32)
        return _normalized(fn.slice(image, anchor, square, axis_names="WH"), None, data)

    def postprocess(inputs: tuple, row: int, image: torch.Tensor, out: torch.Tensor) -> None:
        size, (x, y) = inputs[1][row].tolist(), inputs[2][row].tolist()
        normalize(resize(image, size)[y : y + side, x : x + side], data, out)

    return PipelineDef(3, build) if on_gpu else PipelineDef(1, decode, (3, side, side), postprocess)


RESIZE = {"interp_type": types.INTERP_CUBIC, "antialias": True}


def _decoding(on_gpu: bool) -> dict:
    return {
        "device": "mixed" if on_gpu else "cpu",
        "output_type": types.RGB,
        "jpeg_fancy_upsampling": True,  # as libjpeg-turbo, and so Pillow, does on the CPU
        "adjust_orientation": False,  # orientation is the shard builder's business
    }


def _augmented(image, size: list[int], mirror, data: DataSection):
    return _normalized(fn.resize(image, size=size, **RESIZE), mirror, data)


def _normalized(image, mirror, data: DataSection):
    return fn.crop_mirror_normalize(
        image,
        **({} if mirror is None else {"mirror": mirror}),
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[255 * value for value in data.mean],
        std=[255 * value for value in data.std],
    )


def _pipeline(
    pipeline_def: PipelineDef, feed: Callable, batch: int, device: torch.device, threads: int, prefetch: int
) -> Pipeline:
    on_gpu = device.type == "cuda"
    pipeline = Pipeline(
        batch_size=batch,
        num_threads=threads,
        device_id=device.index if on_gpu else None,
        prefetch_queue_depth=prefetch,
        exec_dynamic=True,  # outputs stay as long as somebody refers to them
    )
    with pipeline:
        inputs = fn.external_source(
            source=feed,
            num_outputs=pipeline_def.num_inputs,
            batch=True,
            dtype=[types.UINT8] + (pipeline_def.num_inputs - 1) * [types.INT32],
            no_copy=not on_gpu,  # a GPU may still read them when the batch is handed out
        )
        pipeline.set_outputs(pipeline_def.build(*inputs))
    pipeline.build()
    return pipeline


def _reason(error: RuntimeError) -> str:
    """What DALI says went wrong, without where in the graph."""
    reason = str(error).rpartition("encountered:")[2].partition("Current pipeline object")[0]
    return f"DALI: {' '.join(reason.split())}"
