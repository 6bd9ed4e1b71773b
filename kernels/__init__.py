"""Triton kernels behind the raw ops, one file per op family. Imported by the first op that they serve."""

from __future__ import annotations

import torch

from . import content, lrua, ntm


def register(library: torch.library.Library) -> None:
    """Implement the raw ops of ``library`` for CUDA tensors, and for CPU tensors, which only the interpreter can take."""
    for module in (content, lrua, ntm):
        for name in module.RAW:
            for device in ("CUDA", "CPU"):
                library.impl(name, getattr(module, name), device)


explain = lrua.explain

__all__ = ["content", "explain", "lrua", "ntm", "register"]
