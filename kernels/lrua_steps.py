"""lrua_scan in Triton for a memory too large for one program: a loop of steps, each a least_used, lrua_write and content_read,
which split the slots of a sample over programs. All that has a time axis has it first, [T, B, ...]."""

from __future__ import annotations

import torch
from torch import Tensor

from ._steps import anchored_memory, product
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


def scan(state, inputs, reads, slots, anchors, options, anchor_every):
    """Writes reads and, if ``anchor_every`` > 0, slots and anchors; the state after the last step."""
    memory, read_weights, usage = state
    read_first, shared, usage_decay, eps = options
    if reads.shape[0] == 0:
        return memory.clone(), read_weights.clone(), usage.clone()
    heads = read_weights.shape[1]
    for t in range(reads.shape[0]):
        chosen = least_used(usage, heads)
        if anchor_every > 0:
            slots[t] = chosen
            if t > 0 and t % anchor_every == 0:
                anchor = anchors[t // anchor_every - 1]
                anchored_memory(anchor, memory).copy_(memory)
                _anchored_weights(anchor, read_weights).copy_(read_weights)
        reads[t], memory, read_weights, write_weights = _step(
            memory, read_weights, chosen, *_at(inputs, t), read_first, shared, eps
        )
        touched = read_weights + write_weights
        total = touched[:, 0]
        for r in range(1, heads):
            total = total + touched[:, r]
        usage = usage_decay * usage + total
    return memory, read_weights, usage


def scan_backward(grads, memory, read_weights, inputs, slots, anchors, options, every, results):
    """Writes the gradients of the inputs into ``results``; those of the memory and the read weights."""
    read_first, shared, eps = options
    steps = slots.shape[0]
    grad_reads, grad_memory, grad_weights = grads
    grad_memory = torch.zeros_like(memory) if grad_memory is None else grad_memory.clone()
    grad_weights = torch.zeros_like(read_weights) if grad_weights is None else grad_weights.clone()
    for first in reversed(range(0, steps, every)):
        last = min(first + every, steps)
        states = [(memory, read_weights)]
        if first > 0:
            anchor = anchors[first // every - 1]
            kept = anchored_memory(anchor, memory), _anchored_weights(anchor, read_weights)
            states = [tuple(x.contiguous() for x in kept)]
        reads = []
        for t in range(first, last):
            read, *state = _step(*states[-1], slots[t], *_at(inputs, t), read_first, shared, eps)
            reads.append(read)
            states.append(tuple(state[:2]))
        for t in reversed(range(first, last)):
            key, vector, gate, beta = _at(inputs, t)
            (before, old_weights), (after, weights) = states[t - first], states[t - first + 1]
            grad_read = None if grad_reads is None else grad_reads[t]
            addressed, of_read = (before, None) if read_first else (after, grad_read)
            if read_first and grad_read is not None:
                wide = grad_read.to(after.dtype)
                grad_weights = grad_weights + product(wide, after.transpose(1, 2))
                grad_memory = grad_memory + product(weights.transpose(1, 2), wide)
            through, grad_key, grad_beta = content_read_backward(
                of_read, grad_weights, addressed, key, beta, reads[t - first], weights, eps
            )
            if not read_first:
                grad_memory = grad_memory + through
            grad_memory, grad_weights, grad_vector, grad_gate = lrua_write_backward(
                grad_memory, None, old_weights, vector, gate, slots[t], shared
            )
            if read_first:
                grad_memory = grad_memory + through
            for result, grad in zip(results, (grad_key, grad_vector, grad_gate, grad_beta), strict=True):
                if grad.numel():
                    result[t] = grad
    return grad_memory, grad_weights
