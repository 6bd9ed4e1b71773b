"""The built-in controllers of a MemoryLayer, as modules of torch.nn and as functions of their parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..reference.cell import CONTROLLERS, gru, lstm

MODULES = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "feedforward": nn.Linear}


def state_names(kind: str) -> tuple[str, ...]:
    """Of the tensors [B, hidden_size] that a built-in controller keeps; () of a module, whose state is its own."""
    return CONTROLLERS[kind][1] if kind in CONTROLLERS else ()


def weights(controller: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Weight and bias of a built-in controller's input, and of its hidden state where it has one; in ``dtype``."""
    if isinstance(controller, nn.Linear):
        return controller.weight.to(dtype), controller.bias.to(dtype), None, None
    assert isinstance(controller, nn.RNNCellBase)
    assert controller.bias_ih is not None and controller.bias_hh is not None
    parts = (controller.weight_ih, controller.bias_ih, controller.weight_hh, controller.bias_hh)
    weight, bias, hidden_weight, hidden_bias = (part.to(dtype) for part in parts)
    return weight, bias, hidden_weight, hidden_bias


def step(
    kind: str, controller: nn.Module, z: Tensor, state: tuple[Tensor, ...], hidden_size: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Hidden state and state after a step, from input and reads z [B, input_size + R D], in z's dtype.

    Raises ValueError and TypeError where a module of the user's own returns something else.
    """
    if kind == "module":
        hidden, state = controller(z, state)
        if not isinstance(hidden, Tensor) or hidden.shape != (z.shape[0], hidden_size):
            shape = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            expected = [z.shape[0], hidden_size]
            raise ValueError(
                f"controller must return hidden of shape [B, hidden_size] = {expected}, got {shape}"
            )
        if not isinstance(state, tuple):
            raise TypeError(f"controller must return its state as a tuple, got {type(state).__name__}")
        return hidden, state
    weight, bias, hidden_weight, hidden_bias = weights(controller, z.dtype)
    if hidden_weight is None or hidden_bias is None:
        return torch.tanh(F.linear(z, weight, bias)), ()
    if torch._C._are_functorch_transforms_active():  # torch's own cells have no batching rule
        gates, recurrent = F.linear(z, weight, bias), F.linear(state[0], hidden_weight, hidden_bias)
        state = (lstm if kind == "lstm" else gru)(gates, recurrent, *state)
    elif kind == "gru":
        state = (torch.gru_cell(z, state[0], weight, hidden_weight, bias, hidden_bias),)
    else:
        state = torch.lstm_cell(z, state, weight, hidden_weight, bias, hidden_bias)
    return state[0], state
