"""What an op is: its tensors by their axes, its options, what backward keeps. The rest follows: _register.py, _checks.py."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Sizes = dict[str, int]
# What the raw op takes of a public option, from its name, its value, and whatever is known by name (sizes, other options); it
# raises where the value is wrong.
Raw = Callable[[str, Any, Mapping[str, Any]], Any]


def always(values: Mapping[str, Any]) -> bool:
    return True


@dataclass(frozen=True)
class Argument:
    """A tensor that an op takes.

    axes: the name of every axis, for instance "B N D"; "[T] B R D" where a single step comes without T. An axis of one name
    has one size in all tensors of an op, and one named by a number that size.
    like: the argument whose dtype this has; None where it is of a dtype of its own, float32 or float64.
    dtype: of one that is not floating-point.
    half: may also be bfloat16 or float16, beside a float32 ``like``.
    within: the values that make sense, for tests: "real", "unit" (0 to 1), "shares" (they sum to 1), "from 1", "flags",
        "up to T", "slots" (different ones of N), "times", or "now", which no time is after.
    heads_in: that this tensor has 1 <= R heads, and at most as many as this axis is long; "" where there may be any number.
    """

    name: str
    axes: str
    like: str | None = None
    dtype: torch.dtype | None = None
    half: bool = False
    optional: bool = False
    differentiable: bool = True
    within: str = "real"
    heads_in: str | None = None
    names: tuple[str, ...] = field(init=False)
    step_names: tuple[str, ...] = field(init=False)  # without [T]

    def __post_init__(self):
        names = tuple(self.axes.replace("[T]", "T").split())
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "step_names", names[1:] if self.axes.startswith("[T]") else names)

    @property
    def per_sample(self) -> bool:
        """Whether every sample has its own; else they share it, and the raw backward gives the gradient of each."""
        return "B" in self.names

    def names_of(self, dim: int) -> tuple[str, ...]:
        """The axes of a tensor with so many of them."""
        return self.names if dim == len(self.names) else self.step_names


@dataclass(frozen=True)
class Output:
    """A tensor that an op gives, of the dtype of the argument ``like``.

    kept: for backward alone; the public function does not hand it out.
    when: of the op's values by name, whether there is such an output; where there is none it comes out with shape [0]. What is
    kept is not there either where the op is told to keep nothing.
    """

    name: str
    axes: str
    like: str
    differentiable: bool = True
    kept: bool = False
    integer: bool = False
    when: Callable[[Mapping[str, Any]], bool] = always

    @functools.cached_property
    def argument(self) -> Argument:
        """As an argument of the op's backward."""
        return Argument(self.name, self.axes, self.like)


@dataclass(frozen=True)
class Option:
    """A value that is no tensor; ``type`` as the schema has it, ``default`` as the public function's default comes out.

    raw: None where no public option decides it, which is then the default.
    public: the public option's name, where that is another.
    backward: whether the raw backward takes it too.
    """

    name: str
    type: str
    default: object
    raw: Raw | None = None
    public: str = ""
    backward: bool = True


