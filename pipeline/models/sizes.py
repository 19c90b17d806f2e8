"""Width, depth and heads of the named vision transformers, as timm and MAE have them. No torch: recipes read
this."""

from typing import NamedTuple


class Size(NamedTuple):
    width: int
    depth: int
    heads: int


SIZES = {
    "vit_tiny": Size(192, 12, 3),
    "vit_small": Size(384, 12, 6),
    "vit_base": Size(768, 12, 12),
    "vit_large": Size(1024, 24, 16),
    "vit_huge": Size(1280, 32, 16),
}
