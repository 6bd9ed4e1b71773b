"""What this machine can do, measured in the same run as what is held against it."""

from __future__ import annotations

from collections.abc import Callable

import torch

SGEMM_SIZE = 1024
COPY_NUMBERS = 1 << 24  # 64 MiB in float32


def sgemm() -> tuple[Callable[[], object], int]:
    """A float32 matrix product that no memory limits, and its floating-point operations."""
    a, b = torch.randn(SGEMM_SIZE, SGEMM_SIZE), torch.randn(SGEMM_SIZE, SGEMM_SIZE)
    return lambda: torch.mm(a, b), 2 * SGEMM_SIZE**3


def copy() -> tuple[Callable[[], object], int]:
    """A copy that no cache holds, and the bytes that it reads and writes."""
    source = torch.empty(COPY_NUMBERS)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * source.nbytes