@dataclass(frozen=True)
class Op:
    """A raw op, forward and backward.

    saved: the arguments and outputs that the raw backward takes, by name; where it is not said all arguments but the
    ``unsaved`` and all that is kept, or nothing where the op has no gradient.
    public: the functions of mann_fast.ops that it serves.
    interval: of the raw op's values and the backend's name, every how many steps something is kept (mann_fast._anchors;
    ``each_step``); for ops whose last option is ``anchor_every``, 0 to keep nothing. Axes A and P are those of anchors.
    layout: of a scan, what <name>_layout takes beside B, N and D, as the schema has it: the raw op of the CUDA kernels that
    tells how a launch takes each of B samples in float32, forward, or backward where anchor_every > 0.
    extents: of the sizes, those of axes that no argument has. An axis may also have the name of an option.
    results, gradients: where the raw backward gives something else than the gradient of every differentiable argument:
    what it gives, and a function of the Function's ctx, its saved tensors and these results that makes the gradients of
    them. also_saved: what that function needs saved besides.
    """

    name: str
    arguments: tuple[Argument, ...]
    options: tuple[Option, ...]
    outputs: tuple[Output, ...]
    saved: tuple[str, ...] = ()
    unsaved: tuple[str, ...] = ()
    public: tuple[str, ...] = ()
    interval: Callable[[tuple[Any, ...], str], int] | None = None
    layout: str = ""
    extents: Callable[[Sizes], Sizes] = lambda sizes: {}
    results: tuple[Output, ...] = ()
    gradients: Callable[..., tuple[Tensor | None, ...]] | None = None
    also_saved: tuple[str, ...] = ()
    names: tuple[str, ...] = field(init=False)  # of the raw op's values: arguments, then options
    num_given: int = field(init=False)  # how many outputs a public function hands out, which come first

    def __post_init__(self):
        if self.interval:
            anchor_every = Option("anchor_every", "SymInt", 0)
            object.__setattr__(self, "options", (*self.options, anchor_every))
        object.__setattr__(self, "names", tuple(x.name for x in (*self.arguments, *self.options)))
        object.__setattr__(self, "num_given", sum(not x.kept for x in self.outputs))
        if not self.saved and any(a.differentiable for a in self.arguments):
            arguments = (a.name for a in self.arguments if a.name not in self.unsaved)
            saved = (*arguments, *(x.name for x in self.outputs if x.kept))
            object.__setattr__(self, "saved", saved)
        if self.saved and not self.results:
            kinds = {a.name: self.dtype_of(a) for a in self.saved_arguments}
            given = {kind: name for name, kind in reversed(kinds.items())}  # the first of each dtype
            results = (
                Output(
                    f"grad_{a.name}",
                    a.axes if a.per_sample else f"B {a.axes}",
                    given[self.dtype_of(a)],
                    when=there(a),
                )
                for a in self.arguments
                if a.differentiable
            )
            object.__setattr__(self, "results", tuple(results))

    def dtype_of(self, argument: Argument) -> str:
        """The argument that has a dtype of its own, which this argument shares."""
        while argument.like and not argument.half:
            argument = next(a for a in self.arguments if a.name == argument.like)
        return argument.name

    def raw_options(self, options: Mapping[str, Any], known: Mapping[str, Any]) -> tuple[Any, ...]:
        """The raw op's options, from the public ones, which are checked. known: sizes of axes, and what options depend on."""
        known = {**known, **options}
        of_public = [(option, option.public or option.name) for option in self.options]
        return tuple(
            x.default if x.raw is None else x.raw(name, known.get(name), known) for x, name in of_public
        )

    @property
    def saved_arguments(self) -> list[Argument]:
        """What the raw backward takes of forward's arguments and outputs."""
        by_name = {
            x.name: x if isinstance(x, Argument) else x.argument for x in (*self.outputs, *self.arguments)
        }
        return [by_name[name] for name in self.saved]

    @property
    def outer(self) -> list[Output]:
        """The outputs whose gradients come into backward."""
        return [x for x in self.outputs if x.differentiable and not x.kept]

    @property
    def backward_options(self) -> list[Option]:
        return [option for option in self.options if option.backward]

    @property
    def schema(self) -> str:
        return _schema(self.name, self.arguments, self.options, self.outputs)

    @property
    def backward_arguments(self) -> list[Argument]:
        outer = (Argument(f"grad_{x.name}", x.axes, optional=True) for x in self.outer)
        return [*outer, *self.saved_arguments]

    @property
    def backward_schema(self) -> str:
        return _schema(f"{self.name}_backward", self.backward_arguments, self.backward_options, self.results)


def after(
    state: Iterable[Argument], like: str = "memory", *, constant: Container[str] = ()
) -> tuple[Output, ...]:
    """The outputs of a state that goes in and comes out. constant: what of it comes out as a constant, with all integers."""
    return tuple(
        Output(
            *(a.name, a.axes, like),
            differentiable=a.dtype is None and a.name not in constant,
            integer=a.dtype is not None,
            when=there(a),
        )
        for a in state
    )


def each_step(values: tuple[Any, ...], backend: str) -> int:
    """The ``interval`` of an op that keeps something of every step: ``anchor_every`` then says only whether it does."""
    return 1


def came(name: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda values: values[name] is not None


def there(argument: Argument) -> Callable[[Mapping[str, Any]], bool]:
    """Whether there is what comes out where this argument came."""
    return came(argument.name) if argument.optional else always


def _schema(name, arguments, options, outputs) -> str:
    takes = [f"Tensor{'?' if a.optional else ''} {a.name}" for a in arguments]
    takes += [f"{option.type} {option.name}" for option in options]
    gives = ", ".join(f"Tensor {x.name}" for x in outputs)
    return f"{name}({', '.join(takes)}) -> " + (f"({gives})" if len(outputs) > 1 else "Tensor")


def fixed_sizes(axes: Iterable[str]) -> Sizes:
    """Of the axes that are named by their size."""
    return {axis: int(axis) for axis in axes if axis.isdigit()}


def sizes_of(arguments, values) -> Sizes:
    """The size of every axis, from tensors that are known to agree."""
    sizes: Sizes = {}
    for argument, value in zip(arguments, values, strict=True):
        if value is None:
            continue
        names = argument.names_of(value.dim())
        if len(names) == value.dim():  # else it is the empty one of an output that there was not
            for axis, size in zip(names, value.shape, strict=True):
                sizes.setdefault(axis, size)
    return sizes
