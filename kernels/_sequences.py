"""Samples that begin anew or end within a scan, for kernels in which a program takes one sample through all steps: ``resets``
[T, B] where RESETS, ``lengths`` [B] where LENGTHS. Where they are absent nothing of this is compiled."""

from __future__ import annotations

import triton
import triton.language as tl

from ._memory import load_memory, store_memory, store_slots


@triton.jit
def steps_of(lengths, T, b, LENGTHS: tl.constexpr):
    """How many steps sample b takes part in."""
    steps = T
    if LENGTHS:
        steps = tl.minimum(tl.maximum(tl.load(lengths + b).to(tl.int32), 0), T)
    return steps


@triton.jit
def replay_from(resets, t, every, B, b, RESETS: tl.constexpr):
    """The first step of the replay by which backward comes to step t: the state before it is known, as an anchor, a start, or
    what came in."""
    first = t // every * every
    if RESETS:
        anchor = first
        first = t
        while (first > anchor) & (tl.load(resets + first * B + b) == 0):
            first -= 1
    return first


@triton.jit
def store_first(weights, n, valid, N: tl.constexpr, HEADS: tl.constexpr):
    """Weights [HEADS, N] as they are at the start of a sequence."""
    first = tl.where(n == 0, 1.0, 0.0).to(weights.dtype.element_ty)
    for h in range(0, HEADS):
        store_slots(weights, h, first, n, valid, N)


@triton.jit
def reset_backward(
    g1, g2, grad_weights, grad_start, n, d1, d2, valid, N: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr
):
    """Back through a reset: the gradient g of the memory after it is added to that of the start, [N, D], and nothing goes on
    to the memory before it or to the weights, whose gradients are grad_weights [HEADS, N]."""
    s1, s2 = load_memory(grad_start, n, d1, d2, valid, D)
    store_memory(grad_start, s1 + g1, s2 + g2, n, d1, d2, valid, D)
    g1, g2 = tl.zeros_like(g1), tl.zeros_like(g2)
    for h in range(0, HEADS):
        store_slots(grad_weights, h, tl.zeros(n.shape, g1.dtype), n, valid, N)
    return g1, g2
