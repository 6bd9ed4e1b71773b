"""The Differentiable Neural Computer (Graves et al. 2016, Nature 538, 471), with the repairs of Csordas and Schmidhuber 2019
(arXiv 1904.10278)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops import DNCInterface, DNCState
from ..ops._checks import check_flag
from ..ops.dnc_cell import DNC_CELL
from ..reference.cell import dnc_head_sizes, split_dnc_heads
from .base import Memory, MemoryWeights


@dataclass(frozen=True, kw_only=True)
class DNC(Memory):
    """One write head, which writes to slots that are free or by content; R read heads, which read by content, or what was
    written before or after what they read last (Graves et al. 2016, Methods).

    Of the layer's heads, in this order: read keys (R D), read sharpness (R), write key (D), write sharpness (1), erase (D),
    write vector (D), free gates (R), allocation gate (1), write gate (1), and with links read modes (3R, head by head:
    backward, content, forward); then, where used, read masks (R D), write mask (D), and link sharpening (2R, head by head:
    backward, forward). Keys and the write vector are taken as they are; sharpness goes through 1 + softplus, the read modes of
    a head through a softmax, all else through a sigmoid. State: :class:`mann_fast.ops.DNCState`; at the start all of it is 0.

    Args:
        num_slots, slot_size, num_heads: N, D and R.
        link: whether there are links. Without them the heads read by content alone (Franke et al. 2018, arXiv 1807.02658), and
            the N^2 numbers of a sample's links are spared.
        masks: whether keys are compared with slots in the numbers alone that a mask of their own picks (Csordas and
            Schmidhuber 2019, section 3.1).
        mask_min: the least that a mask may be, in [0, 1).
        deallocate: whether a slot that is given free is erased, too (section 3.2).
        link_sharpening: whether what follows from the links is sharpened, by exponents of each head (section 3.3).
        clip: None, or a positive number: values of the heads beyond -clip and clip are taken to be these. Both authors'
            programs clip at 20.
        eps: see :func:`mann_fast.ops.dnc_step`.

    Raises:
        TypeError, ValueError: an option of the wrong type or value.
    """

    link: bool = True
    masks: bool = False
    mask_min: float = 0.0
    deallocate: bool = False
    link_sharpening: bool = False
    clip: float | None = None
    eps: float = 1e-6

    scans = True
    fused = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("link", self.link)
        DNC_CELL.raw_options(self._cell_options, {"link": self.link})  # for its checks

    @property
    def _cell_options(self) -> dict[str, Any]:
        names = ("masks", "mask_min", "deallocate", "link_sharpening", "clip", "eps")
        return {name: getattr(self, name) for name in names}

    @property
    def _parts(self) -> dict[str, bool]:
        """Which of the heads' values there are."""
        return {"link": self.link, "masks": self.masks, "link_sharpening": self.link_sharpening}

    def head_sizes(self) -> list[int]:
        return dnc_head_sizes(self.num_heads, self.slot_size, **self._parts)

    def initial_state(self, batch: int, *, dtype: torch.dtype, device: torch.device) -> DNCState:
        sizes = (self.num_slots, self.slot_size, self.num_heads)
        return DNCState.initial(batch, *sizes, link=self.link, dtype=dtype, device=device)

    def split(self, values: Tensor) -> DNCInterface:
        sizes = (self.num_heads, self.slot_size)
        return split_dnc_heads(values, *sizes, **self._parts, mask_min=self.mask_min, clip=self.clip)

    def step(
        self, state: DNCState, heads: DNCInterface, record: bool = False
    ) -> tuple[Tensor, DNCState, MemoryWeights | None]:
        reads, state = ops.dnc_step(state, heads, deallocate=self.deallocate, eps=self.eps)
        weights = None
        if record:
            modes = None if heads.read_modes is None else heads.read_modes.to(state.memory.dtype)
            allocated = (heads.write_gate * heads.allocation_gate).to(state.memory.dtype)
            write = state.write_weights.unsqueeze(1)
            weights = MemoryWeights(state.read_weights, write, state.usage, modes, allocated)
        return reads, state, weights

    def cell(
        self, *tensors: Any, controller: str, **sequences: Any
    ) -> tuple[Tensor, tuple[Tensor, ...], DNCState, Tensor]:
        return ops.dnc_cell(*tensors, controller=controller, **self._cell_options | sequences)
