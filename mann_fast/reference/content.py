"""Content addressing: cosine similarity, softmax over the slots, weighted read (Graves et al. 2014, eqs. 5-6)."""

from __future__ import annotations

import torch
from torch import Tensor


def similarity(memory: Tensor, key: Tensor, sharpness: Tensor | None, eps: float) -> Tensor:
    """``sharpness * cosine(key, slot)`` for every head and slot: [B, R, N] from memory [B, N, D] and key [B, R, D].

    The dot product and the norm of every slot are summed over D in one order. A matrix product would not do: it gives
    equal slots unequal last bits, and the least-used rule then picks another slot.
    """
    dot = (key.unsqueeze(2) * memory.unsqueeze(1)).sum(-1)
    norms = (key * key).sum(-1).unsqueeze(2) * (memory * memory).sum(-1).unsqueeze(1)
    # Not rsqrt: its derivative has its cube, which underflows where a slot is large.
    cosine = dot / torch.sqrt(norms + eps)
    return cosine if sharpness is None else sharpness.unsqueeze(2) * cosine


def content_read(
    memory: Tensor, key: Tensor, sharpness: Tensor | None = None, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """See :func:`mann_fast.ops.content_read`."""
    wide_key = key.to(memory.dtype)
    wide_sharpness = None if sharpness is None else sharpness.to(memory.dtype)
    weights = torch.softmax(similarity(memory, wide_key, wide_sharpness, eps), dim=-1)
    return (weights @ memory).to(key.dtype), weights
