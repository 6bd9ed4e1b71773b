"""What the states of layers and memories have in common: NamedTuples of tensors, nested or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeGuard, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

Tree = TypeVar("Tree")


SIZE_MAX = 2**31 - 1  # of one axis: kernels count in 32 bits
START = 1e-6  # every number of an LRUA or NTM memory at the start of a sequence (Collier and Beel 2018, arXiv 1807.08518)


def is_dense(value: object) -> bool:
    """A tensor whose numbers lie in memory one by one, where a kernel can take them."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not (value.is_nested or value.is_quantized)
    )


def check_dense(name: str, value: object) -> None:
    """A tensor that is not sparse, nested, quantized or of another library's layout."""
    if is_dense(value):
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
    raise TypeError(
        f"{name} must be a dense tensor, got {'a quantized tensor' if value.is_quantized else kind}"
    )


def check_size(name: str, size: object, least: int) -> None:
    """An int of at least ``least``. In torch.jit's traces sizes are tensors, whose values are nobody's to look at."""
    if isinstance(size, Tensor) and torch.jit.is_tracing() and size.dim() == 0 and size.dtype == torch.int64:
        return
    if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(size).__name__}")
    if size < least:
        raise ValueError(f"{name} must be at least {least}, got {size}")
    # Of a symbol, compilers would take the question for a bound on what they compile for.
    if not torch.compiler.is_compiling() and isinstance(size, int) and size > SIZE_MAX:
        raise ValueError(f"{name} must be at most 2^31 - 1 = {SIZE_MAX}, got {size}")


def check_initial(kind: str, value: object, dtype: torch.dtype, **sizes: tuple[object, int]) -> None:
    """What the start of a memory is made from; of each size what it is and the least that it may be."""
    for name, (size, least) in sizes.items():
        check_size(name, size, least)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"value must be a number, got {type(value).__name__}")
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype of an {kind} state must be torch.float32 or torch.float64, got {dtype}")


def is_plain(state: object) -> TypeGuard[Sequence[Any]]:
    """A tuple or list that is no NamedTuple: what many a program makes of nested tuples that it maps over."""
    return isinstance(state, (tuple, list)) and not hasattr(state, "_fields")


def describe(state: object) -> str:
    return f"a {type(state).__name__} of {len(state)}" if is_plain(state) else type(state).__name__


def map_tensors(function: Callable[..., Any], state: Tree, *others: Tree) -> Tree:
    """``function`` of every tensor of nested tuples, and of those in the same place of others of the same form; None stays."""
    if state is None:
        return state
    if not isinstance(state, (tuple, list)):
        return function(state, *others)
    parts = [map_tensors(function, *part) for part in zip(state, *others, strict=True)]
    return tuple(parts) if is_plain(state) else type(state)(*parts)  # type: ignore[return-value]


def tensors_of(state: object) -> Iterator[Any]:
    """The tensors of nested tuples, in order; there is none in the place of None."""
    if isinstance(state, (tuple, list)):
        for part in state:
            yield from tensors_of(part)
    elif state is not None:
        yield state


def check_alike(name: str, state: Any, like: Any, axes: int, batch: Sequence[int]) -> None:
    """That ``state`` has tensors as ``like`` has, but of the leading sizes ``batch``, where like has ``axes`` of them.

    Raises TypeError, ValueError, and RuntimeError for another device.
    """
    if like is None:
        if state is not None:
            raise TypeError(f"{name} must be None, got {describe(state)}")
        return
    if not isinstance(like, Tensor):
        if is_plain(like):
            alike = is_plain(state) and len(state) == len(like)
        else:
            alike = type(state) is type(like)
        if not alike:
            raise TypeError(f"{name} must be {describe(like)}, got {describe(state)}")
        fields = getattr(like, "_fields", None)
        for i, (part, like_part) in enumerate(zip(state, like, strict=True)):
            of_part = f"{name}[{i}]" if fields is None else f"{name}.{fields[i]}"
            check_alike(of_part, part, like_part, axes, batch)
        return
    check_dense(name, state)
    expected = [*batch, *like.shape[axes:]]
    if list(state.shape) != expected:
        raise ValueError(f"{name} must have shape {expected}, got {list(state.shape)}")
    if state.dtype != like.dtype:
        raise TypeError(f"{name} must have dtype {like.dtype}, got {state.dtype}")
    if state.device != like.device:
        raise RuntimeError(f"{name} must be on {like.device}, got {state.device}")


