"""A whole MANN sequence: controller, heads and memory, LRUA's (Santoro et al. 2016, arXiv 1605.06065), a Neural Turing
Machine's (Graves et al. 2014, arXiv 1410.5401), a Differentiable Neural Computer's (Graves et al. 2016, Nature 538, 471) or one
with sparse access (Rae et al. 2016, arXiv 1610.09027), written to be read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .dnc import DNCInterface, DNCState, dnc_step
from .lrua import LRUAState, lrua_step
from .ntm import NTMHead, NTMState, ntm_step
from .sequences import Steps
from .sparse import SparseState, sparse_step

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


def ntm_head_sizes(num_heads: int, slot_size: int, max_shift: int | None) -> list[int]:
    """How many values a Neural Turing Machine's heads have: of the read heads and then of the write heads keys and sharpness,
    and but where ``max_shift`` is None gates, shifts and sharpening; then erase and add vectors."""
    vectors = num_heads * slot_size
    location = [] if max_shift is None else [num_heads, num_heads * (2 * max_shift + 1), num_heads]
    addressing = [vectors, num_heads, *location]
    return [*addressing, *addressing, vectors, vectors]


def split_ntm_heads(
    values: Tensor, num_heads: int, slot_size: int, max_shift: int | None
) -> tuple[NTMHead, NTMHead, Tensor, Tensor]:
    """Read heads, write heads, erase and add [B, R, D] from the heads' values [B, sum of ntm_head_sizes]. Where ``max_shift``
    is None, nothing is kept of the step before, nothing moves, nothing is sharpened."""
    *parts, erase, add = values.split_with_sizes(ntm_head_sizes(num_heads, slot_size, max_shift), 1)

    def vectors(x: Tensor) -> Tensor:
        return torch.unflatten(x, 1, (num_heads, slot_size))

    def head(key: Tensor, sharpness: Tensor, *location: Tensor) -> NTMHead:
        sharpness = 1 + F.softplus(sharpness)
        if max_shift is None:
            gate = sharpening = torch.ones_like(sharpness)
            shift = gate.unsqueeze(2)
        else:
            gate, shift, sharpening = location
            shift = torch.softmax(torch.unflatten(shift, 1, (num_heads, 2 * max_shift + 1)), dim=2)
            gate, sharpening = torch.sigmoid(gate), 1 + F.softplus(sharpening)
        return NTMHead(vectors(torch.tanh(key)), sharpness, gate, shift, sharpening)

    half = len(parts) // 2
    return head(*parts[:half]), head(*parts[half:]), vectors(torch.sigmoid(erase)), vectors(torch.tanh(add))


def dnc_parts(
    num_heads: int, slot_size: int, *, link: bool, masks: bool, link_sharpening: bool
) -> dict[str, tuple[int, ...]]:
    """Of the values of a Differentiable Neural Computer's heads: for which tensor of DNCInterface each part is, and its sizes
    without B."""
    heads, size = (num_heads,), (slot_size,)
    parts = {
        "read_keys": heads + size,
        "read_sharpness": heads,
        "write_key": size,
        "write_sharpness": (),
        "erase": size,
        "write_vector": size,
        "free_gates": heads,
        "allocation_gate": (),
        "write_gate": (),
    }
    if link:
        parts["read_modes"] = (*heads, 3)
    if masks:
        parts |= {"read_masks": heads + size, "write_mask": size}
    if link_sharpening:
        parts["link_sharpening"] = (*heads, 2)
    return parts


def dnc_head_sizes(num_heads: int, slot_size: int, **options: bool) -> list[int]:
    """How many values each part of :func:`dnc_parts` has."""
    return [math.prod(sizes) for sizes in dnc_parts(num_heads, slot_size, **options).values()]


def split_dnc_heads(
    values: Tensor,
    num_heads: int,
    slot_size: int,
    *,
    link: bool,
    masks: bool,
    mask_min: float,
    link_sharpening: bool,
    clip: float | None,
) -> DNCInterface:
    """The interface from the heads' values [B, sum of dnc_head_sizes], taken within [-clip, clip] where that is not None. Keys
    and the write vector are taken as they are; sharpness goes through 1 + softplus, the read modes of a head through a softmax,
    all else through a sigmoid, and a mask from ``mask_min`` up."""
    if clip is not None:
        # Values of exactly -clip and clip have their gradient whole; that of clamp there differs from torch to torch.
        values = torch.where(values.abs() > clip, values.detach().clamp(-clip, clip), values)
    parts = dnc_parts(num_heads, slot_size, link=link, masks=masks, link_sharpening=link_sharpening)

    def squash(name: str, x: Tensor) -> Tensor:
        if name in ("read_keys", "write_key", "write_vector"):
            return x
        if "sharp" in name:
            return 1 + F.softplus(x)
        if name == "read_modes":
            return torch.softmax(x, -1)
        if "mask" in name:
            return mask_min + (1 - mask_min) * torch.sigmoid(x)
        return torch.sigmoid(x)

    split = values.split_with_sizes([math.prod(sizes) for sizes in parts.values()], 1)
    squashed = {
        name: squash(name, part.reshape(part.shape[0], *sizes))
        for (name, sizes), part in zip(parts.items(), split, strict=True)
    }
    return DNCInterface(**squashed)


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
    heads, slot_size = reads.shape[1:]

    def of_memory(memory: LRUAState, values: Tensor) -> tuple[Tensor, LRUAState]:
        inputs = split_heads(values, heads, slot_size, write_vector, sharpness)
        options: dict[str, Any] = {"order": order, "write_target": write_target}
        return step(memory, *inputs, **options, usage_decay=usage_decay, eps=eps)

    if gates.shape[0] == 0:
        memory = memory._replace(usage=memory.usage.detach())
    weights = (hidden_weight, hidden_bias, reads_weight, head_weight, head_bias)
    return sequence(
        gates, state, memory, reads, *weights, controller, Steps(resets, lengths, start), of_memory
    )


def ntm_cell(
    gates: Tensor,
    state: tuple[Tensor, ...],
    memory: NTMState,
    reads: Tensor,
    hidden_weight: Tensor | None,
    hidden_bias: Tensor | None,
    reads_weight: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    *,
    controller: str = "lstm",
    max_shift: int | None = 1,
    order: str = "read_first",
    eps: float = 1e-6,
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    step: Callable[..., tuple[Tensor, NTMState]] = ntm_step,
) -> tuple[Tensor, tuple[Tensor, ...], NTMState, Tensor]:
    """See :func:`mann_fast.ops.ntm_cell`. ``step`` takes the place of :func:`ntm_step`."""
    heads, slot_size = reads.shape[1:]

    def of_memory(memory: NTMState, values: Tensor) -> tuple[Tensor, NTMState]:
        return step(memory, *split_ntm_heads(values, heads, slot_size, max_shift), order=order, eps=eps)

    weights = (hidden_weight, hidden_bias, reads_weight, head_weight, head_bias)
    return sequence(
        gates, state, memory, reads, *weights, controller, Steps(resets, lengths, start), of_memory
    )


def dnc_cell(
    gates: Tensor,
    state: tuple[Tensor, ...],
    memory: DNCState,
    reads: Tensor,
    hidden_weight: Tensor | None,
    hidden_bias: Tensor | None,
    reads_weight: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    *,
    controller: str = "lstm",
    masks: bool = False,
    mask_min: float = 0.0,
    deallocate: bool = False,
    link_sharpening: bool = False,
    clip: float | None = None,
    eps: float = 1e-6,
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    step: Callable[..., tuple[Tensor, DNCState]] = dnc_step,
) -> tuple[Tensor, tuple[Tensor, ...], DNCState, Tensor]:
    """See :func:`mann_fast.ops.dnc_cell`. ``step`` takes the place of :func:`dnc_step`."""
    heads, slot_size = reads.shape[1:]
    of_heads: dict[str, Any] = {"link": memory.links is not None, "masks": masks, "mask_min": mask_min}
    of_heads |= {"link_sharpening": link_sharpening, "clip": clip}

    def of_memory(memory: DNCState, values: Tensor) -> tuple[Tensor, DNCState]:
        told = split_dnc_heads(values, heads, slot_size, **of_heads)
        return step(memory, told, deallocate=deallocate, eps=eps)

    weights = (hidden_weight, hidden_bias, reads_weight, head_weight, head_bias)
    return sequence(
        gates, state, memory, reads, *weights, controller, Steps(resets, lengths, start), of_memory
    )


def sparse_head_sizes(num_heads: int, slot_size: int) -> list[int]:
    """How many values a sparse memory's heads have: keys and write vectors, gates, sharpness and write gates."""
    return [*head_sizes(num_heads, slot_size, "separate", "learned"), num_heads]


