"""The definition of every op in plain PyTorch: written to be read, differentiable by autograd, the oracle of every test.

The functions have the names, signatures and results of :mod:`mann_fast.ops`. They check nothing; :mod:`mann_fast.ops` does.
"""

from .cell import cell, dnc_cell, ntm_cell, sparse_cell
from .content import content_read, similarity
from .dnc import DNCInterface, DNCState, dnc_scan, dnc_step
from .lrua import LRUAState, least_used, lrua_scan, lrua_step, lrua_write
from .ntm import NTMHead, NTMState, ntm_address, ntm_scan, ntm_step
from .sparse import SparseState, sparse_read, sparse_scan, sparse_step

__all__ = [
    "DNCInterface",
    "DNCState",
    "LRUAState",
    "NTMHead",
    "NTMState",
    "SparseState",
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
    "similarity",
    "sparse_cell",
    "sparse_read",
    "sparse_scan",
    "sparse_step",
]