class State:
    """The methods of a state, which is a NamedTuple of tensors [B, ...] and of tuples of them; all but detach differentiable.
    Where an option of a memory leaves a tensor out, None stands in its place.

    (A second base: a class of typing.NamedTuple can have no other, only a subclass of one.)
    """

    __slots__ = ()

    _sized_by: ClassVar[str] = "memory"  # the field of shape [B, ..., ...]

    @property
    def _batch(self) -> torch.Size:
        """[B], or [] of an unbatched state."""
        part = getattr(self, self._sized_by)
        check_dense(f"{type(self).__name__}.{self._sized_by}", part)
        return part.shape[:-2]

    def map(self, function: Callable[..., Any], *others: Self) -> Self:
        """A state with ``function(tensor)`` in place of every tensor; with other states of the same form
        ``function(tensor, other, ...)`` of those in the same place."""
        return map_tensors(function, self, *others)

    def clone(self) -> Self:
        """A copy, with its history."""
        return self.map(torch.clone)

    def detach(self) -> Self:
        """The same numbers without their history, for truncated backpropagation through time."""
        return self.map(Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or convert every tensor, as ``Tensor.to``; integers are moved alone."""

        def convert(x: Tensor) -> Tensor:
            return (
                x.to(*args, **kwargs)
                if x.is_floating_point()
                else x.to(x.new_empty(0).to(*args, **kwargs).device)
            )

        return self.map(convert)

    def select(self, index: int | slice | list[int] | list[bool] | Tensor) -> Self:
        """The samples ``index`` of a batch: of every tensor ``tensor[index]``.

        Args:
            index: which along B. An int, or an integer tensor [], gives the state of that one sample without the axis B, as
                unbatched input takes it; a slice, a list of ints, an integer tensor [K], a list of B bools or a bool tensor
                [B] keep the axis. Tensors are int32, int64 or bool, on the CPU or on the device of the state.

        Raises:
            TypeError, ValueError: another type, dtype or shape, or a state that has no axis B; IndexError: out of range;
                RuntimeError: on another device.
        """
        if len(self._batch) != 1:
            raise ValueError("select needs a state with the axis B, but this one is of an unbatched call")
        return self.map(_selection(index, self._batch[0], next(tensors_of(self)).device))

    @classmethod
    def cat(cls, states: Iterable[Self]) -> Self:
        """Join states along B.

        Args:
            states: at least one; all of the same memory, controller, sizes, dtypes and device, each of any B.

        Raises:
            TypeError, ValueError: no states, not of this class, not alike, or a state that has no axis B; RuntimeError: on
                different devices.
        """
        states = list(states)
        if not states:
            raise ValueError("states must be at least one, got none")
        for i, state in enumerate(states):
            name = f"states[{i}]"
            if not isinstance(state, cls):
                raise TypeError(f"{name} must be {cls.__name__}, got {describe(state)}")
            batch = state._batch
            if len(batch) != 1:
                raise ValueError(f"{name} must have the axis B, but is of an unbatched call")
            check_alike(name, state, states[0], 1, batch)
        return map_tensors(lambda *parts: torch.cat(parts), *states)

    def flatten(self) -> list[Tensor]:
        """All tensors in order, those of inner tuples in their place; :meth:`unflatten` is the way back."""
        return list(tensors_of(self))

    def unflatten(self, tensors: Iterable[Tensor]) -> Self:
        """A state of the form of this one that holds other tensors, in the order of :meth:`flatten`; of any sizes.

        Raises:
            TypeError, ValueError: not tensors, or more or fewer than this state has.
        """
        tensors, count = list(tensors), len(self.flatten())
        if len(tensors) != count:
            raise ValueError(f"tensors must be {count}, as many as flatten() gives, got {len(tensors)}")
        for i, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"tensors[{i}] must be a tensor, got {type(tensor).__name__}")
        rest = iter(tensors)
        return self.map(lambda _: next(rest))


def _selection(index: Any, batch: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """``tensor[index]`` of tensors of ``batch`` samples on ``device``; what can be checked without its numbers is."""
    numbers: list[int] = []
    if isinstance(index, list):
        kinds = {type(i) for i in index}
        if kinds not in (set(), {int}, {bool}):
            raise TypeError(f"index must be a list of ints or of bools, got {index}")
        if kinds != {bool}:
            numbers = index
        elif len(index) != batch:
            raise ValueError(f"index must be B = {batch} bools, got {len(index)}")
    elif isinstance(index, Tensor):
        check_dense("index", index)
        if index.dtype not in (torch.bool, torch.int32, torch.int64):
            raise TypeError(f"index must be a tensor of bool, int32 or int64, got {index.dtype}")
        if index.dtype == torch.bool and index.shape != (batch,):
            raise ValueError(
                f"index must have shape [B] = {[batch]} as it is a mask, got {list(index.shape)}"
            )
        if index.dim() > 1:
            raise ValueError(f"index must have shape [K] or [], got {list(index.shape)}")
        if index.device.type != "cpu" and index.device != device:
            raise RuntimeError(f"index must be on the device of the state, {device}, got {index.device}")
    elif isinstance(index, int) and not isinstance(index, bool):
        numbers = [index]
    elif not isinstance(index, slice):
        raise TypeError(f"index must be an int, slice, list or tensor, got {type(index).__name__}")
    for i in numbers:
        if not -batch <= i < batch:
            raise IndexError(f"index must be within [-B, B) = [{-batch}, {batch}), got {i}")
    return lambda tensor: tensor[index]
