"""In which precision torch makes products of float32, seen where it makes them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ATEN = torch.ops.aten
PRODUCTS = {ATEN.mm.default, ATEN.addmm.default, ATEN.bmm.default, ATEN.baddbmm.default}


def precisions() -> tuple[str, str]:
    """What torch would make products of float32 in, on cards and on processors."""
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


class Watched(TorchDispatchMode):
    """The precisions in force at each product of float32 matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in PRODUCTS and args[-1].dtype == torch.float32:
            self.seen.append(precisions())
        return func(*args, **(kwargs or {}))
