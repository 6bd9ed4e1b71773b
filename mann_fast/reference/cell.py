"""A whole MANN sequence: controller, heads and LRUA memory (Santoro et al. 2016, arXiv 1605.06065), written to be read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .lrua import LRUAState, lrua_step
from .sequences import Steps

# Gates per hidden unit, and the tensors of the state that goes round beside the memory.
CONTROLLERS = {"lstm": (4, ("hidden", "cell")), "gru": (3, ("hidden",)), "feedforward": (1, ())}

# A learned sharpness is SHARPNESS_MIN + SHARPNESS_SCALE * softplus(linear(hidden)), about 8 in a new layer.
# It has to start high: the cosine is at most 1, so with a factor of 1 or 2 the softmax over 128 slots is
# almost flat, every read is almost the mean of the memory, and training hardly takes off.
SHARPNESS_MIN = 1.0
SHARPNESS_SCALE = 10.0


def head_sizes(num_heads: int, slot_size: int, write_vector: str, sharpness: str | float | None) -> list[int]:
    """How many values the heads have: keys and write vectors, gates, and sharpness where it is learned."""
    vectors = num_heads * slot_size * (2 if write_vector == "separate" else 1)
    return [vectors, num_heads] + ([num_heads] if sharpness == "learned" else [])


def split_heads(
    values: Tensor, num_heads: int, slot_size: int, write_vector: str, sharpness: str | float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Keys [B, R, D], write vectors [B, R, D], gate logits [B, R] and sharpness [B, R] (or None) from the heads' values
    [B, sum of head_sizes]."""
    vectors, gate, *learned = values.split(head_sizes(num_heads, slot_size, write_vector, sharpness), dim=1)
    shape = (values.shape[0], 2 if write_vector == "separate" else 1, num_heads, slot_size)
    # Where a head writes its key, both are views of the one vector.
    key, vector = torch.tanh(vectors).view(shape).expand(-1, 2, -1, -1).unbind(1)
    beta = None
    if isinstance(sharpness, (int, float)):
        beta = values.new_full(gate.shape, sharpness)
    elif learned:  # in half precision rounded once
        beta = torch.add(values.new_full((), SHARPNESS_MIN), F.softplus(learned[0]), alpha=SHARPNESS_SCALE)
    return key, vector, gate, beta


def lstm(gates: Tensor, recurrent: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    input_gate, forget_gate, cell_gate, output_gate = (gates + recurrent).chunk(4, dim=1)
    cell = torch.addcmul(torch.sigmoid(forget_gate) * cell, torch.sigmoid(input_gate), torch.tanh(cell_gate))
    return torch.sigmoid(output_gate) * torch.tanh(cell), cell


def gru(gates: Tensor, recurrent: Tensor, hidden: Tensor) -> tuple[Tensor]:
    size = 2 * hidden.shape[1]
    reset, update = torch.sigmoid(gates[:, :size] + recurrent[:, :size]).chunk(2, dim=1)
    candidate = torch.tanh(torch.addcmul(gates[:, size:], reset, recurrent[:, size:]))
    return (torch.lerp(candidate, hidden, update),)


def cell(
    gates: Tensor,
    state: tuple[Tensor, ...],
    memory: LRUAState,
    reads: Tensor,
    hidden_weight: Tensor | None,
    hidden_bias: Tensor | None,
    reads_weight: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    *,
    controller: str = "lstm",
    write_vector: str = "separate",
    sharpness: str | float | None = "learned",
    order: str = "write_first",
    write_target: str = "per_head",
    usage_decay: float = 0.95,
    eps: float = 1e-6,
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    step: Callable[..., tuple[Tensor, LRUAState]] = lrua_step,
) -> tuple[Tensor, tuple[Tensor, ...], LRUAState, Tensor]:
    """See :func:`mann_fast.ops.cell`. ``step`` takes the place of :func:`lrua_step`."""
    batch, heads, slot_size = reads.shape
    if gates.shape[0] == 0:
        slots, read_weights, usage = memory
        memory = LRUAState(slots.clone(), read_weights.clone(), usage.detach().clone())
        output = gates.new_empty(0, batch, head_weight.shape[1] + heads * slot_size)
        return output, tuple(x.clone() for x in state), memory, reads.clone()
    sequences = Steps(resets, lengths, start)
    outputs: list[Tensor] = []
    for t in range(gates.shape[0]):
        before, kept = memory, (reads, *state)
        memory = sequences.begin(t, memory)
        reads, *parts = sequences.zero(t, *kept)
        state = tuple(parts)
        (now,) = sequences.inputs(t, gates[t])
        now = torch.addmm(now, reads.flatten(1), reads_weight.t())
        if hidden_weight is None or hidden_bias is None:  # feed-forward
            hidden = torch.tanh(now)
        else:
            recurrent = torch.addmm(hidden_bias, state[0], hidden_weight.t())
            state = (lstm if controller == "lstm" else gru)(now, recurrent, *state)
            hidden = state[0]
        values = torch.addmm(head_bias, hidden, head_weight.t())
        reads, memory = step(
            memory,
            *split_heads(values, heads, slot_size, write_vector, sharpness),
            order=order,
            write_target=write_target,
            usage_decay=usage_decay,
            eps=eps,
        )
        outputs += sequences.outputs(t, torch.cat([hidden, reads.flatten(1)], dim=1))
        memory = LRUAState(*sequences.end(t, memory, before))
        reads, *parts = sequences.end(t, (reads, *state), kept)
        state = tuple(parts)
    return torch.stack(outputs), state, memory, reads
