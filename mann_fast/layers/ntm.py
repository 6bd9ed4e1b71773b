"""Neural Turing Machines (Graves et al. 2014, arXiv 1410.5401): addressing by content, and by content and location."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..ops import NTMHead, NTMState
from ..ops._checks import check_choice, check_eps
from ..ops.lrua import ORDERS
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

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("order", self.order, ORDERS)
        check_eps(self.eps)

    def _addressing_sizes(self) -> list[int]:
        return [self.num_heads * self.slot_size, self.num_heads]

    def _squash(self, key: Tensor, sharpness: Tensor, *location: Tensor) -> NTMHead:
        key, sharpness = self._vectors(torch.tanh(key)), 1 + F.softplus(sharpness)
        return NTMHead(key, sharpness, *self._squash_location(sharpness, *location))

    def _squash_location(self, sharpness: Tensor, *location: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, shift and sharpening: nothing is kept of the step before, nothing moves, nothing is sharpened."""
        one = torch.ones_like(sharpness)
        return one, one.unsqueeze(2), one

    def _vectors(self, values: Tensor) -> Tensor:
        return torch.unflatten(values, 1, (self.num_heads, self.slot_size))

    def head_sizes(self) -> list[int]:
        addressing, vectors = self._addressing_sizes(), self.num_heads * self.slot_size
        return [*addressing, *addressing, vectors, vectors]

    def initial_state(self, batch: int, *, dtype: torch.dtype, device: torch.device) -> NTMState:
        sizes = (self.num_slots, self.slot_size, self.num_heads, self.num_heads)
        return NTMState.initial(batch, *sizes, dtype=dtype, device=device)

    def split(self, values: Tensor) -> tuple[NTMHead, NTMHead, Tensor, Tensor]:
        *parts, erase, add = values.split_with_sizes(self.head_sizes(), 1)
        half = len(parts) // 2
        read_head, write_head = self._squash(*parts[:half]), self._squash(*parts[half:])
        return read_head, write_head, self._vectors(torch.sigmoid(erase)), self._vectors(torch.tanh(add))

    def step(
        self, state: NTMState, heads: tuple[NTMHead, NTMHead, Tensor, Tensor], record: bool = False
    ) -> tuple[Tensor, NTMState, MemoryWeights]:
        reads, state = ops.ntm_step(state, *heads, order=self.order, eps=self.eps)
        return reads, state, MemoryWeights(state.read_weights, state.write_weights, None)


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
        super().__post_init__()
        if isinstance(self.max_shift, bool) or not isinstance(self.max_shift, int):
            raise TypeError(f"max_shift must be an int, got {type(self.max_shift).__name__}")
        if self.max_shift < 0:
            raise ValueError(f"max_shift must be at least 0, got {self.max_shift}")

    def _addressing_sizes(self) -> list[int]:
        heads = self.num_heads
        return [*super()._addressing_sizes(), heads, heads * (2 * self.max_shift + 1), heads]

    def _squash_location(self, sharpness: Tensor, *location: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, shift, sharpening = location
        shift = torch.softmax(torch.unflatten(shift, 1, (self.num_heads, 2 * self.max_shift + 1)), dim=2)
        return torch.sigmoid(gate), shift, 1 + F.softplus(sharpening)
