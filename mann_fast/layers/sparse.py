"""Sparse access to a memory of many slots (Rae et al. 2016, arXiv 1610.09027, "SAM")."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .._state import check_size
from ..ops import SparseState
from ..ops.sparse import SPARSE_SCAN
from ..reference.cell import sparse_head_sizes, split_sparse_heads
from ..reference.sparse import sparse_writes
from .base import Memory, MemoryWeights
from .lrua import VECTOR_GAIN
from .sparse_index import SearchRecall, SparseIndex, check_faiss
from .sparse_steps import sparse_steps


@dataclass(frozen=True, kw_only=True)
class Sparse(Memory):
    """R heads that each read the K slots most like their key, and write to those that they read last and to one that nobody
    accessed for longest (Rae et al. 2016, eqs. 5-6): for memories of up to millions of slots.

    Of the layer's heads, in this order: keys and write vectors (R D each, through tanh), gates (R), sharpness (R, 1 + 10
    softplus) and write gates (R). State: :class:`mann_fast.ops.SparseState`. What the layer keeps of a step for backward does
    not grow with N.

    ``return_weights`` gives the slots touched and no tensor of N numbers a step: read [T, B, R, K] at read_slots, write [T, B,
    R, K + 1] at write_slots, the last of which is the one that was erased; where it is one of the others, both count.

    Args:
        num_slots, slot_size, num_heads: N, D and R.
        num_reads: K, 1 <= K <= N.
        probes: None for the exact search, or how many of about sqrt(N) lists of an index (faiss, the extra ``index``) are
            looked through for slots to compare, >= 1; :meth:`recall` says how much is missed. On the CPU in eager mode, from
            16,384 slots on; elsewhere the search is exact. An index is built once that is worth it, and follows the state from
            call to call.
        threshold, eps: see :func:`mann_fast.ops.sparse_step`.

    Raises:
        TypeError, ValueError: an option of the wrong type or value. ModuleNotFoundError: faiss is not installed, with probes.
        RuntimeError: a call with probes that is repeated in backward, as by ``torch.utils.checkpoint``.
    """

    num_reads: int = 4
    probes: int | None = None
    threshold: float = 0.005
    eps: float = 1e-6

    fused = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size("num_reads", self.num_reads, 1)
        if self.num_reads > self.num_slots:
            raise ValueError(f"num_reads must be at most num_slots = {self.num_slots}, got {self.num_reads}")
        if self.probes is not None:
            check_size("probes", self.probes, 1)
            check_faiss()
        SPARSE_SCAN.raw_options(self._step_options, {"N": self.num_slots})  # for its checks

    @property
    def _step_options(self) -> dict[str, Any]:
        return {"threshold": self.threshold, "eps": self.eps}

    def head_sizes(self) -> list[int]:
        return sparse_head_sizes(self.num_heads, self.slot_size)

    def adjust_heads(self, weight: Tensor) -> None:
        weight[: self.head_sizes()[0]] *= VECTOR_GAIN

    def initial_state(self, batch: int, *, dtype: torch.dtype, device: torch.device) -> SparseState:
        sizes = (self.num_slots, self.slot_size, self.num_heads, self.num_reads)
        return SparseState.initial(batch, *sizes, dtype=dtype, device=device)

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        return split_sparse_heads(values, self.num_heads, self.slot_size)

    def step(
        self, state: SparseState, heads: tuple[Tensor, ...], record: bool = False
    ) -> tuple[Tensor, SparseState, MemoryWeights | None]:
        before = state
        reads, state = ops.sparse_step(state, *heads, **self._step_options)
        if not record:
            return reads, state, None
        _, _, gate, _, write_gate = heads
        write_slots, write = sparse_writes(before, *(x.to(before.memory.dtype) for x in (gate, write_gate)))
        weights = MemoryWeights(
            state.read_weights, write, None, read_slots=state.read_slots, write_slots=write_slots
        )
        return reads, state, weights

    def cell(
        self, *tensors: Any, controller: str, **sequences: Any
    ) -> tuple[Tensor, tuple[Tensor, ...], SparseState, Tensor]:
        options: dict[str, Any] = {**self._step_options, **sequences}
        return sparse_steps(*tensors, controller=controller, index=self._index, **options)

    @cached_property
    def _index(self) -> SparseIndex | None:
        return None if self.probes is None else SparseIndex(self.probes)

    def recall(self) -> SearchRecall | None:
        """How much of what exact search would read the approximate one has read, over the last 64 of the steps that were
        compared, one of 256 in which an index had a part; None before the first, and with the exact search.
        """
        return None if self._index is None else self._index.recall()
