"""Samples of a batch that begin anew or end in the middle of a sequence: what the layers' ``resets`` and ``lengths`` say, and
sequences that come packed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch._higher_order_ops.scan import scan
from torch.nn.utils.rnn import PackedSequence

from .._state import check_dense, map_tensors, tensors_of
from ..ops._sequences import check_lengths, may_look
from ..reference.sequences import where
from .base import MemoryWeights
from .state import MemoryState


class Rows(NamedTuple):
    """Where the rows of a PackedSequence are in a batch of ``steps`` and ``batch`` that is not sorted: ``places`` [n], counted
    time first."""

    places: Tensor
    steps: int
    batch: int

    def put(self, rows: Tensor, value: float = 0) -> Tensor:
        """The rows [n, K] in their places of [T, B, K], with ``value`` elsewhere."""
        return _put(rows, self.places, (self.steps, self.batch), value)

    def take(self, x: Tensor) -> Tensor:
        """The rows [n, K] of x [T, B, K]."""
        return x.flatten(0, 1).index_select(0, self.places)


class Sequences(NamedTuple):
    """What is known of the samples of a batch, time first and with the axis B."""

    resets: Tensor | None = None  # bool [T, B]: before which steps a sample begins anew
    lengths: Tensor | None = None  # int64 [B]
    taken: Tensor | None = None  # bool [T, B]: the steps within these
    rows: Rows | None = None  # of a PackedSequence

    @property
    def begins(self) -> Tensor | None:
        """bool [T, B]: where a loop of steps goes on from a sequence's start: at resets, and where a sample has ended, so that
        all is finite there. None for nowhere."""
        if self.taken is None:
            return self.resets
        return ~self.taken if self.resets is None else self.resets | ~self.taken


def of_padded(x: Tensor, resets: Any, lengths: Any, batch_first: bool) -> Sequences:
    """From what ``forward`` was given, laid out as x [T, B, K], [B, T, K] or [T, K].

    Raises TypeError, ValueError: of another type, dtype, shape or value; RuntimeError: on another device.
    """
    batched, time = x.dim() == 3, int(batch_first and x.dim() == 3)
    if resets is not None:
        axes = "T" if not batched else "B, T" if batch_first else "T, B"
        _check("resets", resets, torch.bool, axes, x.shape[:-1], x.device)
        resets = resets.t() if time else resets if batched else resets.unsqueeze(1)
    taken = None
    if lengths is not None:
        _check(
            "lengths",
            lengths,
            torch.int64,
            "B" if batched else "",
            x.shape[1 - time : 2 - time] if batched else x.shape[:0],
            x.device,
        )
        check_lengths(lengths, x.shape[time])
        lengths = lengths if batched else lengths.unsqueeze(0)
        taken = steps_taken(lengths, x.shape[time])
    return Sequences(resets, lengths, taken)


def of_packed(packed: PackedSequence, resets: object, lengths: object) -> Sequences:
    """Those of a PackedSequence, which has its lengths; TypeError for others beside it."""
    if lengths is not None:
        raise TypeError(
            f"lengths must be None beside a PackedSequence, which has its own, got {type(lengths).__name__}"
        )
    if resets is not None:
        raise TypeError(
            "resets must be None beside a PackedSequence: give the padded x, lengths and resets, got "
            f"{type(resets).__name__}"
        )
    sizes, device = packed.batch_sizes, packed.data.device
    steps, batch = sizes.shape[0], int(sizes[0])
    there = torch.arange(batch) < sizes.unsqueeze(1)  # of the sorted samples, as the sizes on the CPU
    step, sample = (place.to(device) for place in there.nonzero(as_tuple=True))
    length = there.sum(0).to(device)
    if packed.sorted_indices is not None:
        sample, length = packed.sorted_indices[sample], length[packed.unsorted_indices]
    rows = Rows(step * batch + sample, steps, batch)
    return Sequences(None, length, steps_taken(length, steps), rows)


@_disable_dynamo  # as torch.compiler.disable, but the import of torch._dynamo takes seconds
def packed_uncompiled(forward: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """A forward of a PackedSequence under torch.compile, which gets what is around it: here sizes are values of a tensor."""
    return forward(*arguments, **options)


def steps_taken(lengths: Tensor, steps: int, batch_first: bool = False) -> Tensor:
    """bool [T, B], or [B, T] with ``batch_first``: the steps before each sample's length [B]; [T] of a length []."""
    at = torch.arange(steps, device=lengths.device)
    if lengths.dim() and not batch_first:
        at = at.unsqueeze(1)
    return at < (lengths.unsqueeze(1) if lengths.dim() and batch_first else lengths)


