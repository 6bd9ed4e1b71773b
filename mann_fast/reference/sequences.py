"""Samples of a batch that begin anew or end in the middle of a sequence."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._state import State

AnyState = TypeVar("AnyState", bound=State)


def where(mask: Tensor, x: Tensor, other: Tensor | float) -> Tensor:
    """x [B, ...] of the samples where mask [B] is True, else the other, which may lack the axis B."""
    return torch.where(mask.view(mask.shape[0], *(1,) * (x.dim() - 1)), x, other)


def restart(state: AnyState, mask: Tensor, start: Tensor | None) -> AnyState:
    """The state where mask [B] is False, else the start of a sequence, with the memory ``start`` [N, D] or the constant one.

    Nothing of the state passes where mask is True: no value, no NaN, no gradient.
    """
    first: Any = state.initial_like()  # type: ignore[attr-defined]
    if start is not None:
        first = type(first)(start, *first[1:])
    return state.map(lambda now, x: where(mask, x.expand_as(now), now), first)


class Steps:
    """Which samples begin anew before a step t, and which have ended.

    resets: bool [T, B]; lengths: int64 [B]. Either may be None, which changes nothing. A sample that has ended takes part in
    the steps all the same, as one that is at its start and of which everything comes in as 1, and of what it gives nothing
    is taken: so not even a NaN gets from its padding, or to it, or into a gradient.
    """

    def __init__(self, resets: Tensor | None, lengths: Tensor | None, start: Tensor | None = None):
        self.resets, self.lengths, self.start = resets, lengths, start

    def _begins(self, t: int) -> Tensor | None:
        ended = None if self.lengths is None else t >= self.lengths
        if self.resets is None or ended is None:
            return ended if self.resets is None else self.resets[t]
        return self.resets[t] | ended

    def begin(self, t: int, state: AnyState) -> AnyState:
        """The memory's state that step t takes."""
        mask = self._begins(t)
        return state if mask is None else restart(state, mask, self.start)

    def zero(self, t: int, *parts: Tensor) -> tuple[Tensor, ...]:
        """What a controller keeps, as step t takes it."""
        mask = self._begins(t)
        return parts if mask is None else tuple(where(~mask, x, 0) for x in parts)

    def inputs(self, t: int, *parts: Any) -> tuple[Any, ...]:
        """The inputs of step t, as it takes them; None stays."""
        if self.lengths is None:
            return parts
        return tuple(x if x is None else where(t < self.lengths, x, 1) for x in parts)

    def outputs(self, t: int, *parts: Tensor) -> tuple[Tensor, ...]:
        """What comes out at step t: 0 where the sample has ended."""
        if self.lengths is None:
            return parts
        return tuple(where(t < self.lengths, x, 0) for x in parts)

    def finish(self, t: int, after: AnyState, before: AnyState) -> AnyState:
        """The memory's state after step t."""
        states: tuple[Any, Any] = (after, before)
        return type(states[0])(*self.end(t, *states))

    def end(self, t: int, after: Iterable[Any], before: Iterable[Any]) -> Iterable[Any]:
        """The tensors of a state after step t: those before it where the sample has ended; None stays."""
        if self.lengths is None:
            return after
        return [
            x if x is None else where(t < self.lengths, x, old) for x, old in zip(after, before, strict=True)
        ]
