"""Masks in files and on models: written, read, applied, verified."""

from .file import (
    MASK_FILE,
    LayerMask,
    MaskFile,
    Verification,
    apply_masks,
    layer_mask,
    load_masks,
    save_masks,
    verify_model,
)
from .output import RECORD_FILE
from .packing import PackedMasks, masked, pack_mask, unpack_bytes, unpack_mask
from .saving import save_model

__all__ = [
    "MASK_FILE",
    "RECORD_FILE",
    "LayerMask",
    "MaskFile",
    "PackedMasks",
    "Verification",
    "apply_masks",
    "layer_mask",
    "load_masks",
    "masked",
    "pack_mask",
    "save_masks",
    "save_model",
    "unpack_bytes",
    "unpack_mask",
    "verify_model",
]
