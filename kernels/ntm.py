"""ntm_scan in Triton (a step is a scan of one, an address a step without write heads).

One launch per direction: a program takes one sample through all steps and keeps its memory in registers (_memory.py). What a
head has per slot goes through scratch rows where it is shifted, since a shift takes it from one thread to another. An erase
cannot be undone, so backward never divides: it replays the writes, whose weights are kept, from a memory saved every so many
steps, and goes back through the replayed memories.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.sequences import Steps
from . import ntm_steps
from ._launch import BACKWARD, FORWARD, contiguous, launch, new_anchors, new_gradient_of_start, new_steps
from ._memory import (
    copy_slots,
    load_memory,
    load_slots,
    read_slots,
    row_squares,
    store_memory,
    store_slots,
    store_vector,
)
from ._sequences import replay_from, reset_backward, steps_of, store_first
from ._sizes import fits_one_program, resident, scan_sentence
from .ntm_heads import address, address_backward, erase_and_add, read_backward, write_backward

RAW = ("ntm_scan", "ntm_scan_backward")


# ---- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _address_heads(
    a1, a2, keys, sharpness, gates, shifts, sharpening, before, now, ring, first, last, n, d1, d2, valid,
    N: tl.constexpr, D: tl.constexpr, MOVES: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """The weights of heads [first, last) into rows of now."""
    squares = row_squares(a1, a2)
    for h in range(first, last):
        w, _, _, _, _, _, _, _, _, _, _, _ = address(
            a1, a2, squares, keys, sharpness, gates, shifts, sharpening, before, ring, h, n, d1, d2, valid, N, D, MOVES, EPS
        )  # fmt: skip
        store_slots(now, h, w, n, valid, N)


@triton.jit(do_not_specialize=["T", "B", "every"])
def _ntm_scan_kernel(
    memory, weights, keys, sharpness, gates, shifts, sharpening, erase, add, resets, lengths, start, reads, out_memory,
    out_weights, history, anchors, scratch, T, B, every,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, NP: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    LD: tl.constexpr, W: tl.constexpr, MOVES: tl.constexpr, READ_FIRST: tl.constexpr, EPS: tl.constexpr,
    KEEP: tl.constexpr, RESETS: tl.constexpr, LENGTHS: tl.constexpr,
):  # fmt: skip
    """Scratch: weights [2, RW, N], this step's and those of the step before in turn, and gated weights [RW, N]."""
    RW: tl.constexpr = R + W
    b = tl.program_id(0).to(tl.int64)
    n, d1, d2 = tl.arange(0, NP), tl.arange(0, P1), P1 + tl.arange(0, P2)
    valid = n < N
    scratch += b * 3 * RW * N
    ring = scratch + 2 * RW * N
    m1, m2 = load_memory(memory + b * N * D, n, d1, d2, valid, D)
    copy_slots(weights + b * RW * N, scratch, n, valid, RW, N, N)
    tl.debug_barrier()
    steps = steps_of(lengths, T, b, LENGTHS)
    for t in range(0, steps):
        row = t * B + b
        before, now = scratch + (t % 2) * RW * N, scratch + ((t + 1) % 2) * RW * N
        if RESETS:
            if tl.load(resets + row):
                m1, m2 = load_memory(start, n, d1, d2, valid, D)
                store_first(before, n, valid, N, RW)
                tl.debug_barrier()
        if KEEP:
            if (t > 0) & (t % every == 0):
                store_memory(anchors + ((t // every - 1) * B + b) * D * LD, m1, m2, n, d1, d2, valid, D)
        _address_heads(
            m1, m2, keys + row * RW * D, sharpness + row * RW, gates + row * RW, shifts + row * RW * MOVES,
            sharpening + row * RW, before, now, ring, R, RW, n, d1, d2, valid, N, D, MOVES, EPS,
        )  # fmt: skip
        tl.debug_barrier()
        a1, a2 = m1, m2
        m1, m2 = erase_and_add(
            m1, m2, now + R * N, erase + row * W * D, add + row * W * D, n, d1, d2, valid, N, D, W
        )
        if not READ_FIRST:
            a1, a2 = m1, m2
        _address_heads(
            a1, a2, keys + row * RW * D, sharpness + row * RW, gates + row * RW, shifts + row * RW * MOVES,
            sharpening + row * RW, before, now, ring, 0, R, n, d1, d2, valid, N, D, MOVES, EPS,
        )  # fmt: skip
        tl.debug_barrier()
        for h in range(0, RW):
            w = load_slots(now, h, n, valid, N)
            if h < R:
                r1, r2 = read_slots(w, a1, a2)
                store_vector(reads + (row * R + h) * D, r1, r2, d1, d2, D)
            if KEEP:
                store_slots(history, row * RW + h, w, n, valid, N)
        tl.debug_barrier()
    store_memory(out_memory + b * N * D, m1, m2, n, d1, d2, valid, D)
    copy_slots(scratch + (steps % 2) * RW * N, out_weights + b * RW * N, n, valid, RW, N, N)


# ---- backward --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T", "B", "every"])
def _ntm_scan_backward_kernel(
    grad_reads, grad_out_memory, grad_out_weights, memory, weights, keys, sharpness, gates, shifts, sharpening, erase, add,
    resets, lengths, start, history, anchors, grad_memory, grad_weights, grad_keys, grad_sharpness, grad_gates, grad_shifts,
    grad_sharpening, grad_erase, grad_add, grad_start, memories, scratch, T, B, every,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, NP: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    LD: tl.constexpr, W: tl.constexpr, MOVES: tl.constexpr, READ_FIRST: tl.constexpr, EPS: tl.constexpr,
    OF_READS: tl.constexpr, OF_MEMORY: tl.constexpr, OF_WEIGHTS: tl.constexpr, RESETS: tl.constexpr, LENGTHS: tl.constexpr,
):  # fmt: skip
    """From the last anchor or reset forward again, memories [every, N, D] of the steps side by side; then back through these
    steps; then the anchor or reset before. Scratch: gated weights, their gradients and the weights after a reset,
    [3, RW, N]. grad_weights [RW, N] is until the end that of the weights that a step comes out with."""
    RW: tl.constexpr = R + W
    b = tl.program_id(0).to(tl.int64)
    n, d1, d2 = tl.arange(0, NP), tl.arange(0, P1), P1 + tl.arange(0, P2)
    valid = n < N
    dtype = memory.dtype.element_ty
    memories += b * every * N * D
    ring = scratch + b * 3 * RW * N
    grad_ring = ring + RW * N
    weights += b * RW * N
    grad_weights += b * RW * N
    g1, g2 = tl.zeros([NP, P1], dtype), tl.zeros([NP, P2], dtype)
    if OF_MEMORY:
        g1, g2 = load_memory(grad_out_memory + b * N * D, n, d1, d2, valid, D)
    for h in range(0, RW):
        g = tl.zeros([NP], dtype)
        if OF_WEIGHTS:
            g = load_slots(grad_out_weights, b * RW + h, n, valid, N)
        store_slots(grad_weights, h, g, n, valid, N)
    if RESETS:
        store_first(grad_ring + RW * N, n, valid, N, RW)
    last = steps_of(lengths, T, b, LENGTHS)
    while last > 0:
        first = replay_from(resets, last - 1, every, B, b, RESETS)
        steps = last - first
        last = first
        if RESETS:
            begins = tl.load(resets + first * B + b)
        else:
            begins: tl.constexpr = False
        tl.debug_barrier()
        if begins:
            m1, m2 = load_memory(start, n, d1, d2, valid, D)
        elif first == 0:
            m1, m2 = load_memory(memory + b * N * D, n, d1, d2, valid, D)
        else:
            m1, m2 = load_memory(anchors + ((first // every - 1) * B + b) * D * LD, n, d1, d2, valid, D)
        for s in range(0, steps):
            row = (first + s) * B + b
            store_memory(memories + s * N * D, m1, m2, n, d1, d2, valid, D)
            m1, m2 = erase_and_add(
                m1, m2, history + (row * RW + R) * N, erase + row * W * D, add + row * W * D, n, d1, d2, valid, N, D, W
            )  # fmt: skip
        tl.debug_barrier()
        for j in range(0, steps):
            s = steps - 1 - j
            t = first + s
            row = t * B + b
            before = weights
            if t > 0:
                before = history + (row - B) * RW * N
            if RESETS:
                if (s == 0) & begins:
                    before = grad_ring + RW * N
            now = history + row * RW * N
            b1, b2 = load_memory(memories + s * N * D, n, d1, d2, valid, D)
            if not READ_FIRST:  # the read heads saw the memory after the write
                if OF_READS:
                    g1, g2 = read_backward(
                        m1, m2, g1, g2, now, grad_weights, grad_reads + row * R * D, n, d1, d2, valid, N, D, R
                    )
                    tl.debug_barrier()
                g1, g2 = address_backward(
                    m1, m2, g1, g2, keys + row * RW * D, sharpness + row * RW, gates + row * RW, shifts + row * RW * MOVES,
                    sharpening + row * RW, before, grad_weights, grad_keys + row * RW * D, grad_sharpness + row * RW,
                    grad_gates + row * RW, grad_shifts + row * RW * MOVES, grad_sharpening + row * RW, ring, grad_ring, 0, R,
                    n, d1, d2, valid, N, D, MOVES, EPS,
                )  # fmt: skip
            g1, g2 = write_backward(
                b1, b2, g1, g2, now + R * N, grad_weights + R * N, erase + row * W * D, add + row * W * D,
                grad_erase + row * W * D, grad_add + row * W * D, n, d1, d2, valid, N, D, W,
            )  # fmt: skip
            if READ_FIRST:
                if OF_READS:
                    g1, g2 = read_backward(
                        b1, b2, g1, g2, now, grad_weights, grad_reads + row * R * D, n, d1, d2, valid, N, D, R
                    )
            tl.debug_barrier()
            g1, g2 = address_backward(
                b1, b2, g1, g2, keys + row * RW * D, sharpness + row * RW, gates + row * RW, shifts + row * RW * MOVES,
                sharpening + row * RW, before, grad_weights, grad_keys + row * RW * D, grad_sharpness + row * RW,
                grad_gates + row * RW, grad_shifts + row * RW * MOVES, grad_sharpening + row * RW, ring, grad_ring,
                0 if READ_FIRST else R, RW, n, d1, d2, valid, N, D, MOVES, EPS,
            )  # fmt: skip
            tl.debug_barrier()
            m1, m2 = b1, b2
        if begins:
            g1, g2 = reset_backward(g1, g2, grad_weights, grad_start + b * N * D, n, d1, d2, valid, N, D, RW)
    store_memory(grad_memory + b * N * D, g1, g2, n, d1, d2, valid, D)


# ---- launchers ---------------------------------------------------------------------------------------------------------


def ntm_scan(
    memory: Tensor,
    weights: Tensor,
    keys: Tensor,
    sharpness: Tensor,
    gates: Tensor,
    shift: Tensor,
    sharpening: Tensor,
    erase: Tensor,
    add: Tensor,
    resets: Tensor | None,
    lengths: Tensor | None,
    start: Tensor | None,
    read_first: bool,
    eps: float,
    anchor_every: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (memory, weights, keys, sharpness, gates, shift, sharpening, erase, add)
    memory, weights, keys, *rest = contiguous(*inputs)
    resets, lengths, start = contiguous(resets, lengths, start)
    (steps, batch, heads, slot_size), num_slots, writes = keys.shape, memory.shape[1], erase.shape[2]
    keeps = anchor_every > 0
    history = new_steps(memory, (steps, *weights.shape) if keeps else (0,), lengths)
    anchors = new_anchors(memory, slot_size, steps, anchor_every, lengths)
    reads = new_steps(keys, (steps, batch, heads - writes, slot_size), lengths)
    if not fits_one_program(num_slots, slot_size):
        inputs, sequences = (keys, *rest), Steps(resets, lengths, start)
        options = (read_first, eps, anchor_every)
        end = ntm_steps.scan(memory, weights, inputs, sequences, reads, history, anchors, *options)
        return reads, *end, history, anchors
    out_memory, out_weights = torch.empty_like(memory), torch.empty_like(weights)
    scratch = weights.new_empty(batch, 3, heads, num_slots)
    launch(
        _ntm_scan_kernel, (batch,), memory, weights, keys, *rest, resets, lengths, start, reads, out_memory, out_weights,
        history, anchors, scratch, steps, batch, anchor_every,
        **resident("ntm_scan", memory.device, num_slots, slot_size, heads - writes),
        LD=anchors.shape[-1], W=writes, MOVES=shift.shape[3], READ_FIRST=read_first, EPS=eps, KEEP=keeps,
        RESETS=resets is not None, LENGTHS=lengths is not None, options=FORWARD,
    )  # fmt: skip
    return reads, out_memory, out_weights, history, anchors


def ntm_scan_backward(
    grad_reads: Tensor | None,
    grad_memory: Tensor | None,
    grad_weights: Tensor | None,
    memory: Tensor,
    weights: Tensor,
    keys: Tensor,
    sharpness: Tensor,
    gates: Tensor,
    shift: Tensor,
    sharpening: Tensor,
    erase: Tensor,
    add: Tensor,
    resets: Tensor | None,
    lengths: Tensor | None,
    start: Tensor | None,
    history: Tensor,
    anchors: Tensor,
    read_first: bool,
    eps: float,
    anchor_every: int,
) -> tuple[Tensor, ...]:
    given = contiguous(grad_reads, grad_memory, grad_weights)
    inputs = contiguous(memory, weights, keys, sharpness, gates, shift, sharpening, erase, add)
    resets, lengths, start, history, anchors = contiguous(resets, lengths, start, history, anchors)
    (steps, batch, heads, slot_size), num_slots, writes = keys.shape, memory.shape[1], erase.shape[2]
    of_state = [torch.empty_like(x) for x in inputs[:2]]
    grads = [new_steps(x, x.shape, lengths) for x in inputs[2:]]
    grad_start = new_gradient_of_start(start, memory)
    every = max(min(anchor_every, steps), 1)
    if not fits_one_program(num_slots, slot_size):
        memory, weights, *rest = inputs
        sequences, kept = Steps(resets, lengths, start), (history, anchors)
        options = (read_first, eps, every, grads, grad_start)
        of_state = ntm_steps.scan_backward(given, memory, weights, rest, sequences, *kept, *options)
        return *of_state, *grads, grad_start
    memories = memory.new_empty(batch, every, num_slots, slot_size)
    scratch = weights.new_empty(batch, 3, heads, num_slots)
    launch(
        _ntm_scan_backward_kernel, (batch,), *given, *inputs, resets, lengths, start, history, anchors, *of_state, *grads,
        grad_start, memories, scratch, steps, batch, every,
        **resident("ntm_scan_backward", memory.device, num_slots, slot_size, heads - writes),
        LD=anchors.shape[-1], W=writes, MOVES=shift.shape[3], READ_FIRST=read_first, EPS=eps,
        OF_READS=grad_reads is not None, OF_MEMORY=grad_memory is not None, OF_WEIGHTS=grad_weights is not None,
        RESETS=resets is not None, LENGTHS=lengths is not None, options=BACKWARD,
    )  # fmt: skip
    return *of_state, *grads, grad_start


def sentence(op: str, num_slots: int, slot_size: int, heads: int) -> str:
    parts, steps = "content_read and PyTorch operations", "the step"
    loop = f"a step of {parts}"
    if op == "ntm_scan":
        steps, loop = "all steps", f"a loop of steps, each {parts}"
    return scan_sentence("ntm_scan", steps, loop, num_slots, slot_size, heads)
