"""Least recently used access (Santoro et al. 2016, arXiv 1605.06065)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops import LRUAState
from ..ops.cell import CELL
from ..reference.cell import head_sizes, split_heads
from .base import Memory, MemoryWeights

# Keys and write vectors start so much larger than nn.Linear would make them: else all are near 0 and alike,
# and what is read is lost beside the input.
VECTOR_GAIN = 3.0


@dataclass(frozen=True, kw_only=True)
class LRUA(Memory):
    """R heads that write where they read last, and to least used slots (Santoro et al. 2016, eqs. 2-8).

    Of the layer's heads: keys (R D), write vectors (R D), gates (R) and sharpness (R), in this order, without those that the
    options leave out. State: :class:`mann_fast.ops.LRUAState`.

    Args:
        num_slots, slot_size, num_heads: N, D and R.
        sharpness: factor on the similarity before the softmax: "learned" (1 + 10 softplus of a linear layer),
            a number, or None for 1, as in the paper.
        write_vector: "separate" (what a head writes has a linear layer of its own) or "key" (a head writes
            its key, as in the paper).
        order, write_target, usage_decay, eps: see :func:`mann_fast.ops.lrua_step`.

    Raises:
        TypeError, ValueError: an option of the wrong type or value.
    """

    sharpness: str | float | None = "learned"
    write_vector: str = "separate"
    order: str = "write_first"
    write_target: str = "per_head"
    usage_decay: float = 0.95
    eps: float = 1e-6

    fused = True

    def __post_init__(self) -> None:
        super().__post_init__()
        CELL.raw_options(self._cell_options, {})  # for its checks

    @cached_property
    def _cell_options(self) -> dict[str, Any]:
        return {"write_vector": self.write_vector, "sharpness": self.sharpness, **self._step_options}

    @property
    def _step_options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("order", "write_target", "usage_decay", "eps")}

    def head_sizes(self) -> list[int]:
        return head_sizes(self.num_heads, self.slot_size, self.write_vector, self.sharpness)

    def adjust_heads(self, weight: Tensor) -> None:
        weight[: self.head_sizes()[0]] *= VECTOR_GAIN

    def initial_state(self, batch: int, *, dtype: torch.dtype, device: torch.device) -> LRUAState:
        sizes = (self.num_slots, self.slot_size, self.num_heads)
        return LRUAState.initial(batch, *sizes, dtype=dtype, device=device)

    def split(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return split_heads(values, self.num_heads, self.slot_size, self.write_vector, self.sharpness)

    def step(
        self, state: LRUAState, heads: tuple[Tensor, Tensor, Tensor, Tensor | None], record: bool = False
    ) -> tuple[Tensor, LRUAState, MemoryWeights | None]:
        written = None
        if record:  # the step itself does not give them
            _, vector, gate, _ = heads
            written = ops.lrua_write(*state, vector, gate, write_target=self.write_target)[1]
        reads, state = ops.lrua_step(state, *heads, **self._step_options)
        weights = None if written is None else MemoryWeights(state.read_weights, written, state.usage)
        return reads, state, weights

    def cell(
        self, *tensors: Any, controller: str, **sequences: Any
    ) -> tuple[Tensor, tuple[Tensor, ...], LRUAState, Tensor]:
        return ops.cell(*tensors, controller=controller, **self._cell_options | sequences)
