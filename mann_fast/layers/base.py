"""Memory: what a :class:`mann_fast.MemoryLayer` writes to and reads from. Each kind is a subclass in a file of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .._state import check_size, map_tensors


class MemoryWeights(NamedTuple):
    """Where the heads of a memory were: read and write, [B, R, N]; usage after it, [B, N], of a memory that has one, else None.

    Of a :class:`mann_fast.layers.DNC`, which has one write head, write is [B, 1, N]; and there are modes [B, R, 3], the shares
    of backward, content and forward in each head's read weights (None without links), and allocated [B], the sum of the
    write's weights that went by allocation. Both are None of other memories.

    Of a :class:`mann_fast.layers.Sparse`, read is [B, R, K] and write [B, R, K + 1]; read_slots and write_slots, int64 of
    these shapes, say of which slots. None of other memories.

    From ``layer(x, return_weights=True)`` of every step, with a leading T.
    """

    read: Tensor
    write: Tensor
    usage: Tensor | None
    modes: Tensor | None = None
    allocated: Tensor | None = None
    read_slots: Tensor | None = None
    write_slots: Tensor | None = None


class StateLike(NamedTuple):
    """What a memory's state has to be: its type; of each tensor its name, its sizes without B (None where an option leaves the
    tensor out and None stands in its place), and its dtype, None for that of the memory."""

    type: type[tuple[Any, ...]]
    parts: tuple[tuple[str, tuple[int, ...] | None, torch.dtype | None], ...]


def stack_weights(recorded: Sequence[MemoryWeights | None], steps: int) -> MemoryWeights:
    """Those of the first ``steps`` steps, with a leading T."""
    first, *rest = (weights for weights in recorded if weights is not None)
    return map_tensors(lambda *parts: torch.stack(parts)[:steps], first, *rest)


def check_sizes(**sizes: object) -> None:
    """Positive ints."""
    for name, size in sizes.items():
        check_size(name, size, 1)


@dataclass(frozen=True, kw_only=True)
class Memory(ABC):
    """One kind of memory. A subclass is a frozen dataclass whose fields are its options, with defaults; it holds no tensors.

    At every step the layer's linear ``heads`` turn the controller's hidden state into values [B, V]; ``split`` makes of
    them what the heads address and write with, and ``step`` does both. docs/adding-a-memory.md writes one.

    The state is a NamedTuple of tensors [B, ...], of a type of the memory's own; where an option leaves a tensor out, None
    stands in its place. Its first tensor is what ``memory_start="learned"`` learns. A state type with a method
    ``initial_like()``, which gives the start of one sample with the sizes of that state, can be reset without naming a start.

    Args:
        num_slots, slot_size, num_heads: N, D and R; 1 <= R <= N. Each head reads a vector of D numbers.

    Raises:
        TypeError, ValueError: an option of the wrong type or value; a subclass checks its own in ``__post_init__``.
    """

    num_slots: int = 128
    slot_size: int = 40
    num_heads: int = 4

    fused: ClassVar[bool] = False  # whether `cell` runs a whole sequence in one call
    # Whether torch.compile may trace `step` once for all steps: it changes nothing, and draws no random numbers.
    scans: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)

        def place(*names: str) -> int:  # of the class, or of one of its bases, that says it
            return next(i for i, base in enumerate(cls.__mro__) if vars(base).keys() & set(names))

        if place("split", "step") < place("fused", "cell"):
            cls.fused = False  # the `cell` that it has from its base knows nothing of these

    def __post_init__(self) -> None:
        check_sizes(num_slots=self.num_slots, slot_size=self.slot_size, num_heads=self.num_heads)
        if self.num_heads > self.num_slots:
            raise ValueError(f"num_heads must be at most num_slots = {self.num_slots}, got {self.num_heads}")

    # A file of a model names the classes of all that it holds: what follows from the options is left out, and made again at
    # once, since a call under torch.compile should find it.
    def __getstate__(self) -> dict[str, Any]:
        kind = type(self)
        return {
            name: value
            for name, value in self.__dict__.items()
            if not isinstance(getattr(kind, name, None), cached_property)
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.make_cached()

    def make_cached(self) -> None:
        """All that is made once from the options."""
        kind = type(self)
        for name in dir(kind):
            if isinstance(getattr(kind, name), cached_property):
                getattr(self, name)

    @abstractmethod
    def head_sizes(self) -> list[int]:
        """How many values a step takes from the layer's heads, part by part; V is their sum."""

    def adjust_heads(self, weight: Tensor) -> None:  # noqa: B027, nothing by default
        """Change the weight [V, hidden_size] of new heads in place; called under ``torch.no_grad``."""

    @abstractmethod
    def initial_state(self, batch: int, *, dtype: torch.dtype, device: torch.device) -> Any:
        """The state at the start of a sequence, for B = ``batch`` samples, in float32 or float64.

        Asked for on the device "meta", too, for its sizes alone.
        """

    @cached_property
    def state_like(self) -> StateLike:
        """What a state has to be, from `initial_state`. Raises TypeError where that gives no NamedTuple of tensors [1, ...]."""
        state = self.initial_state(1, dtype=torch.float32, device=torch.device("meta"))
        named = isinstance(state, tuple) and hasattr(state, "_fields") and isinstance(state[0], Tensor)
        parts = [part for part in state if part is not None] if named else []
        if not (named and all(isinstance(part, Tensor) and part.shape[:1] == (1,) for part in parts)):
            raise TypeError(
                f"{type(self).__name__}.initial_state must return a NamedTuple of tensors [B, ...]"
            )
        return StateLike(
            type(state),
            tuple(
                (name, None, None)
                if part is None
                else (name, tuple(part.shape[1:]), None if part.is_floating_point() else part.dtype)
                for name, part in zip(state._fields, state, strict=True)
            ),
        )

    @abstractmethod
    def split(self, values: Tensor) -> Any:
        """Of the values [B, V]: what `step` takes, each part squashed into its range. values may be half precision."""

    @abstractmethod
    def step(self, state: Any, heads: Any, record: bool = False) -> tuple[Tensor, Any, MemoryWeights | None]:
        """Write and read, with what `split` gave.

        Returns what the heads read [B, R, D], of the dtype of the values; the state after the step; and where the heads were,
        which may be None unless ``record``.
        """

    def cell(
        self, *tensors: Any, controller: str, **sequences: Any
    ) -> tuple[Tensor, tuple[Tensor, ...], Any, Tensor]:
        """A whole sequence with a built-in controller in one call, with the tensors and results of :func:`mann_fast.ops.cell`,
        and its resets, lengths and start; called where ``fused``."""
        raise NotImplementedError(f"{type(self).__name__} has no whole sequence in one call")
