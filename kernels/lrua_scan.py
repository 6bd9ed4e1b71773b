"""lrua_scan in Triton (a step is a scan of one).

One launch per direction: a program takes one sample through all steps and keeps its memory in registers (_memory.py). What a
head has per slot, its weights, is too much for registers beside the memory and lies in a scratch array, small enough for the
nearest cache; a barrier after each step makes one thread's stores another's loads. Where a memory is too large for one
program, a scan is a loop of steps: lrua_steps.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.lrua import LRUAState
from ..reference.sequences import Steps
from . import lrua_steps
from ._launch import BACKWARD, FORWARD, contiguous, launch, new_anchors, new_gradient_of_start, new_steps
from ._memory import (
    copy_slots,
    dot,
    load_memory,
    load_slots,
    load_vector,
    read_slots,
    row_squares,
    similarity,
    softmax,
    softmax_backward,
    squares_backward,
    store_memory,
    store_slots,
    store_vector,
)
from ._sequences import replay_from, reset_backward, steps_of, store_first
from ._sizes import fits_one_program, resident, scan_sentence
from .lrua import ranks, sigmoids, take_least, targets

RAW = ("lrua_scan", "lrua_scan_backward")


# ---- the write of a step -------------------------------------------------------------------------------------------------


@triton.jit
def _write_weights(weights, gates, rank, n, valid, r, N: tl.constexpr, R: tl.constexpr, SHARED: tl.constexpr):
    """Head r's write weights from the read weights [R, N] of the step before; also these, and the gate's two shares."""
    w = load_slots(weights, r, n, valid, N)
    gate, keep = sigmoids(tl.load(gates + r).to(w.dtype))
    return gate * w + tl.where(targets(rank, r, R, SHARED) & valid, keep, 0.0), w, gate, keep


@triton.jit
def _erase_and_add(
    m1, m2, rank, weights, vectors, gates, n, d1, d2, valid,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    m1 = tl.where(rank[:, None] == 0, 0.0, m1)
    m2 = tl.where(rank[:, None] == 0, 0.0, m2)
    for r in range(0, R):
        ww, _, _, _ = _write_weights(weights, gates, rank, n, valid, r, N, R, SHARED)
        v1, v2 = load_vector(vectors + r * D, d1, d2, D, m1.dtype)
        m1 = tl.fma(ww[:, None], v1[None, :], m1)
        m2 = tl.fma(ww[:, None], v2[None, :], m2)
    return m1, m2


# ---- forward ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T", "B", "every"])
def _scan_kernel(
    memory, read_weights, usage, keys, vectors, gates, sharpness, resets, lengths, start, reads, out_memory, out_weights,
    out_usage, slots, anchors, scratch, T, B, every,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, NP: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    LD: tl.constexpr, SHARP: tl.constexpr, READ_FIRST: tl.constexpr, SHARED: tl.constexpr, DECAY: tl.constexpr,
    EPS: tl.constexpr, KEEP: tl.constexpr, RESETS: tl.constexpr, LENGTHS: tl.constexpr,
):  # fmt: skip
    """An anchor is [D + R, LD], the memory [N, D] in its first numbers, the read weights in its last R rows."""
    b = tl.program_id(0).to(tl.int64)
    n, d1, d2 = tl.arange(0, NP), tl.arange(0, P1), P1 + tl.arange(0, P2)
    valid = n < N
    m1, m2 = load_memory(memory + b * N * D, n, d1, d2, valid, D)
    u = load_slots(usage, b, n, valid, N)
    copy_slots(read_weights + b * R * N, scratch + b * R * N, n, valid, R, N, N)
    tl.debug_barrier()
    steps = steps_of(lengths, T, b, LENGTHS)
    for t in range(0, steps):
        row = t * B + b
        # Read weights of the step before and of this one take turns in the two halves of scratch [2, B, R, N].
        before = scratch + ((t % 2) * B + b) * R * N
        now = scratch + (((t + 1) % 2) * B + b) * R * N
        if RESETS:
            if tl.load(resets + row):
                m1, m2 = load_memory(start, n, d1, d2, valid, D)
                u = tl.where(n == 0, 1.0, 0.0).to(u.dtype)
                store_first(before, n, valid, N, R)
                tl.debug_barrier()
        rank = take_least(u, slots + row * R, n, valid, R, KEEP)
        if KEEP:
            if (t > 0) & (t % every == 0):
                anchor = anchors + ((t // every - 1) * B + b) * (D + R) * LD
                store_memory(anchor, m1, m2, n, d1, d2, valid, D)
                copy_slots(before, anchor + D * LD, n, valid, R, N, LD)
        a1, a2 = m1, m2
        m1, m2 = _erase_and_add(
            m1, m2, rank, before, vectors + row * R * D, gates + row * R, n, d1, d2, valid, N, D, R, SHARED
        )
        if not READ_FIRST:
            a1, a2 = m1, m2
        squares = row_squares(a1, a2)
        touched = tl.zeros([NP], m1.dtype)
        for r in range(0, R):
            _, _, _, beta, dots, q = similarity(
                a1, a2, squares, keys + row * R * D, sharpness + row * R, r, d1, d2, D, SHARP, EPS
            )
            w = softmax(beta * dots * q, valid)
            store_slots(now, r, w, n, valid, N)
            r1, r2 = read_slots(w, m1, m2)
            store_vector(reads + (row * R + r) * D, r1, r2, d1, d2, D)
            ww, _, _, _ = _write_weights(before, gates + row * R, rank, n, valid, r, N, R, SHARED)
            touched += w + ww
        u = u * DECAY + touched
        tl.debug_barrier()
    store_memory(out_memory + b * N * D, m1, m2, n, d1, d2, valid, D)
    store_slots(out_usage, b, u, n, valid, N)
    copy_slots(scratch + ((steps % 2) * B + b) * R * N, out_weights + b * R * N, n, valid, R, N, N)


# ---- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def _read_backward(
    m1, m2, g1, g2, weights, grad_weights, grad_now, grad_reads, n, d1, d2, valid,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Back through the reads of the memory m: adds to its gradient g. grad_now [R, N] becomes that of the read weights, which
    the steps after have given grad_weights."""
    for r in range(0, R):
        w, grad_w = load_slots(weights, r, n, valid, N), load_slots(grad_weights, r, n, valid, N)
        h1, h2 = load_vector(grad_reads + r * D, d1, d2, D, m1.dtype)
        grad_w += dot(h1, h2, m1, m2)
        g1 += w[:, None] * h1[None, :]
        g2 += w[:, None] * h2[None, :]
        store_slots(grad_now, r, grad_w, n, valid, N)
    return g1, g2


