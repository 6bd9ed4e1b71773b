"""The memory ops: checked arguments, autograd, and one fused kernel per call where a backend has one."""

from . import _backend
from ._backend import backend, backends
from .cell import cell
from .content import content_read
from .lrua import LRUAState, least_used, lrua_scan, lrua_step, lrua_write

__all__ = [
    "LRUAState",
    "backend",
    "backends",
    "cell",
    "content_read",
    "least_used",
    "lrua_scan",
    "lrua_step",
    "lrua_write",
]

_backend.load()
