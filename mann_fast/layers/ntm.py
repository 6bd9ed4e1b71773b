"""Neural Turing Machines (Graves et al. 2014, arXiv 1410.5401): addressing by content, and by content and location."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .._state import check_size
from ..ops import NTMHead, NTMState
from ..ops.ntm_cell import NTM_CELL
from ..reference.cell import ntm_head_sizes, split_ntm_heads
from .base import Memory, MemoryWeights


@dataclass(frozen=True, kw_only=True)
class Content(Memory):
    """A Neural Turing Machine that addresses by content alone: R read heads, and R write heads that erase and add.

    Of the layer's heads, for the read heads and then for the write heads: keys (R D) and sharpness (R); then erase (R D) and
    add (R D). Keys and add vectors go through tanh, erase vectors through a sigmoid, sharpness through 1 + softplus. State:
    :class:`mann_fast.ops.NTMState`. Equal slots are addressed alike and stay equal, as all are at the start of a sequence.

    Args:
        num_slots, slot_size, num_heads: N, D and R.
        order, eps: see :func:`mann_fast.ops.ntm_step`.

    Raises:
        TypeError, ValueError: an option of the wrong type or value.
    """

    order: str = "read_first"
    eps: float = 1e-6

    scans = True
    fused = True

    def __post_init__(self) -> None:
        super().__post_init__()
        NTM_CELL.raw_options(self._cell_options, {})  # for its checks

    def _shifts(self) -> int | None:
        """S; None of heads that have no location."""
        return None

    @property
    def _cell_options(self) -> dict[str, Any]:
        return {"max_shift": self._shifts(), "order": self.order, "eps": self.eps}

    def head_sizes(self) -> list[int]:
        return ntm_head_sizes(self.num_heads, self.slot_size, self._shifts())

    def initial_state(self, batch: int, *, dtype: torch.dtype, device: torch.device) -> NTMState:
        sizes = (self.num_slots, self.slot_size, self.num_heads, self.num_heads)
        return NTMState.initial(batch, *sizes, dtype=dtype, device=device)

    def split(self, values: Tensor) -> tuple[NTMHead, NTMHead, Tensor, Tensor]:
        return split_ntm_heads(values, self.num_heads, self.slot_size, self._shifts())

    def step(
        self, state: NTMState, heads: tuple[NTMHead, NTMHead, Tensor, Tensor], record: bool = False
    ) -> tuple[Tensor, NTMState, MemoryWeights]:
        reads, state = ops.ntm_step(state, *heads, order=self.order, eps=self.eps)
        return reads, state, MemoryWeights(state.read_weights, state.write_weights, None)

    def cell(
        self, *tensors: Any, controller: str, **sequences: Any
    ) -> tuple[Tensor, tuple[Tensor, ...], NTMState, Tensor]:
        return ops.ntm_cell(*tensors, controller=controller, **self._cell_options | sequences)


@dataclass(frozen=True, kw_only=True)
class NTM(Content):
    """A Neural Turing Machine (eqs. 2-9): each head finds slots by content, mixes that with where it was at the step before,
    moves by up to S slots and sharpens.

    Of the layer's heads, for the read heads and then for the write heads: keys (R D), sharpness (R), gates (R), shifts
    (R (2S + 1)), sharpening (R); then erase (R D) and add (R D). Beside what :class:`Content` does, gates go through a
    sigmoid, shifts through a softmax and sharpening through 1 + softplus.

    Args:
        num_slots, slot_size, num_heads, order, eps: as of :class:`Content`.
        max_shift: S, at least 0.
    """

    max_shift: int = 1

    def __post_init__(self) -> None:
        check_size("max_shift", self.max_shift, 0)  # not None
        super().__post_init__()

    def _shifts(self) -> int:
        return self.max_shift