@triton.jit
def _addressing_backward(
    a1, a2, g1, g2, weights, grad_weights, keys, sharpness, grad_keys, grad_sharpness, n, d1, d2, valid,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, SHARP: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Back through softmax and similarity on the memory a: adds to its gradient g, stores those of keys and sharpness."""
    squares = row_squares(a1, a2)
    grad_squares = tl.zeros_like(squares)
    for r in range(0, R):
        w, grad_w = load_slots(weights, r, n, valid, N), load_slots(grad_weights, r, n, valid, N)
        k1, k2, key_square, beta, dots, q = similarity(
            a1, a2, squares, keys, sharpness, r, d1, d2, D, SHARP, EPS
        )
        g1, g2, grad_squares = softmax_backward(
            w, grad_w, a1, a2, squares, k1, k2, key_square, beta, dots, q, g1, g2, grad_squares, grad_keys, grad_sharpness,
            r, d1, d2, D, SHARP,
        )  # fmt: skip
    return squares_backward(a1, a2, grad_squares, g1, g2)


@triton.jit
def _write_backward(
    g1, g2, rank, before, vectors, gates, grad_vectors, grad_gates, grad_before, n, d1, d2, valid,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """From the gradient of the memory after the write to that of the memory before it; grad_before [R, N] becomes that of the
    read weights of the step before."""
    for r in range(0, R):
        ww, w, gate, keep = _write_weights(before, gates, rank, n, valid, r, N, R, SHARED)
        v1, v2 = load_vector(vectors + r * D, d1, d2, D, g1.dtype)
        grad_ww = tl.where(valid, dot(v1, v2, g1, g2), 0.0)
        x1, x2 = read_slots(ww, g1, g2)
        store_vector(grad_vectors + r * D, x1, x2, d1, d2, D)
        hit = targets(rank, r, R, SHARED)
        grad_gate = (tl.sum(grad_ww * w, 0) - tl.sum(tl.where(hit, grad_ww, 0.0), 0)) * gate * keep
        tl.store(grad_gates + r, grad_gate.to(grad_gates.dtype.element_ty))
        store_slots(grad_before, r, grad_ww * gate, n, valid, N)
    return tl.where(rank[:, None] == 0, 0.0, g1), tl.where(rank[:, None] == 0, 0.0, g2)


@triton.jit(do_not_specialize=["T", "B", "every"])
def _scan_backward_kernel(
    grad_reads, grad_memory, grad_weights, memory, read_weights, keys, vectors, gates, sharpness, resets, lengths, start,
    slots, anchors, grad_in_memory, grad_in_weights, grad_keys, grad_vectors, grad_gates, grad_sharpness, grad_start,
    memories, weights, T, B, every,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, NP: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    LD: tl.constexpr, SHARP: tl.constexpr, READ_FIRST: tl.constexpr, SHARED: tl.constexpr, EPS: tl.constexpr,
    OF_READS: tl.constexpr, OF_MEMORY: tl.constexpr, OF_WEIGHTS: tl.constexpr, RESETS: tl.constexpr, LENGTHS: tl.constexpr,
):  # fmt: skip
    """From the last anchor or reset forward again, memories [every + 1, N, D] and read weights [every + 2, R, N] of the steps
    side by side in scratch, which the last of the weights' rows is too; then back through these steps; then the anchor or
    reset before."""
    b = tl.program_id(0).to(tl.int64)
    n, d1, d2 = tl.arange(0, NP), tl.arange(0, P1), P1 + tl.arange(0, P2)
    valid = n < N
    dtype = memory.dtype.element_ty
    memories += b * (every + 1) * N * D
    weights += b * (every + 2) * R * N
    grad_now = weights + (every + 1) * R * N  # the gradient of this step's read weights
    grad_in_weights += b * R * N  # until the end the gradient of the read weights of the step after
    g1, g2 = tl.zeros([NP, P1], dtype), tl.zeros([NP, P2], dtype)
    if OF_MEMORY:
        g1, g2 = load_memory(grad_memory + b * N * D, n, d1, d2, valid, D)
    for r in range(0, R):
        g = tl.zeros([NP], dtype)
        if OF_WEIGHTS:
            g = load_slots(grad_weights, b * R + r, n, valid, N)
        store_slots(grad_in_weights, r, g, n, valid, N)
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
            store_first(weights, n, valid, N, R)
        elif first == 0:
            m1, m2 = load_memory(memory + b * N * D, n, d1, d2, valid, D)
            copy_slots(read_weights + b * R * N, weights, n, valid, R, N, N)
        else:
            anchor = anchors + ((first // every - 1) * B + b) * (D + R) * LD
            m1, m2 = load_memory(anchor, n, d1, d2, valid, D)
            copy_slots(anchor + D * LD, weights, n, valid, R, LD, N)
        tl.debug_barrier()
        for s in range(0, steps):
            row = (first + s) * B + b
            store_memory(memories + s * N * D, m1, m2, n, d1, d2, valid, D)
            rank = ranks(slots + row * R, n, R)
            a1, a2 = m1, m2
            before = weights + s * R * N
            m1, m2 = _erase_and_add(
                m1, m2, rank, before, vectors + row * R * D, gates + row * R, n, d1, d2, valid, N, D, R, SHARED
            )  # fmt: skip
            if not READ_FIRST:
                a1, a2 = m1, m2
            squares = row_squares(a1, a2)
            for r in range(0, R):
                _, _, _, beta, dots, q = similarity(
                    a1, a2, squares, keys + row * R * D, sharpness + row * R, r, d1, d2, D, SHARP, EPS
                )
                store_slots(before, R + r, softmax(beta * dots * q, valid), n, valid, N)
            tl.debug_barrier()
        for j in range(0, steps):
            s = steps - 1 - j
            row = (first + s) * B + b
            rank = ranks(slots + row * R, n, R)
            before = weights + s * R * N
            if OF_READS:
                g1, g2 = _read_backward(
                    m1, m2, g1, g2, before + R * N, grad_in_weights, grad_now, grad_reads + row * R * D, n, d1, d2, valid,
                    N, D, R,
                )  # fmt: skip
            else:
                copy_slots(grad_in_weights, grad_now, n, valid, R, N, N)
            tl.debug_barrier()
            if not READ_FIRST:
                g1, g2 = _addressing_backward(
                    m1, m2, g1, g2, before + R * N, grad_now, keys + row * R * D, sharpness + row * R,
                    grad_keys + row * R * D, grad_sharpness + row * R, n, d1, d2, valid, N, D, R, SHARP, EPS,
                )  # fmt: skip
            g1, g2 = _write_backward(
                g1, g2, rank, before, vectors + row * R * D, gates + row * R, grad_vectors + row * R * D,
                grad_gates + row * R, grad_in_weights, n, d1, d2, valid, N, D, R, SHARED,
            )  # fmt: skip
            m1, m2 = load_memory(memories + s * N * D, n, d1, d2, valid, D)
            if READ_FIRST:  # the similarities saw the memory before the write
                g1, g2 = _addressing_backward(
                    m1, m2, g1, g2, before + R * N, grad_now, keys + row * R * D, sharpness + row * R,
                    grad_keys + row * R * D, grad_sharpness + row * R, n, d1, d2, valid, N, D, R, SHARP, EPS,
                )  # fmt: skip
            tl.debug_barrier()
        if begins:
            g1, g2 = reset_backward(
                g1, g2, grad_in_weights, grad_start + b * N * D, n, d1, d2, valid, N, D, R
            )
    store_memory(grad_in_memory + b * N * D, g1, g2, n, d1, d2, valid, D)


# ---- launchers ---------------------------------------------------------------------------------------------------------


def _time_first(keys: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors with a time axis, which those of a single step have not: keys are [B, R, D] then."""
    return [x[None] if x is not None and keys.dim() == 3 else x for x in tensors]


def lrua_scan(
    memory: Tensor,
    read_weights: Tensor,
    usage: Tensor,
    keys: Tensor,
    write_vectors: Tensor,
    gate_logits: Tensor,
    sharpness: Tensor | None,
    resets: Tensor | None,
    lengths: Tensor | None,
    start: Tensor | None,
    read_first: bool,
    shared_target: bool,
    usage_decay: float,
    eps: float,
    anchor_every: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    memory, read_weights, usage, *inputs = contiguous(
        memory, read_weights, usage, keys, write_vectors, gate_logits, sharpness
    )
    resets, lengths, start = contiguous(resets, lengths, start)
    (batch, heads, num_slots), slot_size = read_weights.shape, memory.shape[2]
    keeps = anchor_every > 0
    reads = new_steps(keys, keys.shape, lengths)
    slots = new_steps(memory, keys.shape[:-1] if keeps else (0,), lengths, torch.int64)
    steps = keys.shape[0] if keys.dim() == 4 else 1
    anchors = new_anchors(memory, slot_size + heads, steps, anchor_every, lengths)
    if not fits_one_program(num_slots, slot_size):
        options = (read_first, shared_target, usage_decay, eps)
        *timed, resets, to_reads, to_slots = _time_first(keys, *inputs, resets, reads, slots)
        state, sequences = LRUAState(memory, read_weights, usage), Steps(resets, lengths, start)
        out = lrua_steps.scan(state, timed, sequences, to_reads, to_slots, anchors, options, anchor_every)
        return reads, *out, slots, anchors
    *inputs, sharpness = inputs
    out = [torch.empty_like(x) for x in (memory, read_weights, usage)]
    scratch = read_weights.new_empty(2, batch, heads, num_slots)
    launch(
        _scan_kernel, (batch,), memory, read_weights, usage, *inputs, inputs[2] if sharpness is None else sharpness,
        resets, lengths, start, reads, *out, slots, anchors, scratch, steps, batch, anchor_every,
        **resident("scan", memory.device, num_slots, slot_size, heads), LD=anchors.shape[-1], SHARP=sharpness is not None,
        READ_FIRST=read_first, SHARED=shared_target, DECAY=usage_decay, EPS=eps, KEEP=keeps, RESETS=resets is not None,
        LENGTHS=lengths is not None, options=FORWARD,
    )  # fmt: skip
    return reads, *out, slots, anchors


def lrua_scan_backward(
    grad_reads: Tensor | None,
    grad_memory: Tensor | None,
    grad_read_weights: Tensor | None,
    memory: Tensor,
    read_weights: Tensor,
    keys: Tensor,
    write_vectors: Tensor,
    gate_logits: Tensor,
    sharpness: Tensor | None,
    resets: Tensor | None,
    lengths: Tensor | None,
    start: Tensor | None,
    slots: Tensor,
    anchors: Tensor,
    read_first: bool,
    shared_target: bool,
    eps: float,
    anchor_every: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = contiguous(grad_reads, grad_memory, grad_read_weights)
    memory, read_weights, slots, anchors = contiguous(memory, read_weights, slots, anchors)
    inputs = contiguous(keys, write_vectors, gate_logits, sharpness)
    resets, lengths, start = contiguous(resets, lengths, start)
    (batch, heads, num_slots), slot_size = read_weights.shape, memory.shape[2]
    grads = [keys.new_empty(0) if x is None else new_steps(x, x.shape, lengths) for x in inputs]
    grad_start = new_gradient_of_start(start, memory)
    steps = keys.shape[0] if keys.dim() == 4 else 1
    every = max(min(anchor_every, steps), 1)
    if not fits_one_program(num_slots, slot_size):
        of_reads, slots, resets = _time_first(keys, given[0], slots, resets)
        timed, results = _time_first(keys, *inputs), _time_first(keys, *grads)
        options = (read_first, shared_target, eps)
        of_state = lrua_steps.scan_backward(
            (of_reads, *given[1:]), memory, read_weights, timed, Steps(resets, lengths, start), slots, anchors, options, every,
            results, grad_start,
        )  # fmt: skip
        return *of_state, *grads, grad_start
    *inputs, sharpness = inputs
    of_state = torch.empty_like(memory), torch.empty_like(read_weights)
    memories = memory.new_empty(batch, every + 1, num_slots, slot_size)
    weights = read_weights.new_empty(batch, every + 2, heads, num_slots)
    launch(
        _scan_backward_kernel, (batch,), *given, memory, read_weights, *inputs,
        inputs[2] if sharpness is None else sharpness, resets, lengths, start, slots, anchors, *of_state, *grads, grad_start,
        memories, weights, steps, batch, every,
        **resident("scan_backward", memory.device, num_slots, slot_size, heads), LD=anchors.shape[-1],
        SHARP=sharpness is not None, READ_FIRST=read_first, SHARED=shared_target, EPS=eps, OF_READS=grad_reads is not None,
        OF_MEMORY=grad_memory is not None, OF_WEIGHTS=grad_read_weights is not None,
        RESETS=resets is not None, LENGTHS=lengths is not None, options=BACKWARD,
    )  # fmt: skip
    return *of_state, *grads, grad_start


def sentence(op: str, num_slots: int, slot_size: int, heads: int) -> str:
    parts = "least_used, lrua_write and content_read"
    if op == "lrua_step":
        return scan_sentence("scan", "the step", f"a step of {parts}", num_slots, slot_size, heads)
    return scan_sentence("scan", "all steps", f"a loop of steps, each {parts}", num_slots, slot_size, heads)
