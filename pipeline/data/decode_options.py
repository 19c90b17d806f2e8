"""How DALI decodes, how far ahead, and the memory it takes; without importing DALI.

Invariant: everything here is a function of the recipe and the device's type.
"""

from typing import Literal, NamedTuple

import torch

from pipeline.recipe.sections import DataSection

DEVICE_PADDING = HOST_PADDING = 2 * 2**20
"""Bytes of nvJPEG's buffers that DALI preallocates for each decoding thread: one on the GPU and two in page-locked
memory (DALI's defaults: 16 and 8 MiB). nvJPEG enlarges a buffer when a larger image comes. The coefficients of a 4:2:0
JPEG take 3 bytes per pixel, so these fit photographs of up to 0.7 megapixels (not measured)."""
MEAN_PIXELS = 500 * 375
"""Pixels of an average photograph of ImageNet, to estimate memory."""


class DecodeOptions(NamedTuple):
    """Where and how DALI decodes images."""

    backend: Literal["cpu", "mixed"] = "cpu"
    """mixed: on a GPU, with its hardware JPEG decoder if it has one."""
    roi: bool = True
    """Decode only the region (ROI) that the crops need; otherwise decode the whole image and slice it."""
    hw_decoder_load: float = 0.65
    """Share of a batch's JPEGs for the hardware decoder. The others are decoded by CUDA kernels, with pixels that may
    differ; with 0 or 1 it depends on the image alone which decoder it gets."""


class DecoderMemory(NamedTuple):
    """Estimated memory of a rank's decoder, in bytes."""

    device: int
    """On the GPU, outside of torch's allocator and inside of it together."""
    pinned: int
    """Page-locked host memory."""


def decode_options(data: DataSection, device: torch.device, deterministic: bool = False) -> DecodeOptions:
    """Return how to decode on a device.

    On a CPU, regions are decoded: libjpeg-turbo's pixels are those of the whole image, and it is faster.

    Args:
        deterministic: Make an image's pixels independent of the other images of its batch on a GPU too: all JPEGs that
            the hardware decoder supports go to it, unless data.hw_decoder_load is 0.
    """
    if device.type != "cuda":
        return DecodeOptions()
    load = data.hw_decoder_load
    if deterministic and 0 < load < 1:
        load = 1.0
    return DecodeOptions("mixed", data.roi_decode, load)


def prefetch_depth(data: DataSection, device: torch.device) -> int:
    """Return how many batches to decode ahead: on a GPU 3, which absorbs a batch of large images; on the CPU,
    if decoding and training share the cores, more than 2 gain nothing."""
    return data.prefetch or (3 if device.type == "cuda" else 2)


def decoder_memory(data: DataSection, micro_batch: int, threads: int, mean_pixels: int = MEAN_PIXELS) -> DecoderMemory:
    """Estimate the memory of the training decoder on a GPU.

    Counted are nvJPEG's preallocated buffers; of each batch that DALI decodes ahead, the whole images and the pixels
    of the crops; and the pixels of three more batches: in the decoding thread, in its queue, and in the model.

    Args:
        micro_batch: Crops per rank and forward pass.
        threads: Decoding threads of the rank.
        mean_pixels: Width x height of an average image.
    """
    depth, images = prefetch_depth(data, torch.device("cuda")), micro_batch // data.crops_per_image
    decoded = 3 * mean_pixels * images
    pixels = 4 * 3 * data.image_size**2 * micro_batch
    preallocated = threads * DEVICE_PADDING
    return DecoderMemory(preallocated + depth * decoded + (depth + 3) * pixels, 2 * threads * HOST_PADDING)
