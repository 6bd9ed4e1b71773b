"""Triton kernels behind the raw ops. Imported by the first op that they serve."""

from __future__ import annotations

import torch

from . import content, dnc, lrua, lrua_scan, ntm, sparse, sparse_backward

FAMILIES = (
    content,
    lrua,
    lrua_scan,
    ntm,
    dnc,
    sparse,
    sparse_backward,
)  # each names the raw ops that it implements in RAW


def register(library: torch.library.Library) -> None:
    """Implement the raw ops of ``library`` for CUDA tensors, and for CPU tensors, which only the interpreter can take."""
    for family in FAMILIES:
        for name in family.RAW:
            for device in ("CUDA", "CPU"):
                library.impl(name, getattr(family, name), device)


def explain(raw: str, op: str, num_slots: int, slot_size: int, heads: int) -> str:
    """How the raw op behind ``op`` is launched at this size, in a sentence made from the plan that its launcher follows."""
    family = next(family for family in FAMILIES if raw in family.RAW)
    return family.sentence(op, num_slots, slot_size, heads)