class Turn:
    """The samples of x from their last step to their first, each within its length; and back, since twice is as it was.

    x, resets, lengths: as ``forward`` takes them. Raises as :func:`of_padded` and :func:`of_packed`.
    """

    def __init__(self, x: Any, resets: Tensor | None, lengths: Tensor | None, batch_first: bool):
        known = (
            of_packed(x, resets, lengths)
            if isinstance(x, PackedSequence)
            else of_padded(x, resets, lengths, batch_first)
        )
        self._batched = known.rows is not None or x.dim() == 3
        self._time = int(batch_first and known.rows is None and self._batched)  # the axis of x
        steps = x.shape[self._time] if known.rows is None else known.rows.steps
        self._places: Tensor | None = None  # [T, B]: where each step comes from
        end: int | Tensor = steps
        if known.lengths is not None:
            end = known.lengths
            at = torch.arange(steps, device=end.device).unsqueeze(1)
            self._places = torch.where(at < end, end - 1 - at, at)
        if known.rows is not None:
            assert self._places is not None
            row = known.rows.put(torch.arange(known.rows.places.shape[0], device=x.data.device).unsqueeze(1))
            self._rows = known.rows.take(row.gather(0, self._places.unsqueeze(2))).squeeze(1)
        self.resets: Tensor | None = None  # laid out as x
        if known.resets is not None:  # a piece's last step is the one before a reset
            at = torch.arange(1, steps + 1, device=known.resets.device).unsqueeze(1)
            turned = self._around(known.resets.roll(-1, 0) & (at < end))
            self.resets = turned.t() if self._time else turned if self._batched else turned.squeeze(1)

    def _around(self, x: Tensor) -> Tensor:
        """Of [T, B, ...]."""
        if self._places is None:
            return x.flip(0)
        return x.gather(0, self._places.view(*self._places.shape, *(1,) * (x.dim() - 2)).expand_as(x))

    def around(self, x: Any) -> Any:
        """Of a tensor laid out as x, or a PackedSequence as x."""
        if isinstance(x, PackedSequence):
            return x._replace(data=x.data.index_select(0, self._rows))
        if not self._batched:
            return self._around(x.unsqueeze(1)).squeeze(1)
        return self._around(x.transpose(0, self._time)).transpose(0, self._time)

    def weights(self, weights: MemoryWeights) -> MemoryWeights:
        return map_tensors(self._around, weights)


def each(
    function: Callable[[Tensor], Tensor], x: Tensor, taken: Tensor | None, by_rows: bool = True
) -> Tensor:
    """``function`` of x [..., K] along its last axis: where ``taken`` [...] is False, 0, whatever x holds, and no gradient.

    Nothing is computed there where that can be known without waiting: on a CPU, in eager mode. by_rows: whether the function
    may get rows [n, K] instead of the shape of x.
    """
    if taken is None:
        return function(x)
    if by_rows and may_look(taken):
        return each_taken(function, x, taken)
    taken = taken.unsqueeze(-1)
    # Ones: not every module of a user's own has a finite gradient at 0.
    return torch.where(taken, function(torch.where(taken, x, 1)), 0)


def each_taken(function: Callable[[Tensor], Tensor], x: Tensor, taken: Tensor) -> Tensor:
    """As :func:`each`, and the function sees nothing of x but the rows that are ``taken``, wherever x is."""
    places = taken.flatten().nonzero().squeeze(1)
    if places.shape[0] == taken.numel():
        return function(x)
    rows = x.flatten(0, taken.dim() - 1).index_select(0, places)
    return _put(function(rows), places, taken.shape)


def each_step(flags: Tensor | None, steps: int) -> list[Tensor | None]:
    """The flags [B] of every step; None where they are all False, if that can be known without waiting."""
    if flags is None:
        return [None] * steps
    if not may_look(flags):
        return list(flags.unbind(0))
    return [now if some else None for now, some in zip(flags.unbind(0), flags.any(1).tolist(), strict=True)]


