"""Encode JPEGs with any sampling factors, which no library at hand does."""

import random
import struct
from collections.abc import Sequence


def sampled_jpeg(factors: Sequence[tuple[int, int]], width: int = 64, height: int = 64) -> bytes:
    """Return a baseline JPEG whose 8 x 8 blocks have one random value each.

    Args:
        factors: Horizontal and vertical sampling factor of Y, Cb and Cr.
        width, height: Multiples of 32.
    """
    rng, previous, bits = random.Random(0), [0, 0, 0], []
    unit_width, unit_height = (8 * max(pair[axis] for pair in factors) for axis in (0, 1))
    for _ in range(width // unit_width * (height // unit_height)):
        for component, (h, v) in enumerate(factors):
            for _ in range(h * v):
                value = rng.randint(-40, 40)
                difference, previous[component] = value - previous[component], value
                size = abs(difference).bit_length()
                amplitude = difference if difference >= 0 else difference + (1 << size) - 1
                # The code of a size is the size in 4 bits, that of the end of a block is 0.
                bits.append(f"{size:04b}{amplitude:0{size}b}0" if size else "00000")
    text = "".join(bits)
    text += "1" * (-len(text) % 8)
    scan = int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\0")
    components = b"".join(bytes([i, h << 4 | v, 0]) for i, (h, v) in enumerate(factors, 1))
    segments = {
        0xDB: bytes([0]) + bytes([16]) * 64,
        0xC0: struct.pack(">BHHB", 8, height, width, 3) + components,
        0xC4: bytes([0x00, 0, 0, 0, 12, *[0] * 12, *range(12), 0x10, 1, *[0] * 15, 0]),
        0xDA: bytes([3, 1, 0, 2, 0, 3, 0, 0, 63, 0]),
    }
    headers = b"".join(struct.pack(">BBH", 0xFF, code, len(data) + 2) + data for code, data in segments.items())
    return b"\xff\xd8" + headers + scan + b"\xff\xd9"
