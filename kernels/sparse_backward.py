"""The way back through sparse_read and sparse_scan in Triton, by the rows that forward kept: no memory is needed.

One launch, a program per sample, which goes from the last step to the first. The gradient of the memory lies in global memory;
rows of it are changed where they are. The K rows that a head reads are different ones, so they are changed together; those of
another head may be the same, so between heads there is a barrier.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import BACKWARD, contiguous, launch, new_gradient_of_start, new_steps
from ._memory import inverse_root, load_rows, similarity_backward, store_rows
from ._sequences import steps_of
from ._sizes import power_of_two
from .sparse import piece_of_reads, write_gates

RAW = ("sparse_read_backward", "sparse_scan_backward")

BLOCK = 1024  # of a whole memory's gradient, at a reset


@triton.jit
def _load_width(pointer, present: tl.constexpr, row, d, D: tl.constexpr, dtype: tl.constexpr):
    """A row of an array [.., D] as dtype; zeros where the array is absent."""
    x = tl.zeros(d.shape, dtype)
    if present:
        x = tl.load(pointer + row * D + d, mask=d < D, other=0.0).to(dtype)
    return x


@triton.jit
def _store_width(pointer, x, row, d, D: tl.constexpr):
    tl.store(pointer + row * D + d, x.to(pointer.dtype.element_ty), mask=d < D)


@triton.jit
def _read_backward(
    grad_read, key, sharpness, weights, slots, rows, grad_memory, grad_weights, grad_key, grad_sharpness, row, d,
    EPS: tl.constexpr, D: tl.constexpr, K: tl.constexpr, PIECE: tl.constexpr, SHARP: tl.constexpr, OF_READ: tl.constexpr,
):  # fmt: skip
    """Back through the read of one head, a ``row`` of all arrays but two: the sample's gradient of the memory [N, D], to which
    it adds, and grad_weights [K], that of the head's weights as the steps after give it, to which it adds the read's."""
    dtype = weights.dtype.element_ty
    g, k = _load_width(grad_read, OF_READ, row, d, D, dtype), _load_width(key, True, row, d, D, dtype)
    beta = tl.full([], 1.0, dtype)
    if SHARP:
        beta = tl.load(sharpness + row).to(dtype)
    mean = tl.full([], 0.0, dtype)
    for first in range(0, K, PIECE):
        p = first + tl.arange(0, PIECE)
        grad_w = tl.load(grad_weights + p, mask=p < K, other=0.0)
        if OF_READ:
            m = load_rows(rows, True, row * K + p, d, D, (p < K)[:, None] & (d[None, :] < D), dtype)
            grad_w += tl.sum(g[None, :] * m, 1)
            tl.debug_barrier()  # all have loaded it
            tl.store(grad_weights + p, grad_w, mask=p < K)
        mean += tl.sum(tl.load(weights + row * K + p, mask=p < K, other=0.0) * grad_w, 0)
    tl.debug_barrier()
    key_square = tl.sum(k * k, 0)
    sum_key, sum_key_square, sum_beta = (
        tl.zeros(d.shape, dtype),
        tl.full([], 0.0, dtype),
        tl.full([], 0.0, dtype),
    )
    for first in range(0, K, PIECE):
        p = first + tl.arange(0, PIECE)
        inside = (p < K)[:, None] & (d[None, :] < D)
        m = load_rows(rows, True, row * K + p, d, D, inside, dtype)
        w = tl.load(weights + row * K + p, mask=p < K, other=0.0)
        squares, dots = tl.sum(m * m, 1), tl.sum(k[None, :] * m, 1)
        q = inverse_root(key_square, squares, EPS)
        scaled = w * (tl.load(grad_weights + p, mask=p < K, other=0.0) - mean) * q
        grad_dots, grad_beta, grad_norms = similarity_backward(scaled, dots, beta, q)
        slot = tl.load(slots + row * K + p, mask=p < K, other=0)
        grad_m = load_rows(grad_memory, True, slot, d, D, inside, dtype)
        grad_m += grad_dots[:, None] * k[None, :] + (2.0 * key_square * grad_norms)[:, None] * m
        if OF_READ:
            grad_m += w[:, None] * g[None, :]
        tl.debug_barrier()  # all have loaded it
        store_rows(grad_memory, grad_m, slot, d, D, inside)
        sum_key += tl.sum(grad_dots[:, None] * m, 0)
        sum_key_square += tl.sum(grad_norms * squares, 0)
        sum_beta += tl.sum(grad_beta, 0)
    _store_width(grad_key, sum_key + 2.0 * sum_key_square * k, row, d, D)
    if SHARP:
        tl.store(grad_sharpness + row, sum_beta.to(grad_sharpness.dtype.element_ty))


@triton.jit
def _write_backward(
    grad_memory, slots, weights, first_slots, first_weights, begins, vectors, gates, gates_of_write, oldest, grad_weights,
    grad_vectors, grad_gates, grad_gates_of_write, row, t, d, D: tl.constexpr, K: tl.constexpr, PIECE: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """Back through the write of one head; grad_weights [K] becomes that of the weights of the step before. What the head read
    there are ``slots`` and ``weights`` [K], before the first step ``first_slots`` and ``first_weights``."""
    dtype = first_weights.dtype.element_ty
    gate, rest, write, closed = write_gates(gates, gates_of_write, row, dtype, GATED)
    vector = _load_width(vectors, True, row, d, D, dtype)
    sum_vector, of_read = tl.zeros(d.shape, dtype), tl.full([], 0.0, dtype)
    for first in range(0, K, PIECE):
        p = first + tl.arange(0, PIECE)
        slot, w = p.to(tl.int64), tl.where(p == 0, 1.0, 0.0).to(dtype)
        if begins == 0:
            if t > 0:
                slot = tl.load(slots + p, mask=p < K, other=0)
                w = tl.load(weights + p, mask=p < K, other=0.0)
            else:
                slot = tl.load(first_slots + p, mask=p < K, other=0)
                w = tl.load(first_weights + p, mask=p < K, other=0.0)
        g = load_rows(grad_memory, True, slot, d, D, (p < K)[:, None] & (d[None, :] < D), dtype)
        grad = tl.sum(vector[None, :] * g, 1)
        sum_vector += tl.sum((write * (gate * w))[:, None] * g, 0)
        of_read += tl.sum(w * grad, 0)
        tl.store(grad_weights + p, write * gate * grad, mask=p < K)
    g = _load_width(grad_memory, True, tl.load(oldest + row), d, D, dtype)
    of_oldest = tl.sum(vector * g, 0)
    _store_width(grad_vectors, sum_vector + write * rest * g, row, d, D)
    grad_gate = write * (gate * rest) * (of_read - of_oldest)
    tl.store(grad_gates + row, grad_gate.to(grad_gates.dtype.element_ty))
    if GATED:
        grad_write = write * closed * (gate * of_read + rest * of_oldest)
        tl.store(grad_gates_of_write + row, grad_write.to(grad_gates.dtype.element_ty))


@triton.jit
def _sparse_read_backward_kernel(
    grad_read, key, sharpness, weights, slots, rows, grad_memory, grad_weights, grad_key, grad_sharpness, N,
    EPS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, K: tl.constexpr, DP: tl.constexpr, PIECE: tl.constexpr,
    SHARP: tl.constexpr, OF_READ: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    for h in range(0, R):
        row = b * R + h
        _read_backward(
            grad_read, key, sharpness, weights, slots, rows, grad_memory + b * N * D, grad_weights + row * K, grad_key,
            grad_sharpness, row, tl.arange(0, DP), EPS, D, K, PIECE, SHARP, OF_READ,
        )  # fmt: skip
        tl.debug_barrier()


@triton.jit(do_not_specialize=["T", "B"])
def _sparse_scan_backward_kernel(
    grad_reads, first_slots, first_weights, keys, vectors, gates, sharpness, gates_of_write, resets, lengths, oldest, slots,
    weights, rows, grad_memory, grad_weights, grad_keys, grad_vectors, grad_gates, grad_sharpness, grad_gates_of_write,
    grad_start, T, B, N, EPS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, K: tl.constexpr, DP: tl.constexpr,
    PIECE: tl.constexpr, BLOCK: tl.constexpr, SHARP: tl.constexpr, GATED: tl.constexpr, OF_READS: tl.constexpr,
    RESETS: tl.constexpr, START: tl.constexpr, LENGTHS: tl.constexpr,
):  # fmt: skip
    """grad_memory [B, N, D] and grad_weights [B, R, K] hold what comes in, and then what goes out."""
    b = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DP)
    grad_memory += b * N * D
    steps = steps_of(lengths, T, b, LENGTHS)
    for j in range(0, steps):
        t = steps - 1 - j
        row = t * B + b
        begins = 0
        if RESETS:
            begins = tl.load(resets + row).to(tl.int32)
        for h in range(0, R):
            _read_backward(
                grad_reads, keys, sharpness, weights, slots, rows, grad_memory, grad_weights + (b * R + h) * K, grad_keys,
                grad_sharpness, row * R + h, d, EPS, D, K, PIECE, SHARP, OF_READS,
            )  # fmt: skip
            tl.debug_barrier()
        for h in range(0, R):
            before, first = ((row - B) * R + h) * K, (b * R + h) * K
            _write_backward(
                grad_memory, slots + before, weights + before, first_slots + first, first_weights + first, begins, vectors,
                gates, gates_of_write, oldest, grad_weights + first, grad_vectors, grad_gates, grad_gates_of_write,
                row * R + h, t, d, D, K, PIECE, GATED,
            )  # fmt: skip
        tl.debug_barrier()
        erased = tl.zeros([DP], grad_memory.dtype.element_ty)
        for h in range(0, R):
            _store_width(grad_memory, erased, tl.load(oldest + row * R + h), d, D)
        tl.debug_barrier()
        if RESETS:
            if begins != 0:
                _begin_backward(
                    grad_memory, grad_weights + b * R * K, grad_start, b, N, D, R * K, BLOCK, START
                )


@triton.jit
def _begin_backward(
    grad_memory,
    grad_weights,
    grad_start,
    b,
    N,
    D: tl.constexpr,
    RK: tl.constexpr,
    BLOCK: tl.constexpr,
    START: tl.constexpr,
):
    """Nothing passes a reset: the gradient of the memory goes to the start, whose of this sample is [N, D]."""
    count = N.to(tl.int64) * D
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        if START:
            places = grad_start + b * count + i
            sum_ = tl.load(places, mask=i < count, other=0.0) + tl.load(
                grad_memory + i, mask=i < count, other=0.0
            )
            tl.store(places, sum_, mask=i < count)
        tl.store(grad_memory + i, tl.zeros([BLOCK], grad_memory.dtype.element_ty), mask=i < count)
    for first in range(0, RK, BLOCK):
        i = first + tl.arange(0, BLOCK)
        tl.store(grad_weights + i, tl.zeros([BLOCK], grad_weights.dtype.element_ty), mask=i < RK)
    tl.debug_barrier()


# ---- launchers -----------------------------------------------------------------------------------------------------------


def _begin(grad: Tensor | None, like: Tensor, *shape: int) -> Tensor:
    """A gradient that is changed where it is, from the one that comes in."""
    return like.new_zeros(shape) if grad is None else grad.clone(memory_format=torch.contiguous_format)


def _constants(keys: Tensor, reads: int) -> dict[str, int]:
    heads, slot_size = keys.shape[-2:]
    piece = piece_of_reads(slot_size, reads)
    return {"D": slot_size, "R": heads, "K": reads, "DP": power_of_two(slot_size), "PIECE": piece}


def sparse_read_backward(
    grad_read: Tensor | None,
    grad_weights: Tensor | None,
    key: Tensor,
    sharpness: Tensor | None,
    weights: Tensor,
    slots: Tensor,
    rows: Tensor,
    num_slots: int,
    num_reads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_read, key, sharpness, weights, slots, rows = contiguous(
        grad_read, key, sharpness, weights, slots, rows
    )
    batch, heads, slot_size = key.shape
    grad_memory = weights.new_zeros(batch, num_slots, slot_size)
    grad_key = torch.empty_like(key)
    grad_sharpness = key.new_empty(0) if sharpness is None else torch.empty_like(sharpness)
    launch(
        _sparse_read_backward_kernel, (batch,), grad_read, key, sharpness, weights, slots, rows, grad_memory,
        _begin(grad_weights, weights, *weights.shape), grad_key, grad_sharpness, num_slots, EPS=eps,
        **_constants(key, num_reads), SHARP=sharpness is not None, OF_READ=grad_read is not None, options=BACKWARD,
    )  # fmt: skip
    return grad_memory, grad_key, grad_sharpness


def sparse_scan_backward(
    grad_reads: Tensor | None,
    grad_memory: Tensor | None,
    grad_read_weights: Tensor | None,
    read_slots: Tensor,
    read_weights: Tensor,
    keys: Tensor,
    write_vectors: Tensor,
    gate_logits: Tensor,
    sharpness: Tensor | None,
    write_gate_logits: Tensor | None,
    resets: Tensor | None,
    lengths: Tensor | None,
    start: Tensor | None,
    oldest: Tensor,
    slot_history: Tensor,
    weight_history: Tensor,
    rows: Tensor,
    num_slots: int,
    eps: float,
    anchor_every: int,
) -> tuple[Tensor, ...]:
    grad_reads, read_weights, resets, lengths = contiguous(grad_reads, read_weights, resets, lengths)
    inputs = contiguous(keys, write_vectors, gate_logits, sharpness, write_gate_logits)
    history = contiguous(oldest, slot_history, weight_history, rows)
    (steps, batch, _, slot_size), reads = keys.shape, read_slots.shape[2]
    read_slots = read_slots.clamp(0, num_slots - 1).contiguous()
    of_memory = _begin(grad_memory, read_weights, batch, num_slots, slot_size)
    of_weights = _begin(grad_read_weights, read_weights, *read_weights.shape)
    grads = [keys.new_empty(0) if x is None else new_steps(x, x.shape, lengths) for x in inputs]
    grad_start = new_gradient_of_start(start, of_memory)
    launch(
        _sparse_scan_backward_kernel, (batch,), grad_reads, read_slots, read_weights, *inputs, resets, lengths,
        *history, of_memory, of_weights, *grads, grad_start, steps, batch, num_slots, EPS=eps,
        **_constants(keys, reads), BLOCK=BLOCK, SHARP=sharpness is not None, GATED=write_gate_logits is not None,
        OF_READS=grad_reads is not None, RESETS=resets is not None, START=start is not None, LENGTHS=lengths is not None,
        options=BACKWARD,
    )  # fmt: skip
    return of_memory, of_weights, *grads, grad_start
