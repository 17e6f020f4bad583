"""Hugging Face models: loaded, offloaded, and as blocks of prunable layers."""

from .blocks import Block, PrunableLayer, find_blocks, max_length, model_kind, weight_hash
from .loading import LoadedModel, load_model, resolve_device
from .offload import Residence
from .sources import Trust

__all__ = [
    "Block",
    "LoadedModel",
    "PrunableLayer",
    "Residence",
    "Trust",
    "find_blocks",
    "load_model",
    "max_length",
    "model_kind",
    "resolve_device",
    "weight_hash",
]
