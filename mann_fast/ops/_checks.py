"""Argument checks of the public ops: every error names the argument, what was expected and what came."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from .._state import SIZE_MAX, check_dense
from ._declare import Argument, Raw, Sizes, fixed_sizes

STATE_DTYPES = (torch.float32, torch.float64)
HALF_DTYPES = (torch.bfloat16, torch.float16)

# In torch.jit's traces each check would warn that it looks at a size. As torch has it for its own modules; what a trace cannot
# take later, such as another T where the steps are a loop, raises there.
warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"mann_fast\.")

# What has passed: a step is called T times with the same shapes, and each check counts.
_passed: dict[tuple[Any, ...], Any] = {}


def check_tensors(
    arguments: tuple[Argument, ...],
    names: Sequence[str] | None,
    values: Sequence[Any],
    *,
    steps: bool = True,
    choices: Collection[Any] = (),
    known: Callable[[], Sizes] = dict,
    then: Callable[[Sizes], Any] = lambda sizes: sizes,
) -> Any:
    """Tensors of the axes, dtypes and device that their declaration asks for.

    names: what the caller knows them by, where their declaration does not say it. steps: whether those with an axis [T] have
    it. known: sizes of axes beforehand. then: what to give back, of the size of every axis. Both follow from ``choices``, which
    are options, and from what the tensors are: what has passed once is not looked at again.
    """
    key = result = None
    if not (torch.compiler.is_compiling() or torch._C._is_tracing()):  # torch.jit asks twice
        try:
            kinds = [None if x is None else (x.shape, x.dtype, x.device, x.layout) for x in values]
            # With their types: True is equal to 1, but no number here.
            key = (id(arguments), steps, *choices, *map(type, choices), *kinds)
            result = _passed.get(key)
        # Not a tensor; a nested one, which has no shape; or what cannot be looked up: symbolic sizes, as make_fx has them, or
        # an array, which is no choice.
        except (AttributeError, RuntimeError, TypeError):
            key = None
    if result is None:
        result = then(_check_tensors(arguments, names, values, steps, known(), key is not None))
        if key is not None:
            if len(_passed) > 1000:
                _passed.clear()
            _passed[key] = result
    return result


def _check_tensors(
    arguments: tuple[Argument, ...],
    names: Sequence[str] | None,
    values: Sequence[object],
    steps: bool,
    sizes: Sizes,
    bounded: bool,
) -> Sizes:
    """bounded: sizes must not be too large. Of symbols no compiler is to learn a bound."""
    names = names or [argument.name for argument in arguments]
    came: dict[str, tuple[str, torch.dtype]] = {}
    for argument, name, value in zip(arguments, names, values, strict=True):
        if value is None and argument.optional:
            continue
        axes = argument.names if steps else argument.step_names
        shape = check_shape(name, value, axes)
        sizes |= fixed_sizes(axes)
        for axis, size in zip(axes, shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                expected = [sizes.get(axis, size) for axis, size in zip(axes, shape, strict=True)]
                raise ValueError(
                    f"{name} must have shape [{', '.join(axes)}] = {expected}, got {list(shape)}"
                )
        if argument.dtype is not None:
            if value.dtype != argument.dtype:
                raise TypeError(f"{name} must be {argument.dtype}, got {value.dtype}")
        elif argument.like is None:
            if value.dtype not in STATE_DTYPES:
                raise TypeError(f"{name} must be torch.float32 or torch.float64, got {value.dtype}")
            if 0 in shape[1:]:
                raise ValueError(f"{name} [{', '.join(axes)}] may be empty in B only, got {list(shape)}")
        else:
            _check_dtype(name, value.dtype, *came[argument.like], argument.half)
        if argument.heads_in == "" and sizes["R"] < 1:
            raise ValueError(f"{name} [{', '.join(axes)}] must have at least one head, got {list(shape)}")
        if argument.heads_in and not 1 <= sizes["R"] <= sizes[argument.heads_in]:
            limit = f"{argument.heads_in} = {sizes[argument.heads_in]}"
            raise ValueError(
                f"{name} [{', '.join(axes)}] must have 1 <= R <= {limit} heads, got {list(shape)}"
            )
        if bounded and max(shape) > SIZE_MAX:
            raise ValueError(
                f"{name} [{', '.join(axes)}] must have sizes of at most 2^31 - 1 = {SIZE_MAX}, got {list(shape)}"
            )
        if not came:
            first, device = name, value.device
        elif value.device != device:
            raise RuntimeError(f"{name} must be on the device of {first}, {device}, got {value.device}")
        came[argument.name] = name, value.dtype
    return sizes


def check_shape(name: str, value: Any, axes: Sequence[str]) -> torch.Size:
    """A dense tensor with as many axes; its shape."""
    check_dense(name, value)
    if value.dim() != len(axes):
        raise ValueError(f"{name} must have shape [{', '.join(axes)}], got {list(value.shape)}")
    return value.shape


def _check_dtype(name: str, dtype: torch.dtype, like_name: str, like: torch.dtype, half: bool) -> None:
    if dtype == like:
        return
    if not half:
        raise TypeError(f"{name} must have the dtype of {like_name}, {like}, got {dtype}")
    if like != torch.float32 or dtype not in HALF_DTYPES:
        halves = ", or torch.bfloat16 or torch.float16" if like == torch.float32 else ""
        raise TypeError(f"{name} must have dtype {like}, the dtype of {like_name}{halves}, got {dtype}")


def check_tuple(name: str, value: object, kind: Any) -> None:
    """As many entries as the NamedTuple ``kind`` has; a plain tuple will do."""
    if not isinstance(value, tuple) or len(value) != len(kind._fields):
        expected = f"{kind.__name__} ({', '.join(kind._fields)})"
        article = "an" if expected[0] in "ALN" else "a"
        raise TypeError(f"{name} must be {article} {expected}, got {type(value).__name__}")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        kind = type(value)
        of_others = "" if kind.__module__ == "builtins" else f"{kind.__module__}."  # NumPy has a bool, too
        raise TypeError(f"{name} must be a bool, got {of_others}{kind.__name__}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:  # an array would be compared item by item
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}")


# Of options: what their ``raw`` may be.


def number(within: Callable[[float], bool], expected: str, kind: str = "a number") -> Raw:
    def raw(name, value, known):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be {kind}, got {type(value).__name__}")
        if not within(value):
            raise ValueError(f"{name} must be {expected}, got {value}")
        return float(value)

    return raw


fraction = number(lambda x: 0 <= x < 1, "within [0, 1)")


def choice(choices: Sequence[str], yes: str) -> Raw:
    """One of two, and whether it is ``yes``."""

    def raw(name, value, known):
        check_choice(name, value, choices)
        return value == yes

    return raw


def flag(name: str, value: Any, known: Mapping[str, Any]) -> Any:
    check_flag(name, value)
    return value


def count(least: int, axis: str) -> Raw:
    """At most as many as the axis is long."""

    def raw(name, value, known):
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if not least <= value <= known[axis]:
            raise ValueError(f"{name} must be within [{least}, {axis} = {known[axis]}], got {value}")
        return value

    return raw


def shown(value: object) -> str:
    """A value in an error's one line."""
    text = repr(value)
    return text if len(text) <= 80 and "\n" not in text else type(value).__name__
