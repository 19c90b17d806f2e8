"""Export weights to timm, Hugging Face transformers, the official MAE code and ONNX.

Invariant: an export is reloaded with its target library, and kept only if its outputs match ours.
"""

from pipeline.weights.state_dicts import (
    load_official_state_dict,
    official_state_dict,
    timm_state_dict,
    transformers_state_dict,
)

__all__ = ["load_official_state_dict", "official_state_dict", "timm_state_dict", "transformers_state_dict"]
