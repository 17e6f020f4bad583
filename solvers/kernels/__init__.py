"""Inner loops.

``interface`` says what goes in and comes out. ``reference`` in plain torch is the specification; ``cpu``
(numba) and ``cuda`` (Triton) are its fast twins with the same functions, chosen by the device.
"""

from __future__ import annotations

import importlib.util
import warnings

import torch

from .interface import Kernels


def kernels_for(device: torch.device) -> Kernels:
    """The fastest installed kernels for ``device``; ``reference`` where there are none, which is said."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from . import cuda

        return cuda
    if device.type == "cpu" and importlib.util.find_spec("numba") is not None:
        from . import cpu

        return cpu
    from . import reference

    if device.type != "cpu":
        missing = "triton is not installed" if device.type == "cuda" else "there are no kernels for it"
        warnings.warn(
            f"search on {device.type}: {missing}, so it runs in plain torch"
            + (" (pip install triton)" if device.type == "cuda" else ""),
            stacklevel=2,
        )
    return reference
