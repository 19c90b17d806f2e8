"""Augmentations of image batches on their device, one module a paper: pure functions of images and noise.

Invariant: an image's randomness is its own row of uniform numbers (in mixup: its pair's), so ranks, micro batches
and restarts do not affect it. Nothing synchronizes with the device: no `.item()`, no shape that depends on
values. Each module's `NOISE_DIM` is the number of uniform numbers for each image.
"""
