"""Samples of a batch that begin anew or end in the middle of a sequence: what every scan takes for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from .._state import START
from ._declare import Argument

NAMES = ("resets", "lengths", "start")


def of_sequences(resets_axes: str) -> tuple[Argument, ...]:
    """The arguments of an op; of a raw op resets and start come together."""
    return (
        Argument(
            NAMES[0], resets_axes, dtype=torch.bool, optional=True, differentiable=False, within="flags"
        ),
        Argument(NAMES[1], "B", dtype=torch.int64, optional=True, differentiable=False, within="up to T"),
        Argument(NAMES[2], "N D", like="memory", optional=True),
    )


Values = tuple[Tensor | None, Tensor | None, Tensor | None]
NO_SEQUENCES: Values = (None, None, None)


def raw_sequences(
    memory: Tensor, steps: int, resets: Any, lengths: Any, start: Any, *, value: float = START
) -> Values:
    """The values of these as the raw op takes them, from the public ones, whose shapes are checked already. value: of every
    number of a memory at the start of a sequence, where it is not said."""
    if lengths is not None:
        check_lengths(lengths, steps)
    if resets is None:
        if start is not None:
            raise TypeError("start is where a sample goes at a reset: resets must be given with it, got None")
    elif start is None:
        start = memory.new_full(memory.shape[1:], value)
    return resets, lengths, start


def _traced() -> bool:
    """Whether what is computed now is written down, to be run with other values."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or get_proxy_mode() is not None
    )


def is_plain(x: Tensor) -> bool:
    """Whether a tensor has values of its own, and no compiler or transform looks at what is computed with it."""
    return (
        x.device.type != "meta"
        and type(x) is Tensor  # not what a compiler traces with
        and not (_traced() or torch._C._are_functorch_transforms_active())
    )


def may_look(x: Tensor) -> bool:
    """Whether the values of a tensor can be asked for, and soon."""
    return x.device.type == "cpu" and is_plain(x)


def check_lengths(lengths: Tensor, steps: int) -> None:
    """Each within [0, T]. On a GPU, and while a compiler looks on, it is an assertion, which fails when it is run."""
    while not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(lengths):
        lengths = torch._C._functorch.get_unwrapped(lengths)
    fits = ((lengths >= 0) & (lengths <= steps)).all()
    if _traced() or lengths.device.type != "cpu" or isinstance(lengths, FakeTensor):
        torch._assert_async(fits, "lengths must be within [0, T]")
    elif not fits:
        raise ValueError(f"lengths must be within [0, T = {steps}], got {lengths.tolist()}")
