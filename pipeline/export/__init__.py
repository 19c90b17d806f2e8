"""What was learned, for other libraries: timm, Hugging Face transformers, the official MAE code, ONNX.

Invariant: an export that exists was loaded again by the library it is for, and gave our features.
"""

from pipeline.weights.state_dicts import (
    load_official_state_dict,
    official_state_dict,
    timm_state_dict,
    transformers_state_dict,
)

__all__ = [
    "load_official_state_dict",
    "official_state_dict",
    "timm_state_dict",
    "transformers_state_dict",
]
