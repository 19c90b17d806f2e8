"""Decoding in the background: batches of encoded images in, float32 pixels on the device out.

    source (PrefetchThread)  batches with encoded images and crops, built in advance
      -> DALI pipeline       decodes in its own threads; on a GPU it also resizes, flips and normalizes
      -> decoding thread     runs the pipeline; on the CPU it resizes and normalizes with a pool of threads, on a GPU it
                             works on a CUDA stream of its own
      -> ImageDecoder.next() on a GPU makes the current stream wait for the batch, but not the host

Invariant: batches come in the order of the source, and an undecodable image changes no other image of its batch.

DALI fails on a whole batch if one of its images cannot be decoded, and a failed pipeline is unusable. `ImageDecoder`
then decodes each image of the batches in flight alone, lets `replace` substitute those that fail, and runs the same
batches through a new pipeline.

A failure of the device is never attributed to images. Whenever an image fails, a known-good one is decoded too. If that
fails as well, or memory runs out, or more than MAX_ONLY_PILLOW_DECODES images of a batch fail that Pillow decodes, an
error about the device is raised and `confirm` is not called.
"""

import atexit
import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch

from pipeline.data.dali import Inputs, PipelineDef, build_pipeline, error_reason
from pipeline.data.pixels import can_decode, jpeg_size, limit_torch_to_calling_thread
from pipeline.data.prefetch_thread import PrefetchThread
from pipeline.distributed.hardware import device_name
from pipeline.distributed.launch import node_name
from pipeline.errors import DeviceError, UserError

MAX_ONLY_PILLOW_DECODES = 3
"""Images of a batch that DALI may reject although Pillow decodes them; with more, the device has failed."""
OUT_OF_MEMORY = re.compile(
    r"out of memory|insufficient memory|bad_?alloc|memory ?allocation|fail\w* to allocate|can't allocate|"
    r"alloc\w*[ _]fail",
    re.IGNORECASE,
)
"""Matches the messages of the C++ library, CUDA, nvJPEG and DALI."""


class PipelineInput(Protocol):
    """A batch to decode."""

    def inputs(self, rows: slice = slice(None)) -> Inputs:
        """Return the inputs of these images of the batch, in the order that the PipelineDef expects."""
        ...


BatchT = TypeVar("BatchT", bound=PipelineInput)


