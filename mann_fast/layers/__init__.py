"""Layers with an external memory that stand where a recurrent layer of torch.nn stood."""

from .memory import MemoryLayer, MemoryState

__all__ = ["MemoryLayer", "MemoryState"]
