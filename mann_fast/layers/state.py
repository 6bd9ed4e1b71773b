"""MemoryState: what a MemoryLayer carries from one call to the next."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

from .._state import State, check_alike, check_dense, describe, is_dense, is_plain, map_tensors
from ..ops._checks import HALF_DTYPES
from .base import StateLike


def memory_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the memory of a layer with parameters of this dtype."""
    return torch.float32 if dtype in HALF_DTYPES else dtype


class MemoryState(
    NamedTuple("MemoryState", [("controller", tuple[Tensor, ...]), ("memory", Any), ("reads", Tensor)]), State
):
    """What a MemoryLayer carries from one call to the next.

    controller: (hidden, cell) of an LSTM, (hidden,) of a GRU, each [B, hidden_size], () of a feed-forward one, or the state of
    a module of the user's own. memory: the memory's own NamedTuple of tensors [B, ...], such as
    :class:`mann_fast.ops.LRUAState` of [B, N, D], [B, R, N] and [B, N], :class:`mann_fast.ops.NTMState` or
    :class:`mann_fast.ops.DNCState`. reads: [B, R, D], what the heads read last. After a call on unbatched input no tensor has
    the axis B. All are of the layer's dtype, but the memory is float32 in half precision.
    """

    __slots__ = ()

    _sized_by = "reads"

    def to(self, *args: Any, non_blocking: bool = False, copy: bool = False, **kwargs: Any) -> MemoryState:
        """Move or convert, as ``Tensor.to``; beside a half-precision dtype the memory is float32, and integers stay.

        Raises TypeError where ``non_blocking`` and ``copy`` are not given by name.
        """
        if any(isinstance(argument, bool) for argument in args):
            raise TypeError("non_blocking and copy must be given by name")
        flags: dict[str, Any] = {"non_blocking": non_blocking, "copy": copy}
        reads = self.reads.to(*args, **kwargs | flags)

        def convert(dtype: torch.dtype, x: Tensor) -> Tensor:
            dtype = dtype if x.is_floating_point() else x.dtype
            return x.to(reads.device, dtype, **flags)

        controller = map_tensors(partial(convert, reads.dtype), self.controller)
        return MemoryState(
            controller, map_tensors(partial(convert, memory_dtype(reads.dtype)), self.memory), reads
        )

    def reset(self, mask: Tensor, start: MemoryState | None = None) -> MemoryState:
        """Take the samples where ``mask`` is True back to the start of a sequence, and leave the others.

        Differentiable; no gradient passes a reset to what was before it.

        Args:
            mask: bool [B], on the device of the state; of shape [] for an unbatched state.
            start: the state to start from, of one sample and with the tensors, dtypes and device of this state:
                ``layer.initial_state(1)`` of a layer whose memory_start is "learned" (under autocast
                ``.to(state.reads.dtype)``; with a controller of your own ``._replace(controller=...)``, with what its state
                starts from). By default the memory's constant start and a controller of zeros.

        Raises:
            TypeError, ValueError: not a bool tensor of that shape; a start that is no MemoryState, of another kind of memory or
                controller, of more samples, other sizes or dtypes; no start where the memory's state has no
                ``initial_like``. RuntimeError: on another device.
        """
        batch, reads = self._batch, self.reads
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a bool tensor, got {came}")
        check_dense("mask", mask)
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
            memory = self.memory.initial_like()
            start = MemoryState(map_tensors(zeros, self.controller), memory, zeros(reads))
        elif not isinstance(start, MemoryState):
            raise TypeError(f"start must be a MemoryState of one sample or None, got {describe(start)}")
        check_alike("start", start, self, len(batch), (1,))
        return self.map(choose, start)


def as_state(state: object, like: StateLike, controller: tuple[str, ...] | None) -> MemoryState:
    """A MemoryState with a memory as ``like``. Plain tuples and lists will do in place of its NamedTuples, as a program leaves
    them that maps over a state.

    controller: the names of its tensors, None where they are its own to check. Raises as :meth:`MemoryLayer.forward`.
    """
    if is_plain(state) and len(state) == len(MemoryState._fields):
        state = MemoryState(*state)
    if not isinstance(state, MemoryState):
        plain = f"a plain tuple ({', '.join(MemoryState._fields)})"
        raise TypeError(f"state must be a MemoryState, {plain} or None, got {describe(state)}")
    kept, memory, reads = state
    if is_plain(kept):
        kept = tuple(kept)
    if is_plain(memory) and len(memory) == len(like.parts):
        memory = like.type(*memory)
    well_formed = isinstance(kept, tuple) and (controller is None or len(kept) == len(controller))
    if not (well_formed and isinstance(memory, like.type)):
        kind = "a controller's state" if controller is None else f"({', '.join(controller)})"
        came = f"{describe(state.controller)}, {describe(state.memory)} and reads"
        raise TypeError(
            f"state must be a MemoryState of {kind}, an {like.type.__name__} and reads, got one of {came}"
        )
    named = [] if controller is None else list(zip(controller, kept, strict=True))
    for (name, sizes, _), part in zip(like.parts, memory, strict=True):
        if sizes is None and part is not None:
            raise TypeError(f"state.memory.{name} must be None, got {describe(part)}")
    tensors = [part for (_, sizes, _), part in zip(like.parts, memory, strict=True) if sizes is not None]
    for part in (*(part for _, part in named), *tensors, reads):
        if not is_dense(part):
            named = [(f"controller.{name}", part) for name, part in named]
            named += [(f"memory.{part[0]}", tensor) for part, tensor in zip(like.parts, memory, strict=True)]
            name = next(name for name, value in (*named, ("reads", reads)) if value is part)
            check_dense(f"state.{name}", part)
    return MemoryState(kept, memory, reads)


def check_state(
    state: MemoryState,
    like: StateLike,
    controller: tuple[str, ...] | None,
    sizes: tuple[int, int, int],
    x: Tensor,
    batch: tuple[int, ...],
) -> None:
    """The tensors of what :func:`as_state` gives: their sizes, of the dtype and on the device of x.

    controller: the names of its tensors, None where they are its own to check. sizes: hidden_size, R and D. batch: (B,), or ()
    unbatched. Raises as :meth:`MemoryLayer.forward`.
    """
    hidden_size, *of_reads = sizes
    wide = memory_dtype(x.dtype)
    of_controller = (
        (f"controller.{name}", part, (hidden_size,), x.dtype)
        for name, part in zip(controller or (), state.controller, strict=False)
    )
    of_memory = (
        (f"memory.{name}", part, shape, dtype or wide)
        for part, (name, shape, dtype) in zip(state.memory, like.parts, strict=True)
        if shape is not None
    )
    for name, part, shape, dtype in (*of_controller, *of_memory, ("reads", state.reads, of_reads, x.dtype)):
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