class ImageDecoder(Generic[BatchT]):
    """Decodes the batches of a source in order, `prefetch` batches ahead.

    Args:
        source: Batches of at most `batch_size` images; stopped by `close`.
        replace: (batch, row, reason) -> the batch with another image in the row that DALI cannot decode.
        threads: Decoding threads; on the CPU as many again for `postprocess`.
        confirm: Called when a new pipeline has decoded all batches in which images were replaced.
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
        confirm: Callable[[], None] = lambda: None,
    ):
        self._def, self._source, self._replace, self._confirm = pipeline_def, source, replace, confirm
        self._device, self._threads = device, threads
        self._in_flight: deque[tuple[BatchT, Inputs]] = deque()  # fed to DALI, not yet decoded
        self._resubmit: deque[BatchT] = deque()  # to be fed again after an error, before new batches
        self._num_unconfirmed = 0  # resubmitted batches that are not yet decoded
        self._batch_size, self._prefetch = batch_size, prefetch
        self._pipeline: Any = self._build()
        self._single_inputs: Inputs = ()
        self._single_pipeline: Any = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool: ThreadPoolExecutor | None = None
        if pipeline_def.postprocess:
            self._pool = ThreadPoolExecutor(threads, initializer=limit_torch_to_calling_thread)
        # DALI itself holds `prefetch` batches; without `postprocess` those are the finished ones.
        self._thread = PrefetchThread(self._decoded_batches(), prefetch if self._pool else 1)
        atexit.register(self.close)  # a thread running DALI at interpreter exit would abort the process

    def next(self) -> tuple[BatchT, torch.Tensor]:
        """Return the next batch and its images, float32 on the device.

        Raises:
            StopIteration: After the last batch.
            DeviceError: If the device failed, not an image.
            UserError: If the device has not enough memory.
            Exception: What the source or `replace` raised, after the batches before it.
        """
        try:
            batch, images, decoded = self._thread.get()
        except StopIteration:
            error = self._thread.error or self._source.error
            if error is None:
                raise
            raise error from error.__cause__  # without StopIteration as its context
        if decoded is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(decoded)
            if images.is_cuda:
                images.record_stream(stream)  # it was allocated on the decoding thread's stream
        return batch, images

    def close(self) -> None:
        """Stop the source and free DALI's pipelines."""
        atexit.unregister(self.close)
        self._source.stop()
        self._thread.close()
        if self._pool:
            self._pool.shutdown()
        self._pipeline = self._single_pipeline = None

    def _decoded_batches(self) -> Iterator[tuple[BatchT, torch.Tensor, torch.cuda.Event | None]]:
        """Yield batches, their pixels, and the event after which these are complete, in a thread of their own."""
        if self._stream:
            torch.cuda.set_stream(self._stream)  # of this thread only
        while True:
            try:
                batch, inputs, output = self._decode()
            except StopIteration:
                return
            event = None
            if self._pool:
                images = self._postprocess(self._pool, inputs, output)
            else:
                images = torch.from_dlpack(output.as_tensor())
            if self._stream:
                # DALI frees its memory in the order of this stream, on which the model does not work; torch frees the
                # copy after the model.
                images = images.clone()
                event = torch.cuda.Event()
                event.record()
            del output
            self._confirm_replaced(event)
            yield batch, images, event

    def _postprocess(self, pool: ThreadPoolExecutor, inputs: Inputs, decoded: Any) -> torch.Tensor:
        assert self._def.postprocess
        postprocess = self._def.postprocess
        shape = self._def.image_shape
        images = torch.empty(len(decoded), *(shape(inputs) if callable(shape) else shape))

        def postprocess_rows(first: int) -> None:
            for row in range(first, len(decoded), self._threads):
                postprocess(inputs, row, torch.from_dlpack(decoded[row]), images[row])

        list(pool.map(postprocess_rows, range(self._threads)))
        return images

    def _build(self) -> Any:
        """Build the pipeline, which allocates the decoders' buffers."""
        try:
            return build_pipeline(self._def, self._feed, self._batch_size, self._device, self._threads, self._prefetch)
        except (RuntimeError, MemoryError) as error:
            reason = error_reason(error)
            if not OUT_OF_MEMORY.search(reason):
                raise
            raise self._out_of_memory_error(reason, f"the buffers of {self._threads} decoding threads") from error

    def _decode(self) -> tuple[BatchT, Inputs, Any]:
        """Return the next batch, its inputs and DALI's output for it, a TensorList."""
        while True:
            try:
                (output,) = self._pipeline.run(self._stream)
                return *self._in_flight.popleft(), output
            except RuntimeError as error:
                # Without its traceback, whose frames would keep the failed pipeline and its memory alive.
                failure = error.with_traceback(None)
            self._pipeline = None
            self._recover(failure)

    def _feed(self) -> Inputs:
        """Return DALI's inputs of the next batch; DALI calls this up to `prefetch` batches ahead."""
        batch = self._resubmit.popleft() if self._resubmit else self._source.get()
        inputs = batch.inputs()
        self._in_flight.append((batch, inputs))  # also keeps the arrays alive, which DALI reads in place on the CPU
        return inputs[: self._def.num_dali_inputs]

    def _recover(self, failure: RuntimeError) -> None:
        """Replace the undecodable images of the batches in flight and submit these to a new pipeline."""
        reason = error_reason(failure)
        batches = [*(batch for batch, _ in self._in_flight), *self._resubmit]
        try:
            if OUT_OF_MEMORY.search(reason):
                raise self._out_of_memory_error(reason, _describe([i for batch in batches for i in batch.inputs()[0]]))
            replaced = [self._replace_undecodable(batch) for batch in batches]
            if all(before is after for before, after in zip(batches, replaced, strict=True)):
                raise self._device_error(f"decodes each image of a batch alone, but not the batch: {reason}")
        except DeviceError as error:
            raise error from failure
        finally:
            self._single_pipeline = None
        self._in_flight.clear()
        self._resubmit = deque(replaced)
        self._num_unconfirmed = len(replaced)
        self._pipeline = self._build()

    def _replace_undecodable(self, batch: BatchT) -> BatchT:
        only_pillow_decodes = 0
        for row in range(len(batch.inputs()[0])):
            while reason := self._find_image_error(inputs := batch.inputs(slice(row, row + 1))):
                only_pillow_decodes += can_decode(inputs[0][0])
                if only_pillow_decodes > MAX_ONLY_PILLOW_DECODES:
                    raise self._device_error(
                        f"does not decode {only_pillow_decodes} images of a batch that Pillow decodes: {reason}"
                    )
                batch = self._replace(batch, row, reason)
        return batch

    def _find_image_error(self, inputs: Inputs) -> str | None:
        """Return why this image alone cannot be decoded, or None if it can. Raise if the device is the reason."""
        reason = self._decode_single(inputs)
        if reason is None:
            return None
        if OUT_OF_MEMORY.search(reason):
            raise self._out_of_memory_error(reason, _describe(inputs[0]))
        if (device_reason := self._decode_single(self._def.good_inputs)) is not None:
            raise self._device_error(f"does not decode a good image either: {device_reason}")
        return reason

    def _decode_single(self, inputs: Inputs) -> str | None:
        """Decode a single image; return DALI's error message, or None."""
        self._single_inputs = inputs[: self._def.num_dali_inputs]
        try:
            if self._single_pipeline is None:
                self._single_pipeline = build_pipeline(
                    self._def, lambda: self._single_inputs, batch_size=1, device=self._device, threads=1, prefetch=1
                )
            self._single_pipeline.run()
        except (RuntimeError, MemoryError) as error:
            self._single_pipeline = None  # unusable after an error
            return error_reason(error)
        return None

    def _confirm_replaced(self, decoded: torch.cuda.Event | None) -> None:
        if self._num_unconfirmed:
            self._num_unconfirmed -= 1
            if not self._num_unconfirmed:
                if decoded:
                    decoded.synchronize()
                self._confirm()

    def _device_error(self, problem: str) -> DeviceError:
        name = f"{self._device} ({device_name(self._device)})" if self._device.type == "cuda" else f"{self._device}"
        return DeviceError(
            f"{node_name()}, {name}: {problem}; this is the device's fault, not the data's: if it happens again, "
            "exclude this node"
        )

    def _out_of_memory_error(self, reason: str, what: str) -> UserError:
        return UserError(
            f"engine.micro_batch: {node_name()}, {self._device}: not enough memory for {what}: {reason}; reduce "
            "engine.micro_batch, data.prefetch or data.decode_threads"
        )


def _describe(encoded: Iterable[np.ndarray]) -> str:
    sizes = [jpeg_size(image) for image in encoded]
    width, height = max(sizes, key=math.prod)
    return f"decoding {len(sizes)} images of at most {width} x {height} pixels"