def split_sparse_heads(values: Tensor, num_heads: int, slot_size: int) -> tuple[Tensor, ...]:
    """Keys and write vectors [B, R, D], gate logits, sharpness and write gate logits [B, R], from the heads' values
    [B, sum of sparse_head_sizes]."""
    rest, write_gate = values.split([values.shape[1] - num_heads, num_heads], 1)
    key, vector, gate, sharpness = split_heads(rest, num_heads, slot_size, "separate", "learned")
    assert sharpness is not None
    return key, vector, gate, sharpness, write_gate


def sparse_cell(
    gates: Tensor,
    state: tuple[Tensor, ...],
    memory: SparseState,
    reads: Tensor,
    hidden_weight: Tensor | None,
    hidden_bias: Tensor | None,
    reads_weight: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    *,
    controller: str = "lstm",
    threshold: float = 0.005,
    eps: float = 1e-6,
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    step: Callable[..., tuple[Tensor, SparseState]] = sparse_step,
) -> tuple[Tensor, tuple[Tensor, ...], SparseState, Tensor]:
    """See :func:`mann_fast.ops.sparse_cell`. ``step`` takes the place of :func:`sparse_step`."""
    heads, slot_size = reads.shape[1:]

    def of_memory(memory: SparseState, values: Tensor) -> tuple[Tensor, SparseState]:
        return step(memory, *split_sparse_heads(values, heads, slot_size), threshold=threshold, eps=eps)

    weights = (hidden_weight, hidden_bias, reads_weight, head_weight, head_bias)
    return sequence(
        gates, state, memory, reads, *weights, controller, Steps(resets, lengths, start), of_memory
    )


