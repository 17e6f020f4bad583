"""What the card can do: bandwidth and products of each type."""

from __future__ import annotations

import torch

from .bench import Bench

# What an H100 does; an H200 copies at 4.3 TB/s.
PRODUCTS = ((torch.float64, "45 or more"), (torch.float32, "40 or more"), (torch.bfloat16, "600 or more"))


def copied(bench: Bench) -> float:
    """Bytes a second that are read and written when a tensor is copied."""
    source = torch.randn(bench.size(1 << 30, 1 << 20), device=bench.device)
    target = torch.empty_like(source)
    target.copy_(source)
    _, seconds = bench.timed(lambda: target.copy_(source), 10)
    return 2 * source.nbytes / seconds


def ceilings(bench: Bench) -> None:
    """Copies in TB/s and products in TFLOP/s; float32 products must not be tf32."""
    bench.info("copy", copied(bench) / 1e12, "3.0 on an H100, 4.3 on an H200", "TB/s")
    width = bench.size(8192, 64)
    for dtype, expected in PRODUCTS:
        factor = torch.randn(width, width, device=bench.device).to(dtype)
        _ = factor @ factor
        _, seconds = bench.timed(lambda factor=factor: factor @ factor, 3)
        bench.info(f"product of {dtype}", 2 * width**3 / seconds / 1e12, expected, "TFLOP/s")
    precision = torch.get_float32_matmul_precision()
    full = precision == "highest" and not torch.backends.cuda.matmul.allow_tf32
    bench.check("float32 products are not tf32", full, precision, "highest")
