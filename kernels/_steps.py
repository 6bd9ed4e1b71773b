"""What the loops of steps share, which take a memory too large for one program."""

from __future__ import annotations

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """A batched product in the dtype of its factors, whatever autocast the caller is in."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.bmm(a, b)


def anchored_memory(anchor: Tensor, memory: Tensor) -> Tensor:
    """The part of an anchor [B, rows, padded N] that holds the memory, a view of the shape of ``memory`` [B, N, D]."""
    return anchor.flatten(1)[:, : memory[0].numel()].unflatten(1, memory.shape[1:])