def sequence(
    gates: Tensor,
    state: tuple[Tensor, ...],
    memory: Any,
    reads: Tensor,
    hidden_weight: Tensor | None,
    hidden_bias: Tensor | None,
    reads_weight: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    controller: str,
    sequences: Steps,
    step: Callable[[Any, Tensor], tuple[Tensor, Any]],
) -> tuple[Tensor, tuple[Tensor, ...], Any, Tensor]:
    """The whole sequence; ``step`` is the memory's, from its state and the heads' values."""
    batch, heads, slot_size = reads.shape
    if gates.shape[0] == 0:
        output = gates.new_empty(0, batch, head_weight.shape[1] + heads * slot_size)
        return output, tuple(x.clone() for x in state), memory.clone(), reads.clone()
    outputs: list[Tensor] = []
    for t, now in enumerate(
        gates.unbind(0)
    ):  # which torch.jit's traces refuse for another T; gates[t] they cut short
        before, kept = memory, (reads, *state)
        memory = sequences.begin(t, memory)
        reads, *parts = sequences.zero(t, *kept)
        state = tuple(parts)
        (now,) = sequences.inputs(t, now)
        now = torch.addmm(now, reads.flatten(1), reads_weight.t())
        if hidden_weight is None or hidden_bias is None:  # feed-forward
            hidden = torch.tanh(now)
        else:
            recurrent = torch.addmm(hidden_bias, state[0], hidden_weight.t())
            state = (lstm if controller == "lstm" else gru)(now, recurrent, *state)
            hidden = state[0]
        values = torch.addmm(head_bias, hidden, head_weight.t())
        reads, memory = step(memory, values)
        outputs += sequences.outputs(t, torch.cat([hidden, reads.flatten(1)], dim=1))
        memory = sequences.finish(t, memory, before)
        reads, *parts = sequences.end(t, (reads, *state), kept)
        state = tuple(parts)
    return torch.stack(outputs), state, memory, reads
