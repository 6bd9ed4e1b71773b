"""The heads of a Neural Turing Machine (Graves et al. 2014, arXiv 1410.5401, section 3.3), from a controller's values."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import NTMHead

ADDRESSINGS = ("lrua", "ntm", "content")


def head_sizes(num_heads: int, slot_size: int, max_shift: int, addressing: str) -> list[int]:
    """Of the values that a controller gives: keys and sharpness, and with "ntm" gates, shifts and sharpening, of the read
    heads and then of the write heads; erase and add vectors."""
    head = [num_heads * slot_size, num_heads]
    if addressing == "ntm":
        head += [num_heads, num_heads * (2 * max_shift + 1), num_heads]
    return [*head, *head, num_heads * slot_size, num_heads * slot_size]


def split_heads(
    values: Tensor, num_heads: int, slot_size: int, max_shift: int, addressing: str
) -> tuple[NTMHead, NTMHead, Tensor, Tensor]:
    """Read heads, write heads, erase and add [B, R, D], each squashed into its range."""
    *parts, erase, add = values.split(head_sizes(num_heads, slot_size, max_shift, addressing), dim=1)
    half, vectors = len(parts) // 2, (num_heads, slot_size)
    heads = (_squash(part, vectors, max_shift) for part in (parts[:half], parts[half:]))
    return *heads, torch.sigmoid(erase).unflatten(1, vectors), torch.tanh(add).unflatten(1, vectors)


def _squash(parts: list[Tensor], vectors: tuple[int, int], max_shift: int) -> NTMHead:
    key, sharpness, *rest = parts
    key, sharpness = torch.tanh(key).unflatten(1, vectors), 1 + F.softplus(sharpness)
    if not rest:  # by content alone: nothing is kept of the step before, nothing moves, nothing is sharpened
        one = torch.ones_like(sharpness)
        return NTMHead(key, sharpness, one, one.unsqueeze(2), one)
    gate, shift, sharpening = rest
    shift = torch.softmax(shift.unflatten(1, (vectors[0], 2 * max_shift + 1)), dim=2)
    return NTMHead(key, sharpness, torch.sigmoid(gate), shift, 1 + F.softplus(sharpening))
