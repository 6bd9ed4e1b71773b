"""lrua_scan in Triton for a memory too large for one program: a loop of steps, each a least_used, lrua_write and content_read,
which split the slots of a sample over programs. All that has a time axis has it first, [T, B, ...]."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.lrua import LRUAState
from ._steps import anchored_memory, begin, begin_backward, product
from .content import content_read, content_read_backward
from .lrua import least_used, lrua_write_backward, write


def _step(memory, read_weights, slots, key, vector, gate, beta, read_first, shared, eps):
    """Read, memory, read weights, write weights."""
    written, write_weights = write(memory, read_weights, slots, vector, gate, shared)
    if not read_first:
        read, weights = content_read(written, key, beta, eps)
    else:
        _, weights = content_read(memory, key, beta, eps)
        read = product(weights, written).to(key.dtype)
    return read, written, weights, write_weights


def _at(inputs, t):
    return [None if x is None else x[t] for x in inputs]


def _anchored_weights(anchor: Tensor, read_weights: Tensor) -> Tensor:
    """The last rows of an anchor [B, D + R, padded N], a view of the shape of ``read_weights`` [B, R, N]."""
    _, heads, num_slots = read_weights.shape
    return anchor[:, -heads:, :num_slots]


def scan(state, inputs, sequences, reads, slots, anchors, options, anchor_every):
    """Writes reads and, if ``anchor_every`` > 0, slots and anchors; the LRUAState after the last step."""
    read_first, shared, usage_decay, eps = options
    if reads.shape[0] == 0:
        return state.clone()
    heads = state.read_weights.shape[1]
    for t in range(reads.shape[0]):
        memory, read_weights, usage = sequences.begin(t, state)
        chosen = least_used(usage, heads)
        if anchor_every > 0:
            slots[t] = chosen
            if t > 0 and t % anchor_every == 0:
                anchor = anchors[t // anchor_every - 1]
                anchored_memory(anchor, memory).copy_(memory)
                _anchored_weights(anchor, read_weights).copy_(read_weights)
        given = sequences.inputs(t, *_at(inputs, t))
        read, memory, read_weights, write_weights = _step(
            memory, read_weights, chosen, *given, read_first, shared, eps
        )
        touched = read_weights + write_weights
        total = touched[:, 0]
        for r in range(1, heads):
            total = total + touched[:, r]
        after = LRUAState(memory, read_weights, usage_decay * usage + total)
        state = LRUAState(*sequences.end(t, after, state))
        (reads[t],) = sequences.outputs(t, read)
    return state


def scan_backward(
    grads, memory, read_weights, inputs, sequences, slots, anchors, options, every, results, grad_start
):
    """Writes the gradients of the inputs into ``results`` and adds to that of the start; those of the memory and the read
    weights."""
    read_first, shared, eps = options
    grad_reads, grad_memory, grad_weights = grads
    grad_memory = torch.zeros_like(memory) if grad_memory is None else grad_memory.clone()
    grad_weights = torch.zeros_like(read_weights) if grad_weights is None else grad_weights.clone()
    for first in reversed(range(0, len(slots), every)):
        last = min(first + every, len(slots))
        state = memory, read_weights
        if first > 0:
            anchor = anchors[first // every - 1]
            kept = anchored_memory(anchor, memory), _anchored_weights(anchor, read_weights)
            state = tuple(x.contiguous() for x in kept)
        steps = []
        for t in range(first, last):
            before = begin(sequences, t, *state)
            given = sequences.inputs(t, *_at(inputs, t))
            _, *state, _ = _step(*before, slots[t], *given, read_first, shared, eps)
            steps.append((given, before, state))
        for t in reversed(range(first, last)):
            (key, vector, gate, beta), (before, old_weights), (after, weights) = steps[t - first]
            grad_read = None if grad_reads is None else grad_reads[t]
            of_after = grad_memory, grad_weights
            addressed, of_read = (before, None) if read_first else (after, grad_read)
            if read_first and grad_read is not None:
                wide = grad_read.to(after.dtype)
                grad_weights = grad_weights + product(wide, after.transpose(1, 2))
                grad_memory = grad_memory + product(weights.transpose(1, 2), wide)
            through, grad_key, grad_beta = content_read_backward(
                of_read, grad_weights, addressed, key, beta, weights, eps
            )
            if not read_first:
                grad_memory = grad_memory + through
            grad_memory, grad_weights, grad_vector, grad_gate = lrua_write_backward(
                grad_memory, None, old_weights, vector, gate, slots[t], shared
            )
            if read_first:
                grad_memory = grad_memory + through
            grad_memory, grad_weights = begin_backward(
                sequences, t, grad_memory, grad_weights, of_after, grad_start
            )
            for result, grad in zip(results, (grad_key, grad_vector, grad_gate, grad_beta), strict=True):
                if grad.numel():
                    (result[t],) = sequences.outputs(t, grad)
    return grad_memory, grad_weights
