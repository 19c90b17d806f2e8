"""The size of a stored JPEG, from its header alone: a crop is planned before anything is decoded."""

START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
WITHOUT_LENGTH = frozenset([0x01, *range(0xD0, 0xD9)])


def jpeg_size(data: bytes | memoryview) -> tuple[int, int]:
    """(width, height) in pixels as stored, EXIF orientation ignored. ValueError without a frame header."""
    at = 2
    try:
        if data[0] != 0xFF or data[1] != 0xD8:
            raise ValueError("not a JPEG: it does not begin with FF D8")
        while True:
            if data[at] != 0xFF:
                raise ValueError(f"a damaged JPEG header: no marker at byte {at}")
            marker = data[at + 1]
            if marker == 0xFF:  # fill byte
                at += 1
            elif marker in START_OF_FRAME:
                size = data[at + 7] << 8 | data[at + 8], data[at + 5] << 8 | data[at + 6]
                if 0 in size:
                    raise ValueError(f"a JPEG of {size[0]} x {size[1]} pixels")
                return size
            elif marker in WITHOUT_LENGTH:
                at += 2
            else:
                at += 2 + (data[at + 2] << 8 | data[at + 3])
    except IndexError:
        raise ValueError("a JPEG that ends before its frame header") from None
