"""mann_fast: fused external-memory ops, layers and models for PyTorch."""

from . import ops, reference
from .layers import MemoryLayer, MemoryStack, MemoryState
from .models import MANN
from .ops import backend, backends

__version__ = "0.2.0"

__all__ = ["MANN", "MemoryLayer", "MemoryStack", "MemoryState", "backend", "backends", "ops", "reference"]
