"""least_used, lrua_write and lrua_scan (a step is a scan of one) in Triton.

A scan is one launch per direction: a program takes one sample through all steps and keeps its memory in registers. The width
of a slot is held in two pieces whose sizes are powers of two (40 as 32 + 8), which pads less than one. What a head has per
slot, its weights, is too much for registers beside the memory and lies in a scratch array, small enough for the nearest
cache; a barrier after each step makes one thread's stores another's loads. Where a memory is too large for one program, a
scan is a loop of steps made of lrua_write and content_read, which split the slots over programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.lrua import _anchors_shape, _steps
from . import content
from ._launch import BACKWARD, FORWARD, contiguous, launch, split, tile_slots
from ._sizes import RESIDENT_NUMBERS, fits_one_program, pieces, power_of_two, resident_numbers
from ._tuning import num_warps

RAW = ("least_used", "lrua_write", "lrua_write_backward", "lrua_scan", "lrua_scan_backward")

SORT_FROM = 64  # least_used: from so many slots on, a sort beats taking one after the other


# ---- the choice of slots ------------------------------------------------------------------------------------------


@triton.jit
def _order(usage, n, valid):
    """An integer per slot of the same order as (usage, slot): NaN after everything, -0 equal to 0, padding last. In float32
    usage and slot fit one integer; in float64 the slot is found in a second step."""
    u = tl.where(usage == 0, 0.0, usage)
    if usage.dtype == tl.float64:
        bits = u.to(tl.int64, bitcast=True)
        ordered = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
        ordered = tl.where(usage == usage, ordered, 0x7FFFFFFFFFFFFFFE)
    else:
        bits = u.to(tl.int32, bitcast=True)
        ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        ordered = tl.where(usage == usage, ordered, 0x7FFFFFFE)
        ordered = (ordered.to(tl.int64) << 32) | n.to(tl.int64)
    return tl.where(valid, ordered, 0x7FFFFFFFFFFFFFFF)


@triton.jit
def _least(order, n, WIDE: tl.constexpr):
    """The slot of the least (usage, slot)."""
    best = tl.min(order, 0)
    if WIDE:
        slot = tl.min(tl.where(order == best, n, 0x7FFFFFFF), 0)
    else:
        slot = (best & 0x7FFFFFFF).to(tl.int32)
    return slot


@triton.jit
def _take_least(usage, slots, n, valid, R, KEEP: tl.constexpr):
    """The place of each slot among the R least used, R for the others; the slots themselves go to slots [R] if KEEP."""
    order = _order(usage, n, valid)
    rank = tl.full(n.shape, R, tl.int32)
    for r in range(0, R):
        slot = _least(order, n, usage.dtype == tl.float64)
        rank = tl.where(n == slot, r, rank)
        order = tl.where(n == slot, 0x7FFFFFFFFFFFFFFF, order)
        if KEEP:
            tl.store(slots + r, slot.to(tl.int64))
    return rank


@triton.jit
def _least_used_kernel(usage, slots, N, count, NP: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, NP)
    u = tl.load(usage + b * N + n, mask=n < N, other=0.0)
    _take_least(u, slots + b * count, n, n < N, count, True)


def least_used(usage: Tensor, n: int) -> Tensor:
    (usage,) = contiguous(usage)
    batch, num_slots = usage.shape
    if n > SORT_FROM:
        return torch.sort(usage, dim=1, stable=True).indices[:, :n].contiguous()
    slots = usage.new_empty(batch, n, dtype=torch.int64)
    launch(_least_used_kernel, (batch,), usage, slots, num_slots, n, NP=power_of_two(num_slots), options=FORWARD)
    return slots


# ---- lrua_write ---------------------------------------------------------------------------------------------------


@triton.jit
def _sigmoids(x):
    """sigmoid(x) and sigmoid(-x), both to full relative precision."""
    e = tl.exp(-tl.abs(x))
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    return tl.where(x > 0, larger, smaller), tl.where(x > 0, smaller, larger)


@triton.jit
def _ranks(slots, n, R):
    """From slots [R] to the place of each slot among them, R for the others."""
    rank = tl.full(n.shape, R, tl.int32)
    for r in range(0, R):
        rank = tl.where(n == tl.load(slots + r).to(tl.int32), r, rank)
    return rank


@triton.jit
def _targets(rank, r, R, SHARED: tl.constexpr):
    """Where head r writes besides where it read: [heads, slots] or [slots], as r is."""
    if SHARED:
        hit = (rank < R) & (r >= 0)
    else:
        hit = rank == r
    return hit


@triton.jit
def _write_inputs(vectors, gates, rows, r, d, dtype: tl.constexpr, D: tl.constexpr, R: tl.constexpr):
    """Write vectors [heads, width] and both shares of the gate [heads] of one sample, 0 and halves for padding."""
    a = content._load_rows(vectors, True, rows, d, D, (r[:, None] < R) & (d[None, :] < D), dtype)
    gate, keep = _sigmoids(tl.load(gates + rows, mask=r < R, other=0.0).to(dtype))
    return a, gate, keep


@triton.jit
def _write_kernel(
    memory, read_weights, slots, vectors, gates, out_memory, write_weights, N, span,
    D: tl.constexpr, R: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr, TILE: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    dtype = memory.dtype.element_ty
    d, r = tl.arange(0, DP), tl.arange(0, RP)
    rows = b * R + r
    a, gate, keep = _write_inputs(vectors, gates, rows, r, d, dtype, D, R)
    end = tl.minimum((part + 1) * span, N)
    for start in range(part * span, end, TILE):
        n = start + tl.arange(0, TILE)
        mask = n < end
        rank = _ranks(slots + b * R, n, R)
        places = (b * N + n[:, None]) * D + d[None, :]
        inside_m = mask[:, None] & (d[None, :] < D)
        m = tl.load(memory + places, mask=inside_m, other=0.0)
        inside = (r[:, None] < R) & mask[None, :]
        w = tl.load(read_weights + rows[:, None] * N + n[None, :], mask=inside, other=0.0)
        target = tl.where(_targets(rank[None, :], r[:, None], R, SHARED), keep[:, None], 0.0)
        w = gate[:, None] * w + target
        tl.store(write_weights + rows[:, None] * N + n[None, :], w, mask=inside)
        # A padding head writes nothing, whatever the memory holds
        written = tl.where(r[:, None, None] < R, w[:, :, None] * a[:, None, :], 0.0)
        m = tl.where(rank[:, None] == 0, 0.0, m) + tl.sum(written, 0)
        tl.store(out_memory + places, m, mask=inside_m)


@triton.jit
def _write_backward_kernel(
    grad_memory, grad_write_weights, read_weights, vectors, gates, slots, grad_in, grad_read_weights, grad_vectors,
    grad_gates, B, N, span,
    D: tl.constexpr, R: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr, TILE: tl.constexpr,
    SHARED: tl.constexpr, OF_MEMORY: tl.constexpr, OF_WEIGHTS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    dtype = read_weights.dtype.element_ty
    d, r = tl.arange(0, DP), tl.arange(0, RP)
    rows = b * R + r
    a, gate, keep = _write_inputs(vectors, gates, rows, r, d, dtype, D, R)
    sum_vector = tl.zeros([RP, DP], dtype)
    sum_gate = tl.zeros([RP], dtype)
    end = tl.minimum((part + 1) * span, N)
    for start in range(part * span, end, TILE):
        n = start + tl.arange(0, TILE)
        mask = n < end
        rank = _ranks(slots + b * R, n, R)
        places = (b * N + n[:, None]) * D + d[None, :]
        inside_m = mask[:, None] & (d[None, :] < D)
        inside = (r[:, None] < R) & mask[None, :]
        row_places = rows[:, None] * N + n[None, :]
        w = tl.load(read_weights + row_places, mask=inside, other=0.0)
        hit = _targets(rank[None, :], r[:, None], R, SHARED)
        g = content._load_rows(grad_write_weights, OF_WEIGHTS, rows, n, N, inside, dtype)
        if OF_MEMORY:
            m = tl.load(grad_memory + places, mask=inside_m, other=0.0)
            g += tl.sum(a[:, None, :] * m[None, :, :], 2)
            write_weights = tl.where(inside, gate[:, None] * w + tl.where(hit, keep[:, None], 0.0), 0.0)
            sum_vector += tl.sum(write_weights[:, :, None] * m[None, :, :], 1)
            tl.store(grad_in + places, tl.where(rank[:, None] == 0, 0.0, m), mask=inside_m)
        else:
            tl.store(grad_in + places, tl.zeros([TILE, DP], dtype), mask=inside_m)
        sum_gate += tl.sum(g * w, 1) - tl.sum(tl.where(hit & inside, g, 0.0), 1)
        tl.store(grad_read_weights + row_places, g * gate[:, None], mask=inside)
    row = (part * B + b) * R + r
    inside_a = (r[:, None] < R) & (d[None, :] < D)
    tl.store(grad_vectors + row[:, None] * D + d[None, :], sum_vector.to(grad_vectors.dtype.element_ty), mask=inside_a)
    tl.store(grad_gates + row, (sum_gate * gate * keep).to(grad_gates.dtype.element_ty), mask=r < R)


def _write(
    memory: Tensor, read_weights: Tensor, slots: Tensor, vector: Tensor, gate: Tensor, shared: bool
) -> tuple[Tensor, Tensor]:
    batch, num_slots, slot_size = memory.shape
    heads = read_weights.shape[1]
    constants, parts, span = split(batch, num_slots, slot_size, heads, memory.device)
    out_memory, write_weights = torch.empty_like(memory), torch.empty_like(read_weights)
    launch(
        _write_kernel, (batch, parts), memory, read_weights, slots, vector, gate, out_memory, write_weights, num_slots,
        span, **constants, SHARED=shared, options=FORWARD,
    )  # fmt: skip
    return out_memory, write_weights


def lrua_write(
    memory: Tensor, read_weights: Tensor, usage: Tensor, write_vector: Tensor, gate_logit: Tensor, shared_target: bool
) -> tuple[Tensor, Tensor, Tensor]:
    memory, read_weights, write_vector, gate_logit = contiguous(memory, read_weights, write_vector, gate_logit)
    slots = least_used(usage, read_weights.shape[1])
    return *_write(memory, read_weights, slots, write_vector, gate_logit, shared_target), slots


def lrua_write_backward(
    grad_memory: Tensor | None,
    grad_write_weights: Tensor | None,
    read_weights: Tensor,
    write_vector: Tensor,
    gate_logit: Tensor,
    slots: Tensor,
    shared_target: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_memory, grad_write_weights, read_weights, write_vector, gate_logit, slots = contiguous(
        grad_memory, grad_write_weights, read_weights, write_vector, gate_logit, slots
    )
    batch, heads, num_slots = read_weights.shape
    slot_size = write_vector.shape[2]
    constants, parts, span = split(batch, num_slots, slot_size, heads, read_weights.device)
    dtype = write_vector.dtype if parts == 1 else read_weights.dtype
    grad_in = read_weights.new_empty(batch, num_slots, slot_size)
    grad_read_weights = torch.empty_like(read_weights)
    grad_vector = write_vector.new_empty(parts, batch, heads, slot_size, dtype=dtype)
    grad_gate = write_vector.new_empty(parts, batch, heads, dtype=dtype)
    launch(
        _write_backward_kernel, (batch, parts), grad_memory, grad_write_weights, read_weights, write_vector, gate_logit,
        slots, grad_in, grad_read_weights, grad_vector, grad_gate, batch, num_slots, span, **constants,
        SHARED=shared_target, OF_MEMORY=grad_memory is not None, OF_WEIGHTS=grad_write_weights is not None,
        options=BACKWARD,
    )  # fmt: skip
    if parts == 1:
        return grad_in, grad_read_weights, grad_vector[0], grad_gate[0]
    half = write_vector.dtype
    return grad_in, grad_read_weights, grad_vector.sum(0).to(half), grad_gate.sum(0).to(half)


# ---- lrua_scan ----------------------------------------------------------------------------------------------------


@triton.jit
def _load_memory(pointer, n, d1, d2, valid, D: tl.constexpr):
    """A memory [N, D] in two pieces, 0 beyond it."""
    m1 = tl.load(pointer + n[:, None] * D + d1[None, :], mask=valid[:, None], other=0.0)
    m2 = tl.load(pointer + n[:, None] * D + d2[None, :], mask=valid[:, None] & (d2[None, :] < D), other=0.0)
    return m1, m2


@triton.jit
def _store_memory(pointer, m1, m2, n, d1, d2, valid, D: tl.constexpr):
    tl.store(pointer + n[:, None] * D + d1[None, :], m1, mask=valid[:, None])
    tl.store(pointer + n[:, None] * D + d2[None, :], m2, mask=valid[:, None] & (d2[None, :] < D))


@triton.jit
def _load_vector(pointer, d1, d2, D: tl.constexpr, dtype: tl.constexpr):
    return tl.load(pointer + d1).to(dtype), tl.load(pointer + d2, mask=d2 < D, other=0.0).to(dtype)


@triton.jit
def _store_vector(pointer, v1, v2, d1, d2, D: tl.constexpr):
    tl.store(pointer + d1, v1.to(pointer.dtype.element_ty))
    tl.store(pointer + d2, v2.to(pointer.dtype.element_ty), mask=d2 < D)


@triton.jit
def _dot(v1, v2, m1, m2):
    """Per slot, the dot product of a vector with its row."""
    return tl.sum(v1[None, :] * m1, 1) + tl.sum(v2[None, :] * m2, 1)


@triton.jit
def _write_weights(weights, gates, rank, n, valid, r, N: tl.constexpr, R: tl.constexpr, SHARED: tl.constexpr):
    """Head r's write weights from the read weights [R, N] of the step before; also these, and the gate's two shares."""
    w = tl.load(weights + r * N + n, mask=valid, other=0.0)
    gate, keep = _sigmoids(tl.load(gates + r).to(w.dtype))
    return gate * w + tl.where(_targets(rank, r, R, SHARED) & valid, keep, 0.0), w, gate, keep


@triton.jit
def _erase_and_add(
    m1, m2, rank, weights, vectors, gates, n, d1, d2, valid,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    m1 = tl.where(rank[:, None] == 0, 0.0, m1)
    m2 = tl.where(rank[:, None] == 0, 0.0, m2)
    for r in range(0, R):
        ww, _, _, _ = _write_weights(weights, gates, rank, n, valid, r, N, R, SHARED)
        v1, v2 = _load_vector(vectors + r * D, d1, d2, D, m1.dtype)
        m1 = tl.fma(ww[:, None], v1[None, :], m1)
        m2 = tl.fma(ww[:, None], v2[None, :], m2)
    return m1, m2


@triton.jit
def _similarity(
    a1, a2, squares, keys, sharpness, d1, d2, r, D: tl.constexpr, SHARP: tl.constexpr, EPS: tl.constexpr
):
    """Head r's key in two pieces and its square, sharpness, and per slot dot product and 1 / root."""
    k1, k2 = _load_vector(keys + r * D, d1, d2, D, a1.dtype)
    key_square = tl.sum(k1 * k1, 0) + tl.sum(k2 * k2, 0)
    beta = key_square * 0.0 + 1.0
    if SHARP:
        beta = tl.load(sharpness + r).to(a1.dtype)
    return k1, k2, key_square, beta, _dot(k1, k2, a1, a2), 1.0 / tl.sqrt(key_square * squares + EPS)


