"""Argument checks of the public ops: every error names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STATE_DTYPES = (torch.float32, torch.float64)
HALF_DTYPES = (torch.bfloat16, torch.float16)


def check_tensor(name: str, value: object, axes: str) -> None:
    """A tensor with as many axes as named in ``axes``, for instance "B N D"."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    if value.dim() != len(axes.split()):
        raise ValueError(f"{name} must have shape [{axes.replace(' ', ', ')}], got {list(value.shape)}")


def check_shape(name: str, value: object, axes: str, sizes: Sequence[int]) -> None:
    check_tensor(name, value, axes)
    if value.shape != tuple(sizes):
        raise ValueError(
            f"{name} must have shape [{axes.replace(' ', ', ')}] = {list(sizes)}, got {list(value.shape)}"
        )


def check_state_dtype(name: str, value: Tensor) -> None:
    if value.dtype not in STATE_DTYPES:
        raise TypeError(f"{name} must be torch.float32 or torch.float64, got {value.dtype}")


def check_like(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Same dtype and device as another argument."""
    if value.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, got {value.dtype}")
    check_device(name, value, other_name, other)


def check_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise RuntimeError(f"{name} must be on the device of {other_name}, {other.device}, got {value.device}")


def check_input_dtype(name: str, value: Tensor, memory: Tensor) -> None:
    """The dtype of keys and their kin: the memory's, or half precision beside a float32 memory."""
    if value.dtype != memory.dtype and not (value.dtype in HALF_DTYPES and memory.dtype == torch.float32):
        expected = f"{memory.dtype}, the dtype of memory"
        if memory.dtype == torch.float32:
            expected += ", or torch.bfloat16 or torch.float16"
        raise TypeError(f"{name} must have dtype {expected}, got {value.dtype}")
    check_device(name, value, "memory", memory)


def check_sizes(name: str, value: Tensor, axes: str, positive: str) -> None:
    """The axes named in ``positive`` may not be empty."""
    for axis, size in zip(axes.split(), value.shape, strict=True):
        if axis in positive.split() and size < 1:
            raise ValueError(f"{name} [{axes.replace(' ', ', ')}] must have {axis} >= 1, got {list(value.shape)}")


def check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def check_eps(eps: object) -> None:
    check_number("eps", eps)
    if not 0 < eps < float("inf"):
        raise ValueError(f"eps must be positive and finite, got {eps}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def refuse_second_derivative(op: str, *tensors: Tensor | None) -> None:
    """Raise where a backward pass is itself recorded: its result would silently count as a constant."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise NotImplementedError(
            f"{op} has no second derivative (create_graph=True or a gradient of a gradient); "
            "use mann_fast.reference or `with mann_fast.backend('reference')` for that"
        )
