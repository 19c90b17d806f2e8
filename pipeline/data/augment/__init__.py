"""Augmentations of image batches on their device: one paper a file, pure functions of images and noise.

Invariant: an image's randomness is its own row of uniform numbers (in mixing: its pair's), so what happens to
it does not depend on ranks, micro batches or restarts. Nothing waits for the device: no `.item()`, no shape
that depends on values. Each file's `NUMBERS` is how many numbers an image takes.
"""