@triton.jit
def _softmax(score, valid):
    score = tl.where(valid, score, float("-inf"))
    e = tl.exp(score - tl.max(score, 0))
    return e / tl.sum(e, 0)


@triton.jit(do_not_specialize=["T", "B", "every"])
def _scan_kernel(
    memory, read_weights, usage, keys, vectors, gates, sharpness, reads, out_memory, out_weights, out_usage, slots, anchors,
    scratch, T, B, every,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, NP: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    LD: tl.constexpr, SHARP: tl.constexpr, READ_FIRST: tl.constexpr, SHARED: tl.constexpr, DECAY: tl.constexpr,
    EPS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    n, d1, d2 = tl.arange(0, NP), tl.arange(0, P1), P1 + tl.arange(0, P2)
    valid = n < N
    m1, m2 = _load_memory(memory + b * N * D, n, d1, d2, valid, D)
    u = tl.load(usage + b * N + n, mask=valid, other=0.0)
    for r in range(0, R):
        w = tl.load(read_weights + (b * R + r) * N + n, mask=valid, other=0.0)
        tl.store(scratch + (b * R + r) * N + n, w, mask=valid)
    tl.debug_barrier()
    for t in range(0, T):
        row = t * B + b
        # Read weights of the step before and of this one take turns in the two halves of scratch [2, B, R, N].
        before = scratch + ((t % 2) * B + b) * R * N
        now = scratch + (((t + 1) % 2) * B + b) * R * N
        rank = _take_least(u, slots + row * R, n, valid, R, KEEP)
        if KEEP:
            if (t > 0) & (t % every == 0):
                anchor = anchors + ((t // every - 1) * B + b) * (D + R) * LD
                _store_memory(anchor, m1, m2, n, d1, d2, valid, D)
                for r in range(0, R):
                    w = tl.load(before + r * N + n, mask=valid, other=0.0)
                    tl.store(anchor + (D + r) * LD + n, w, mask=valid)
        a1, a2 = m1, m2
        m1, m2 = _erase_and_add(
            m1, m2, rank, before, vectors + row * R * D, gates + row * R, n, d1, d2, valid, N, D, R, SHARED
        )
        if not READ_FIRST:
            a1, a2 = m1, m2
        squares = tl.sum(a1 * a1, 1) + tl.sum(a2 * a2, 1)
        touched = tl.zeros([NP], m1.dtype)
        for r in range(0, R):
            _, _, _, beta, dots, q = _similarity(
                a1, a2, squares, keys + row * R * D, sharpness + row * R, d1, d2, r, D, SHARP, EPS
            )
            w = _softmax(beta * dots * q, valid)
            tl.store(now + r * N + n, w, mask=valid)
            r1, r2 = tl.sum(w[:, None] * m1, 0), tl.sum(w[:, None] * m2, 0)
            _store_vector(reads + (row * R + r) * D, r1, r2, d1, d2, D)
            ww, _, _, _ = _write_weights(before, gates + row * R, rank, n, valid, r, N, R, SHARED)
            touched += w + ww
        u = u * DECAY + touched
        tl.debug_barrier()
    _store_memory(out_memory + b * N * D, m1, m2, n, d1, d2, valid, D)
    tl.store(out_usage + b * N + n, u, mask=valid)
    for r in range(0, R):
        w = tl.load(scratch + (((T % 2) * B + b) * R + r) * N + n, mask=valid, other=0.0)
        tl.store(out_weights + (b * R + r) * N + n, w, mask=valid)


@triton.jit
def _similarity_backward(
    a1, a2, g1, g2, weights, grad_weights, keys, sharpness, grad_keys, grad_sharpness, n, d1, d2, valid,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, SHARP: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Back through softmax and similarity on the memory a: adds to its gradient g, stores those of keys and sharpness."""
    squares = tl.sum(a1 * a1, 1) + tl.sum(a2 * a2, 1)
    grad_squares = tl.zeros_like(squares)
    for r in range(0, R):
        w = tl.load(weights + r * N + n, mask=valid, other=0.0)
        grad_w = tl.load(grad_weights + r * N + n, mask=valid, other=0.0)
        k1, k2, key_square, beta, dots, q = _similarity(a1, a2, squares, keys, sharpness, d1, d2, r, D, SHARP, EPS)
        scaled = w * (grad_w - tl.sum(w * grad_w, 0)) * q
        grad_dots = scaled * beta
        grad_cosine = scaled * dots
        if SHARP:
            tl.store(grad_sharpness + r, tl.sum(grad_cosine, 0).to(grad_sharpness.dtype.element_ty))
        grad_norms = grad_cosine * (-0.5 * beta) * q * q
        grad_squares += grad_norms * key_square
        twice = 2.0 * tl.sum(grad_norms * squares, 0)
        x1 = tl.sum(grad_dots[:, None] * a1, 0) + twice * k1
        x2 = tl.sum(grad_dots[:, None] * a2, 0) + twice * k2
        _store_vector(grad_keys + r * D, x1, x2, d1, d2, D)
        g1 += grad_dots[:, None] * k1[None, :]
        g2 += grad_dots[:, None] * k2[None, :]
    g1 += 2.0 * grad_squares[:, None] * a1
    g2 += 2.0 * grad_squares[:, None] * a2
    return g1, g2


@triton.jit(do_not_specialize=["T", "B", "every"])
def _scan_backward_kernel(
    grad_reads, grad_memory, grad_weights, memory, read_weights, keys, vectors, gates, sharpness, slots, anchors,
    grad_in_memory, grad_in_weights, grad_keys, grad_vectors, grad_gates, grad_sharpness, memories, weights, T, B, every,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, NP: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    LD: tl.constexpr, SHARP: tl.constexpr, READ_FIRST: tl.constexpr, SHARED: tl.constexpr, EPS: tl.constexpr,
    OF_READS: tl.constexpr, OF_MEMORY: tl.constexpr, OF_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """From the last anchor forward again, memories [every + 1, N, D] and read weights [every + 2, R, N] of the steps side by
    side in scratch, which the last of the weights' rows is too; then back through these steps; then the anchor before."""
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
        g1, g2 = _load_memory(grad_memory + b * N * D, n, d1, d2, valid, D)
    for r in range(0, R):
        g = tl.zeros([NP], dtype)
        if OF_WEIGHTS:
            g = tl.load(grad_weights + (b * R + r) * N + n, mask=valid, other=0.0)
        tl.store(grad_in_weights + r * N + n, g, mask=valid)
    segments = (T + every - 1) // every
    for i in range(0, segments):
        first = (segments - 1 - i) * every
        steps = tl.minimum(every, T - first)
        tl.debug_barrier()
        if first == 0:
            m1, m2 = _load_memory(memory + b * N * D, n, d1, d2, valid, D)
            for r in range(0, R):
                w = tl.load(read_weights + (b * R + r) * N + n, mask=valid, other=0.0)
                tl.store(weights + r * N + n, w, mask=valid)
        else:
            anchor = anchors + ((first // every - 1) * B + b) * (D + R) * LD
            m1, m2 = _load_memory(anchor, n, d1, d2, valid, D)
            for r in range(0, R):
                w = tl.load(anchor + (D + r) * LD + n, mask=valid, other=0.0)
                tl.store(weights + r * N + n, w, mask=valid)
        tl.debug_barrier()
        for s in range(0, steps):
            row = (first + s) * B + b
            _store_memory(memories + s * N * D, m1, m2, n, d1, d2, valid, D)
            rank = _ranks(slots + row * R, n, R)
            a1, a2 = m1, m2
            before = weights + s * R * N
            m1, m2 = _erase_and_add(
                m1, m2, rank, before, vectors + row * R * D, gates + row * R, n, d1, d2, valid, N, D, R, SHARED
            )
            if not READ_FIRST:
                a1, a2 = m1, m2
            squares = tl.sum(a1 * a1, 1) + tl.sum(a2 * a2, 1)
            for r in range(0, R):
                _, _, _, beta, dots, q = _similarity(
                    a1, a2, squares, keys + row * R * D, sharpness + row * R, d1, d2, r, D, SHARP, EPS
                )
                tl.store(before + (R + r) * N + n, _softmax(beta * dots * q, valid), mask=valid)
            tl.debug_barrier()
        for j in range(0, steps):
            s = steps - 1 - j
            row = (first + s) * B + b
            rank = _ranks(slots + row * R, n, R)
            before = weights + s * R * N
            for r in range(0, R):
                w = tl.load(before + (R + r) * N + n, mask=valid, other=0.0)
                grad_w = tl.load(grad_in_weights + r * N + n, mask=valid, other=0.0)
                if OF_READS:
                    h1, h2 = _load_vector(grad_reads + (row * R + r) * D, d1, d2, D, dtype)
                    grad_w += _dot(h1, h2, m1, m2)
                    g1 += w[:, None] * h1[None, :]
                    g2 += w[:, None] * h2[None, :]
                tl.store(grad_now + r * N + n, grad_w, mask=valid)
            tl.debug_barrier()
            if not READ_FIRST:
                g1, g2 = _similarity_backward(
                    m1, m2, g1, g2, before + R * N, grad_now, keys + row * R * D, sharpness + row * R,
                    grad_keys + row * R * D, grad_sharpness + row * R, n, d1, d2, valid, N, D, R, SHARP, EPS,
                )  # fmt: skip
            for r in range(0, R):
                ww, w, gate, keep = _write_weights(before, gates + row * R, rank, n, valid, r, N, R, SHARED)
                v1, v2 = _load_vector(vectors + (row * R + r) * D, d1, d2, D, dtype)
                grad_ww = tl.where(valid, _dot(v1, v2, g1, g2), 0.0)
                x1, x2 = tl.sum(ww[:, None] * g1, 0), tl.sum(ww[:, None] * g2, 0)
                _store_vector(grad_vectors + (row * R + r) * D, x1, x2, d1, d2, D)
                hit = _targets(rank, r, R, SHARED)
                grad_gate = (tl.sum(grad_ww * w, 0) - tl.sum(tl.where(hit, grad_ww, 0.0), 0)) * gate * keep
                tl.store(grad_gates + row * R + r, grad_gate.to(grad_gates.dtype.element_ty))
                tl.store(grad_in_weights + r * N + n, grad_ww * gate, mask=valid)
            g1 = tl.where(rank[:, None] == 0, 0.0, g1)
            g2 = tl.where(rank[:, None] == 0, 0.0, g2)
            m1, m2 = _load_memory(memories + s * N * D, n, d1, d2, valid, D)
            if READ_FIRST:  # the similarities saw the memory before the write
                g1, g2 = _similarity_backward(
                    m1, m2, g1, g2, before + R * N, grad_now, keys + row * R * D, sharpness + row * R,
                    grad_keys + row * R * D, grad_sharpness + row * R, n, d1, d2, valid, N, D, R, SHARP, EPS,
                )  # fmt: skip
            tl.debug_barrier()
    _store_memory(grad_in_memory + b * N * D, g1, g2, n, d1, d2, valid, D)


def _resident(kernel: str, device: torch.device, num_slots: int, slot_size: int, heads: int) -> dict[str, int]:
    """Constants and warps of a kernel that holds a whole memory. The rule for warps leaves about 20 numbers of it to a
    thread, of whose registers there are 255."""
    first, second = pieces(slot_size)
    rule = min(max(power_of_two(resident_numbers(num_slots, slot_size) // (32 * 24)), 1), 16)
    return {
        "N": num_slots, "D": slot_size, "R": heads, "NP": power_of_two(num_slots), "P1": first, "P2": second,
        "LD": (num_slots + 15) // 16 * 16, "num_warps": num_warps(kernel, device, num_slots, slot_size, heads, rule),
    }  # fmt: skip


def explain(op: str, num_slots: int, slot_size: int, heads: int) -> str:
    """How an op is served at this size, in a sentence."""
    numbers = resident_numbers(num_slots, slot_size)
    if op == "least_used":
        return f"one launch; from {SORT_FROM} slots on a sort"
    if op in ("lrua_scan", "lrua_step", "ntm_scan") and fits_one_program(num_slots, slot_size):
        steps = "the step" if op == "lrua_step" else "all steps"
        return (
            f"one launch per direction for {steps}, a program per sample: its memory is {numbers} numbers with padding, "
            f"of {RESIDENT_NUMBERS} that a program can hold in registers"
        )
    tile = tile_slots(num_slots, slot_size, heads)
    split = f"tiles of {tile} slots, split over programs where there are few samples, whose results a second launch combines"
    if op in ("lrua_scan", "lrua_step", "ntm_scan"):
        loop = "a step of" if op == "lrua_step" else "a loop of steps, each"
        parts = "content_read and PyTorch operations" if op == "ntm_scan" else "least_used, lrua_write and content_read"
        return (
            f"{loop} {parts}: the memory is {numbers} numbers with padding, more than the "
            f"{RESIDENT_NUMBERS} that a program can hold in registers; {split}"
        )
    return f"one pass over the memory in {split}"


def lrua_scan(
    memory: Tensor,
    read_weights: Tensor,
    usage: Tensor,
    keys: Tensor,
    write_vectors: Tensor,
    gate_logits: Tensor,
    sharpness: Tensor | None,
    read_first: bool,
    shared_target: bool,
    usage_decay: float,
    eps: float,
    anchor_every: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    memory, read_weights, usage, keys, write_vectors, gate_logits, sharpness = contiguous(
        memory, read_weights, usage, keys, write_vectors, gate_logits, sharpness
    )
    steps, (batch, heads, num_slots), slot_size = _steps(keys), read_weights.shape, memory.shape[2]
    keeps = anchor_every > 0
    slots = memory.new_empty(keys.shape[:-1] if keeps else (0,), dtype=torch.int64)
    # The shape is the schema's; where the padding is not empty it is 0, so that equal calls give equal results.
    new = memory.new_empty if num_slots % 16 == 0 else memory.new_zeros
    anchors = new(_anchors_shape(steps, memory, heads, anchor_every) if keeps else (0,))
    if not fits_one_program(num_slots, slot_size):
        inputs = (keys, write_vectors, gate_logits, sharpness)
        options = (read_first, shared_target, usage_decay, eps)
        return _scan_by_steps(memory, read_weights, usage, inputs, options, anchor_every, slots, anchors)
    reads, out = torch.empty_like(keys), [torch.empty_like(x) for x in (memory, read_weights, usage)]
    scratch = read_weights.new_empty(2, batch, heads, num_slots)
    launch(
        _scan_kernel, (batch,), memory, read_weights, usage, keys, write_vectors, gate_logits,
        gate_logits if sharpness is None else sharpness, reads, *out, slots, anchors, scratch, steps, batch, anchor_every,
        **_resident("scan", memory.device, num_slots, slot_size, heads), SHARP=sharpness is not None, READ_FIRST=read_first,
        SHARED=shared_target, DECAY=usage_decay, EPS=eps, KEEP=keeps, options=FORWARD,
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
    slots: Tensor,
    anchors: Tensor,
    read_first: bool,
    shared_target: bool,
    eps: float,
    anchor_every: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_reads, grad_memory, grad_read_weights, memory, read_weights, keys, write_vectors = contiguous(
        grad_reads, grad_memory, grad_read_weights, memory, read_weights, keys, write_vectors
    )
    gate_logits, sharpness, slots, anchors = contiguous(gate_logits, sharpness, slots, anchors)
    steps, (batch, heads, num_slots), slot_size = _steps(keys), read_weights.shape, memory.shape[2]
    if not fits_one_program(num_slots, slot_size):
        return _scan_by_steps_backward(
            (grad_reads, grad_memory, grad_read_weights), memory, read_weights,
            (keys, write_vectors, gate_logits, sharpness), slots, anchors, (read_first, shared_target, eps), anchor_every,
        )  # fmt: skip
    grads = [torch.empty_like(x) for x in (memory, read_weights, keys, write_vectors, gate_logits)]
    grads.append(gate_logits.new_empty(0) if sharpness is None else torch.empty_like(sharpness))
    every = max(min(anchor_every, steps), 1)
    memories = memory.new_empty(batch, every + 1, num_slots, slot_size)
    weights = read_weights.new_empty(batch, every + 2, heads, num_slots)
    launch(
        _scan_backward_kernel, (batch,), grad_reads, grad_memory, grad_read_weights, memory, read_weights, keys,
        write_vectors, gate_logits, gate_logits if sharpness is None else sharpness, slots, anchors, *grads, memories,
        weights, steps, batch, every, **_resident("scan_backward", memory.device, num_slots, slot_size, heads),
        SHARP=sharpness is not None, READ_FIRST=read_first, SHARED=shared_target, EPS=eps, OF_READS=grad_reads is not None,
        OF_MEMORY=grad_memory is not None, OF_WEIGHTS=grad_read_weights is not None, options=BACKWARD,
    )  # fmt: skip
    return tuple(grads)


# ---- a memory too large for one program: steps of lrua_write and content_read ---------------------------------------


def _step(memory, read_weights, slots, key, vector, gate, beta, read_first, shared, eps):
    """Read, memory, read weights, write weights."""
    written, write_weights = _write(memory, read_weights, slots, vector, gate, shared)
    if not read_first:
        read, weights = content.content_read(written, key, beta, eps)
    else:
        _, weights = content.content_read(memory, key, beta, eps)
        read = _product(weights, written).to(key.dtype)
    return read, written, weights, write_weights


def _product(a, b):
    """A batched product in the dtype of its factors, whatever autocast the caller is in."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.bmm(a, b)


def _at(inputs, t):
    """The inputs of step t; those of a single step have no time axis."""
    return [x if x is None or inputs[0].dim() == 3 else x[t] for x in inputs]


def _scan_by_steps(memory, read_weights, usage, inputs, options, anchor_every, slots, anchors):
    read_first, shared, usage_decay, eps = options
    batch, num_slots, slot_size = memory.shape
    if _steps(inputs[0]) == 0:
        memory, read_weights, usage = memory.clone(), read_weights.clone(), usage.clone()
    heads = read_weights.shape[1]
    reads = torch.empty_like(inputs[0])
    kept = slots.view(_steps(inputs[0]), batch, heads) if anchor_every > 0 else None
    for t in range(_steps(inputs[0])):
        chosen = least_used(usage, heads)
        if anchor_every > 0:
            kept[t] = chosen
            if t > 0 and t % anchor_every == 0:
                anchor = anchors[t // anchor_every - 1].flatten(1)
                anchor[:, : num_slots * slot_size] = memory.flatten(1)
                anchor[:, slot_size * anchors.shape[3] :].view(batch, heads, -1)[:, :, :num_slots] = read_weights
        read, memory, read_weights, write_weights = _step(
            memory, read_weights, chosen, *_at(inputs, t), read_first, shared, eps
        )
        reads.view(-1, *read.shape)[t] = read
        touched = read_weights + write_weights
        total = touched[:, 0]
        for r in range(1, heads):
            total = total + touched[:, r]
        usage = usage_decay * usage + total
    return reads, memory, read_weights, usage, slots, anchors


def _scan_by_steps_backward(grads, memory, read_weights, inputs, slots, anchors, options, every):
    read_first, shared, eps = options
    steps, (batch, heads, num_slots), slot_size = _steps(inputs[0]), read_weights.shape, memory.shape[2]
    slots = slots.view(steps, batch, heads)
    grad_reads, grad_memory, grad_weights = grads
    grad_memory = torch.zeros_like(memory) if grad_memory is None else grad_memory
    grad_weights = torch.zeros_like(read_weights) if grad_weights is None else grad_weights
    if steps == 0:
        grad_memory, grad_weights = grad_memory.clone(), grad_weights.clone()
    results = [torch.empty_like(x) for x in inputs[:3]]
    results.append(inputs[2].new_empty(0) if inputs[3] is None else torch.empty_like(inputs[3]))
    for first in range((steps - 1) // every * every, -1, -every):
        if first == 0:
            states = [(memory, read_weights)]
        else:
            anchor = anchors[first // every - 1].flatten(1)
            rows = anchor[:, slot_size * anchors.shape[3] :].view(batch, heads, -1)[:, :, :num_slots]
            states = [(anchor[:, : num_slots * slot_size].contiguous().view(memory.shape), rows.contiguous())]
        reads = []
        for t in range(first, min(first + every, steps)):
            read, *state = _step(*states[-1], slots[t], *_at(inputs, t), read_first, shared, eps)
            reads.append(read)
            states.append(tuple(state[:2]))
        for t in range(min(first + every, steps) - 1, first - 1, -1):
            key, vector, gate, beta = _at(inputs, t)
            (before, old_weights), (after, weights) = states[t - first], states[t - first + 1]
            grad_read = None if grad_reads is None else grad_reads.view(steps, batch, heads, slot_size)[t]
            addressed, of_read = (before, None) if read_first else (after, grad_read)
            if read_first and grad_read is not None:
                wide = grad_read.to(after.dtype)
                grad_weights = grad_weights + _product(wide, after.transpose(1, 2))
                grad_memory = grad_memory + _product(weights.transpose(1, 2), wide)
            through, grad_key, grad_beta = content.content_read_backward(
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
                if result.numel():
                    result.view(steps, *grad.shape)[t] = grad
    return grad_memory, grad_weights, *results
