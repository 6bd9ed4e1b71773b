"""Layers with an external memory that stand where a recurrent layer of torch.nn stood."""

from .memory import MemoryLayer, MemoryState, MemoryWeights

__all__ = ["MemoryLayer", "MemoryState", "MemoryWeights"]
