"""The Differentiable Neural Computer (Graves et al. 2016, Nature 538, 471), with the repairs of Csordas and Schmidhuber 2019
(arXiv 1904.10278)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..ops import DNCInterface, DNCState
from ..ops._checks import check_eps
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

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("link", "masks", "deallocate", "link_sharpening"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
        if self.link_sharpening and not self.link:
            raise ValueError("link_sharpening must be False without link, got True")
        _check_number("mask_min", self.mask_min, "a number")
        if not 0 <= self.mask_min < 1:
            raise ValueError(f"mask_min must be within [0, 1), got {self.mask_min}")
        if self.mask_min and not self.masks:
            raise ValueError(f"mask_min must be 0 without masks, got {self.mask_min}")
        if self.clip is not None:
            _check_number("clip", self.clip, "a number or None")
            if not 0 < self.clip < math.inf:
                raise ValueError(f"clip must be a positive number or None, got {self.clip}")
        check_eps(self.eps)

    def _parts(self) -> dict[str, tuple[int, ...]]:
        """Of the heads' values: for which tensor of DNCInterface each part is, and its sizes without B."""
        heads, size = (self.num_heads,), (self.slot_size,)
        parts = {
            "read_keys": heads + size,
            "read_sharpness": heads,
            "write_key": size,
            "write_sharpness": (),
            "erase": size,
            "write_vector": size,
            "free_gates": heads,
            "allocation_gate": (),
            "write_gate": (),
        }
        if self.link:
            parts["read_modes"] = (*heads, 3)
        if self.masks:
            parts |= {"read_masks": heads + size, "write_mask": size}
        if self.link_sharpening:
            parts["link_sharpening"] = (*heads, 2)
        return parts

    def _squash(self, name: str, values: Tensor) -> Tensor:
        if name in ("read_keys", "write_key", "write_vector"):
            return values
        if "sharp" in name:
            return 1 + F.softplus(values)
        if name == "read_modes":
            return torch.softmax(values, -1)
        if "mask" in name:
            return self.mask_min + (1 - self.mask_min) * torch.sigmoid(values)
        return torch.sigmoid(values)

    def head_sizes(self) -> list[int]:
        return [math.prod(sizes) for sizes in self._parts().values()]

    def initial_state(self, batch: int, *, dtype: torch.dtype, device: torch.device) -> DNCState:
        sizes = (self.num_slots, self.slot_size, self.num_heads)
        return DNCState.initial(batch, *sizes, link=self.link, dtype=dtype, device=device)

    def split(self, values: Tensor) -> DNCInterface:
        if self.clip is not None:
            values = values.clamp(-self.clip, self.clip)
        parts = values.split_with_sizes(self.head_sizes(), 1)
        squashed = {
            name: self._squash(name, part.reshape(part.shape[0], *sizes))
            for (name, sizes), part in zip(self._parts().items(), parts, strict=True)
        }
        return DNCInterface(**squashed)

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


def _check_number(name: str, value: object, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
