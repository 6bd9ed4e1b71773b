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


def check_like(
    name: str, value: object, axes: str, sizes: Sequence[int], like_name: str, like: Tensor
) -> None:
    """A tensor of these sizes, with the dtype and on the device of another argument."""
    if (
        isinstance(value, Tensor)
        and value.shape == sizes
        and value.dtype == like.dtype
        and value.device == like.device
    ):
        return  # nearly always: a step is called T times, and each check counts
    check_tensor(name, value, axes)
    if value.shape != tuple(sizes):
        raise ValueError(
            f"{name} must have shape [{axes.replace(' ', ', ')}] = {list(sizes)}, got {list(value.shape)}"
        )
    if value.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of {like_name}, {like.dtype}, got {value.dtype}")
    if value.device != like.device:
        raise RuntimeError(f"{name} must be on the device of {like_name}, {like.device}, got {value.device}")


def check_state(name: str, value: object, axes: str) -> None:
    """A memory or usage: float32 or float64, no axis but the batch (the first) empty."""
    check_tensor(name, value, axes)
    if value.dtype not in STATE_DTYPES:
        raise TypeError(f"{name} must be torch.float32 or torch.float64, got {value.dtype}")
    if 0 in value.shape[1:]:
        raise ValueError(
            f"{name} [{axes.replace(' ', ', ')}] may be empty in B only, got {list(value.shape)}"
        )


def check_input(name: str, value: object, axes: str, sizes: Sequence[int], memory: Tensor) -> None:
    """Keys and their kin: of the memory's dtype, or half precision beside a float32 memory."""
    half = isinstance(value, Tensor) and value.dtype in HALF_DTYPES and memory.dtype == torch.float32
    if half and value.shape == sizes and value.device == memory.device:
        return
    if isinstance(value, Tensor) and value.dtype != memory.dtype and not half:
        expected = f"{memory.dtype}, the dtype of memory"
        if memory.dtype == torch.float32:
            expected += ", or torch.bfloat16 or torch.float16"
        raise TypeError(f"{name} must have dtype {expected}, got {value.dtype}")
    check_like(name, value, axes, sizes, "memory", memory.to(value.dtype) if half else memory)


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


def records_gradient(*tensors: Tensor | None) -> bool:
    """Whether a call must go through autograd: to be differentiated, or to refuse forward-mode differentiation, which
    a raw op would answer with a silent zero."""
    if not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def apply(function: type[torch.autograd.Function], *arguments):
    """``function.apply``, without the 30 us that binding the arguments to a signature takes in eager mode."""
    if torch.compiler.is_compiling():
        # Dynamo takes no tensor twice, as where a head writes its key.
        seen: list[Tensor] = []
        distinct = []
        for x in arguments:
            if isinstance(x, Tensor):
                x = x.view_as(x) if any(x is y for y in seen) else x
                seen.append(x)
            distinct.append(x)
        return function.apply(*distinct)
    if torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)


class _RefuseSecondDerivative(torch.autograd.Function):
    """Hands gradients through, and raises where they are themselves differentiated."""

    @staticmethod
    def forward(op, count, *gradients_and_inputs):
        return tuple(g.view_as(g) for g in gradients_and_inputs[:count])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            f"{ctx.op} has no second derivative; "
            "use mann_fast.reference or `with mann_fast.backend('reference')` for that"
        )


def refuse_second_derivative(
    op: str, gradients: tuple[Tensor, ...], *inputs: Tensor | None
) -> tuple[Tensor, ...]:
    """The gradients, made to depend on the inputs of a backward pass that is itself recorded (create_graph=True, or
    torch.func): else they would silently count as constants."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _RefuseSecondDerivative.apply(op, len(gradients), *gradients, *inputs)
    return gradients
