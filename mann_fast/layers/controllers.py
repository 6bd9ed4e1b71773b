"""The built-in controllers of a MemoryLayer, as modules that are called and as functions of their parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..reference.cell import CONTROLLERS, gru, lstm

# Of parameters; beside them there are those of torch's tracers, and subclasses that compute for themselves, such as DTensor.
PLAIN = (nn.Parameter, Tensor, type(None))
MODULES = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "feedforward": nn.Linear}


def state_names(kind: str) -> tuple[str, ...]:
    """Of the tensors [B, hidden_size] that a built-in controller keeps; () of a module, whose state is its own."""
    return CONTROLLERS[kind][1] if kind in CONTROLLERS else ()


def obstacle(name: str, module: nn.Module, expected: type[nn.Module]) -> str | None:
    """None where the parameters of a module, by name, say all that it computes; else why it has to be called itself.

    A parametrized module of torch.nn computes with what its parameters' names give, and needs no call.
    """
    kind = type(module)
    if kind is not expected and (kind := parametrize.type_before_parametrizations(module)) is not expected:
        return f"{name} is a {kind.__module__}.{kind.__qualname__}, not an nn.{expected.__name__}"
    if "forward" in module.__dict__:
        return f"{name} has a forward of its own"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or nn.modules.module._has_any_global_hook()
    ):
        return f"{name} has hooks"
    for of, parameter in module._parameters.items():
        if type(parameter) not in PLAIN and is_traceable_wrapper_subclass(parameter):
            check_whole(f"{name}.{of}", parameter)
            return f"{name}.{of} is a {type(parameter).__name__}"
    return None


def check_whole(name: str, parameter: Tensor) -> None:
    """TypeError for a parameter that is sharded over processes, in a module without the hooks by which FSDP and tensor
    parallelism compute with such a one."""
    from torch.distributed.tensor import DTensor

    if isinstance(parameter, DTensor):
        raise TypeError(
            f"{name} must be a whole tensor while the layer computes, got a DTensor on {parameter.device_mesh}: "
            "shard with fully_shard(layer), or a linear layer with parallelize_module (docs/distributed.md)"
        )


def weights(module: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Weight and bias of the input of an ``nn.Linear`` or a cell, and of its hidden state where it has one; in ``dtype``. A
    bias that it does not have is 0."""
    if isinstance(module, nn.Linear):
        return *_convert(module, "weight", "bias", dtype), None, None
    of_input = _convert(module, "weight_ih", "bias_ih", dtype)
    return *of_input, *_convert(module, "weight_hh", "bias_hh", dtype)


def _convert(module: nn.Module, of_weight: str, of_bias: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight: Any = module._parameters.get(of_weight)  # sooner than an attribute
    bias: Any = module._parameters.get(of_bias)
    if weight is None:  # parametrized, or a replica of nn.DataParallel
        weight = getattr(module, of_weight)
    if bias is None:
        bias = getattr(module, of_bias)
    if bias is None:
        bias = weight.new_zeros(weight.shape[0])
    # Each by itself: some train half-precision weights beside float32 biases.
    return (
        weight if weight.dtype == dtype else weight.to(dtype),
        bias if bias.dtype == dtype else bias.to(dtype),
    )


def linear(name: str, module: nn.Module, x: Tensor) -> Tensor:
    """``nn.Linear`` in x's dtype; a module that has to be called is called."""
    if obstacle(name, module, nn.Linear) is not None:
        return module(x)
    weight, bias, *_ = weights(module, x.dtype)
    return F.linear(x, weight, bias)


def step(
    kind: str, controller: nn.Module, z: Tensor, state: tuple[Tensor, ...], hidden_size: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Hidden state and state after a step, from input and reads z [B, input_size + R D], in z's dtype.

    Raises ValueError and TypeError where a module that is called returns something else.
    """
    if kind == "module":
        hidden, state = controller(z, state)
    elif kind == "feedforward":
        hidden, state = torch.tanh(linear("controller", controller, z)), ()
    elif obstacle("controller", controller, MODULES[kind]) is None:
        weight, bias, hidden_weight, hidden_bias = weights(controller, z.dtype)
        assert hidden_weight is not None and hidden_bias is not None
        if torch._C._are_functorch_transforms_active():  # torch's own cells have no batching rule
            gates, recurrent = F.linear(z, weight, bias), F.linear(state[0], hidden_weight, hidden_bias)
            state = (lstm if kind == "lstm" else gru)(gates, recurrent, *state)
        elif kind == "gru":
            state = (torch.gru_cell(z, state[0], weight, hidden_weight, bias, hidden_bias),)
        else:
            state = torch.lstm_cell(z, state, weight, hidden_weight, bias, hidden_bias)
        hidden = state[0]
    elif kind == "gru":
        hidden = controller(z, *state)
        state = (hidden,)
    else:
        hidden, *_ = state = controller(z, state)
    if not isinstance(hidden, Tensor) or hidden.shape != (z.shape[0], hidden_size):
        shape = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        expected = [z.shape[0], hidden_size]
        raise ValueError(f"controller must return hidden of shape [B, hidden_size] = {expected}, got {shape}")
    if not isinstance(state, tuple):
        raise TypeError(f"controller must return its state as a tuple, got {type(state).__name__}")
    return hidden, state
