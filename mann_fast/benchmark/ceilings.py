"""What this machine can do, measured in the same run as what is held against it."""

from __future__ import annotations

from collections.abc import Callable

import torch

SGEMM_SIZE = {"cpu": 1024, "cuda": 8192}
COPY_NUMBERS = {"cpu": 1 << 24, "cuda": 1 << 28}  # 64 MiB and 1 GiB in float32


def sgemm(device: torch.device) -> tuple[Callable[[], object], int]:
    """A float32 matrix product that no memory limits, and its floating-point operations. On a GPU without TF32, as PyTorch's
    default is."""
    size = SGEMM_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    return lambda: torch.mm(a, b), 2 * size**3


def copy(device: torch.device) -> tuple[Callable[[], object], int]:
    """A copy that no cache holds, and the bytes that it reads and writes."""
    source = torch.empty(COPY_NUMBERS[device.type], device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * source.nbytes
