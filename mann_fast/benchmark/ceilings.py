"""What this machine can do, measured in the same run as what is held against it."""

from __future__ import annotations

from collections.abc import Callable

import torch

SGEMM_SIZE = 1024


def sgemm() -> tuple[Callable[[], object], int]:
    """A float32 matrix product that no memory limits, and its floating-point operations."""
    a, b = torch.randn(SGEMM_SIZE, SGEMM_SIZE), torch.randn(SGEMM_SIZE, SGEMM_SIZE)
    return lambda: torch.mm(a, b), 2 * SGEMM_SIZE**3
