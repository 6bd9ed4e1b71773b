"""MemoryState: what a MemoryLayer carries from one call to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

from ..ops._checks import HALF_DTYPES
from .base import StateLike


def memory_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the memory of a layer with parameters of this dtype."""
    return torch.float32 if dtype in HALF_DTYPES else dtype


class MemoryState(NamedTuple):
    """What a MemoryLayer carries from one call to the next.

    controller: (hidden, cell) of an LSTM, (hidden,) of a GRU, each [B, hidden_size], () of a feed-forward one, or the state of
    a module of the user's own. memory: the memory's own NamedTuple of tensors [B, ...], such as
    :class:`mann_fast.ops.LRUAState` of [B, N, D], [B, R, N] and [B, N], or :class:`mann_fast.ops.NTMState`. reads: [B, R, D],
    what the heads read last. After a call on unbatched input no tensor has the axis B. All are of the layer's dtype, but the
    memory is float32 in half precision.
    """

    controller: tuple[Tensor, ...]
    memory: Any
    reads: Tensor

    def _map(self, function: Callable[..., Tensor], *others: MemoryState) -> MemoryState:
        """``function`` of every tensor, and of the tensors in the same place of other states."""
        states = (self, *others)
        return MemoryState(
            tuple(map(function, *(state.controller for state in states))),
            type(self.memory)(*map(function, *(state.memory for state in states))),
            function(*(state.reads for state in states)),
        )

    def detach(self) -> MemoryState:
        """The same numbers without their history, for truncated backpropagation through time."""
        return self._map(Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> MemoryState:
        """Move or convert, as ``Tensor.to``; beside a half-precision dtype the memory is float32, and integers stay."""
        reads = self.reads.to(*args, **kwargs)
        dtype = memory_dtype(reads.dtype)
        memory = (x.to(reads.device, dtype if x.is_floating_point() else x.dtype) for x in self.memory)
        controller = tuple(x.to(*args, **kwargs) for x in self.controller)
        return MemoryState(controller, type(self.memory)(*memory), reads)

    def reset(self, mask: Tensor, start: MemoryState | None = None) -> MemoryState:
        """Take the samples where ``mask`` is True back to the start of a sequence, and leave the others.

        Differentiable; no gradient passes a reset to what was before it.

        Args:
            mask: bool [B], on the device of the state; of shape [] for an unbatched state.
            start: the state to start from, of one sample: ``layer.initial_state(1)`` of a layer whose memory_start is
                "learned"; by default the constant one.

        Raises:
            TypeError, ValueError: not a bool tensor of that shape, a start of more samples or other sizes, no start where the
                memory's state has no ``initial_like``; RuntimeError: on another device.
        """
        batch, reads = self.reads.shape[:-2], self.reads
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a bool tensor, got {came}")
        if mask.shape != batch:
            raise ValueError(f"mask must have shape {list(batch)}, got {list(mask.shape)}")
        if mask.device != reads.device:
            raise RuntimeError(f"mask must be on the device of the state, {reads.device}, got {mask.device}")

        def zeros(now: Tensor) -> Tensor:
            return now.new_zeros(1, *now.shape[len(batch) :])

        def choose(now: Tensor, start: Tensor) -> Tensor:
            return torch.where(mask.view(*mask.shape, *(1,) * (now.dim() - mask.dim())), start[0], now)

        if start is None:
            if not hasattr(self.memory, "initial_like"):
                kind = type(self.memory).__name__
                raise TypeError(f"start must be given, layer.initial_state(1): {kind} has no initial_like")
            start = MemoryState(
                tuple(map(zeros, self.controller)), self.memory.initial_like(), zeros(self.reads)
            )
        elif start.reads.shape != (1, *reads.shape[-2:]):
            expected = [1, *reads.shape[-2:]]
            raise ValueError(
                f"start must be of one sample, its reads of shape {expected}, got {list(start.reads.shape)}"
            )
        return self._map(choose, start)


def check_state(
    state: object,
    like: StateLike,
    controller: tuple[str, ...] | None,
    sizes: tuple[int, int, int],
    x: Tensor,
    batch: tuple[int, ...],
) -> None:
    """A state with a memory as ``like``, of the dtype and on the device of x.

    controller: the names of its tensors, None where they are its own to check. sizes: hidden_size, R and D. batch: (B,), or ()
    unbatched. Raises as :meth:`MemoryLayer.forward`.
    """
    if not isinstance(state, MemoryState):
        raise TypeError(f"state must be a MemoryState or None, got {type(state).__name__}")
    kept = () if controller is None else state.controller
    well_formed = isinstance(kept, tuple) and len(kept) == len(controller or ())
    if not (well_formed and isinstance(state.memory, like.type)):
        kind = "a controller's state" if controller is None else f"({', '.join(controller)})"
        raise TypeError(f"state must be a MemoryState of {kind}, an {like.type.__name__} and reads")
    hidden_size, *of_reads = sizes
    wide = memory_dtype(x.dtype)
    of_controller = (
        (f"controller.{name}", part, (hidden_size,), x.dtype)
        for name, part in zip(controller or (), kept, strict=True)
    )
    of_memory = (
        (f"memory.{name}", part, shape, dtype or wide)
        for part, (name, shape, dtype) in zip(state.memory, like.parts, strict=True)
    )
    for name, part, shape, dtype in (*of_controller, *of_memory, ("reads", state.reads, of_reads, x.dtype)):
        if not isinstance(part, Tensor):
            raise TypeError(f"state.{name} must be a tensor, got {type(part).__name__}")
        if part.shape != (*batch, *shape):
            raise ValueError(f"state.{name} must have shape {[*batch, *shape]}, got {list(part.shape)}")
        if part.dtype != dtype:
            raise TypeError(f"state.{name} must have dtype {dtype}, got {part.dtype}")
        if part.device != x.device:
            raise RuntimeError(f"state.{name} must be on the device of x, {x.device}, got {part.device}")


def register_state(kind: type[Any]) -> None:
    """Let ``torch.export.save`` write programs that take or give such a NamedTuple, and ``torch.load`` read it as it is by
    default (``weights_only=True``). The process that loads it has to have called this, too.

    Args:
        kind: the class. Those of mann_fast are registered. Registering one again changes nothing.

    Raises:
        TypeError: not a NamedTuple.
    """
    if not _pytree.is_namedtuple_class(kind):
        raise TypeError(f"kind must be a NamedTuple class, got {kind!r}")
    if kind not in _pytree.SUPPORTED_NODES:
        name = f"{kind.__module__}.{kind.__qualname__}"
        _pytree._register_namedtuple(kind, serialized_type_name=name)
        torch.serialization.add_safe_globals([kind])