def scan_steps(
    step: Callable[..., tuple[Tensor, MemoryState, Any]],
    x: Tensor,
    begins: Tensor | None,
    ended: Tensor | None,
    state: MemoryState,
) -> tuple[Tensor, MemoryState]:
    """All steps for a compiler, which sees one for any number of them: output [T, B, H + R D], and the last state."""
    like = state.memory

    def own(part: Tensor) -> Tensor:  # a scan takes no views, and the same strides after every step
        return part.clone(memory_format=torch.contiguous_format)

    def plain(state: MemoryState) -> tuple[Any, ...]:  # nor other tuples
        return tuple(map(own, state.controller)), tuple(map(own, tensors_of(state.memory))), own(state.reads)

    def named(carried: tuple[Any, ...]) -> MemoryState:
        controller, memory, reads = carried
        rest = iter(memory)
        return MemoryState(tuple(controller), map_tensors(lambda _: next(rest), like), reads)

    def one(carried: tuple[Any, ...], now: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], Tensor]:
        x, *flags = now
        begins_now = None if begins is None else flags[0]
        output, state, _ = step(x, begins_now, None if ended is None else flags[-1], named(carried))
        return plain(state), output

    flags = tuple(part for part in (begins, ended) if part is not None)
    carried, output = scan(one, plain(state), (x, *flags))
    return output, named(carried)


def restart(state: MemoryState, mask: Tensor, first: MemoryState) -> MemoryState:
    """The state where mask [B] is False, else a sequence's start: the memory of ``first``, of one sample, and a controller and
    reads of zeros. Nothing of the state passes there, no NaN and no gradient."""

    def zero(now: Tensor) -> Tensor:
        now = _of_samples(now, mask)
        return where(~mask, now, now.new_zeros(()))  # no number, beside which flags would become integers

    memory = map_tensors(partial(where, mask), first.memory, state.memory)
    return MemoryState(map_tensors(zero, state.controller), memory, where(~mask, state.reads, 0))


def keep(state: MemoryState, mask: Tensor, before: MemoryState) -> MemoryState:
    """The state where mask [B] is False, else that before the step. (A controller that had none yet: zeros.)"""

    def choose(now: Tensor, old: Tensor | None = None) -> Tensor:
        now = _of_samples(now, mask)
        if old is not None and old.shape != now.shape:
            raise ValueError(
                "controller must keep tensors of the same shapes at every step where lengths are given, got "
                f"{list(now.shape)} after {list(old.shape)}"
            )
        return where(~mask, now, now.new_zeros(()) if old is None else old)

    kept = (before.controller,) if before.controller else ()
    return MemoryState(
        map_tensors(choose, state.controller, *kept),
        map_tensors(partial(where, mask), before.memory, state.memory),
        where(mask, before.reads, state.reads),
    )


def mask_weights(weights: MemoryWeights, taken: Tensor | None) -> MemoryWeights:
    """0 where a sample takes no part."""
    if taken is None:
        return weights
    return map_tensors(lambda x: torch.where(taken.view(*taken.shape, *(1,) * (x.dim() - 2)), x, 0), weights)


def _check(
    name: str, value: Any, dtype: torch.dtype, axes: str, shape: torch.Size, device: torch.device
) -> None:
    check_dense(name, value)
    if value.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {value.dtype}")
    if value.shape != shape:
        raise ValueError(f"{name} must have shape [{axes}] = {list(shape)}, got {list(value.shape)}")
    if value.device != device:
        raise RuntimeError(f"{name} must be on the device of x, {device}, got {value.device}")


def _put(rows: Tensor, places: Tensor, shape: tuple[int, ...], value: float = 0) -> Tensor:
    count = 1
    for size in shape:
        count *= size
    whole = rows.new_full((count, rows.shape[1]), value).index_put_(
        (places,), rows
    )  # index_copy_ has no vmap
    return whole.view(*shape, rows.shape[1])


def _of_samples(part: Any, mask: Tensor) -> Tensor:
    """Of the state of a controller, which may be a module of the user's own."""
    if not isinstance(part, Tensor) or part.shape[:1] != mask.shape:
        came = list(part.shape) if isinstance(part, Tensor) else type(part).__name__
        raise ValueError(
            f"controller must keep tensors [B, ...] where resets or lengths are given, B = {mask.shape[0]}, got {came}"
        )
    return part
