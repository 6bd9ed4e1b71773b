"""The memory ops: checked arguments, autograd, and one fused kernel per call where a backend has one."""

from ..reference.dnc import DNCInterface, DNCState
from ..reference.lrua import LRUAState
from ..reference.ntm import NTMHead, NTMState
from ..reference.sparse import SparseState
from . import _loading
from ._backend import backend, backends
from .cell import cell
from .content import content_read
from .dnc import dnc_scan, dnc_step
from .dnc_cell import dnc_cell
from .lrua import least_used, lrua_scan, lrua_step, lrua_write
from .ntm import ntm_address, ntm_scan, ntm_step
from .ntm_cell import ntm_cell
from .sparse import sparse_read, sparse_scan, sparse_step
from .sparse_cell import sparse_cell

__all__ = [
    "DNCInterface",
    "DNCState",
    "LRUAState",
    "NTMHead",
    "NTMState",
    "SparseState",
    "backend",
    "backends",
    "cell",
    "content_read",
    "dnc_cell",
    "dnc_scan",
    "dnc_step",
    "least_used",
    "lrua_scan",
    "lrua_step",
    "lrua_write",
    "ntm_address",
    "ntm_cell",
    "ntm_scan",
    "ntm_step",
    "sparse_cell",
    "sparse_read",
    "sparse_scan",
    "sparse_step",
]

# Now that all schemas are defined. At once, for an exported program calls the raw ops without these functions.
_loading.load_cpp()
