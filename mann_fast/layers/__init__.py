"""Layers with an external memory that stand where a recurrent layer of torch.nn stood, and the memories that they have."""

from ..ops import DNCState, LRUAState, NTMState, SparseState
from .base import Memory, MemoryWeights
from .dnc import DNC
from .lrua import LRUA
from .memory import MemoryLayer
from .ntm import NTM, Content
from .registry import MEMORIES
from .sparse import Sparse
from .stack import MemoryStack, StackState
from .state import MemoryState, register_state

__all__ = [
    "DNC",
    "LRUA",
    "MEMORIES",
    "NTM",
    "Content",
    "Memory",
    "MemoryLayer",
    "MemoryStack",
    "MemoryState",
    "MemoryWeights",
    "Sparse",
    "StackState",
    "register_state",
]

for _kind in (DNCState, LRUAState, NTMState, SparseState, MemoryState, StackState, MemoryWeights):
    register_state(_kind)
