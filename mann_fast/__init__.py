"""mann_fast: fused external-memory ops, layers and models for PyTorch."""

from . import ops, reference
from .ops import backend, backends

__version__ = "0.1.0"

__all__ = ["backend", "backends", "ops", "reference"]
