"""least_used and lrua_write in Triton. lrua_scan.py takes from here how slots are chosen and where a head writes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import BACKWARD, FORWARD, contiguous, launch, sum_programs
from ._memory import dot_rows, load_rows, store_rows, sum_slots
from ._sizes import pass_sentence, power_of_two, split

RAW = ("least_used", "lrua_write", "lrua_write_backward")

SORT_ABOVE = 64  # least_used: for more slots than these a sort beats taking one after the other


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
def take_least(usage, slots, n, valid, R, KEEP: tl.constexpr):
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
    take_least(u, slots + b * count, n, n < N, count, True)


def least_used(usage: Tensor, n: int) -> Tensor:
    (usage,) = contiguous(usage)
    batch, num_slots = usage.shape
    if n > SORT_ABOVE:
        return torch.sort(usage, dim=1, stable=True).indices[:, :n].contiguous()
    slots = usage.new_empty(batch, n, dtype=torch.int64)
    launch(
        _least_used_kernel, (batch,), usage, slots, num_slots, n, NP=power_of_two(num_slots), options=FORWARD
    )
    return slots


# ---- lrua_write ---------------------------------------------------------------------------------------------------


@triton.jit
def sigmoids(x):
    """sigmoid(x) and sigmoid(-x), both to full relative precision."""
    e = tl.exp(-tl.abs(x))
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    return tl.where(x > 0, larger, smaller), tl.where(x > 0, smaller, larger)


@triton.jit
def ranks(slots, n, R):
    """From slots [R] to the place of each slot among them, R for the others."""
    rank = tl.full(n.shape, R, tl.int32)
    for r in range(0, R):
        rank = tl.where(n == tl.load(slots + r).to(tl.int32), r, rank)
    return rank


@triton.jit
def targets(rank, r, R, SHARED: tl.constexpr):
    """Where head r writes besides where it read: [heads, slots] or [slots], as r is."""
    if SHARED:
        hit = (rank < R) & (r >= 0)
    else:
        hit = rank == r
    return hit


@triton.jit
def _write_inputs(vectors, gates, rows, r, d, dtype: tl.constexpr, D: tl.constexpr, R: tl.constexpr):
    """Write vectors [heads, width] and both shares of the gate [heads] of one sample, 0 and halves for padding."""
    a = load_rows(vectors, True, rows, d, D, (r[:, None] < R) & (d[None, :] < D), dtype)
    gate, keep = sigmoids(tl.load(gates + rows, mask=r < R, other=0.0).to(dtype))
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
        rank = ranks(slots + b * R, n, R)
        inside_m = mask[:, None] & (d[None, :] < D)
        m = load_rows(memory, True, b * N + n, d, D, inside_m, dtype)
        inside = (r[:, None] < R) & mask[None, :]
        w = load_rows(read_weights, True, rows, n, N, inside, dtype)
        target = tl.where(targets(rank[None, :], r[:, None], R, SHARED), keep[:, None], 0.0)
        w = gate[:, None] * w + target
        store_rows(write_weights, w, rows, n, N, inside)
        # A padding head writes nothing, whatever the memory holds
        written = tl.where(r[:, None, None] < R, w[:, :, None] * a[:, None, :], 0.0)
        m = tl.where(rank[:, None] == 0, 0.0, m) + tl.sum(written, 0)
        store_rows(out_memory, m, b * N + n, d, D, inside_m)


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
        rank = ranks(slots + b * R, n, R)
        places = (b * N + n[:, None]) * D + d[None, :]  # once for load and store: fewer registers
        inside_m = mask[:, None] & (d[None, :] < D)
        inside = (r[:, None] < R) & mask[None, :]
        w = load_rows(read_weights, True, rows, n, N, inside, dtype)
        hit = targets(rank[None, :], r[:, None], R, SHARED)
        g = load_rows(grad_write_weights, OF_WEIGHTS, rows, n, N, inside, dtype)
        if OF_MEMORY:
            m = tl.load(grad_memory + places, mask=inside_m, other=0.0)
            g += dot_rows(a, m)
            write_weights = tl.where(inside, gate[:, None] * w + tl.where(hit, keep[:, None], 0.0), 0.0)
            sum_vector += sum_slots(write_weights, m)
            tl.store(grad_in + places, tl.where(rank[:, None] == 0, 0.0, m), mask=inside_m)
        else:
            tl.store(grad_in + places, tl.zeros([TILE, DP], dtype), mask=inside_m)
        sum_gate += tl.sum(g * w, 1) - tl.sum(tl.where(hit & inside, g, 0.0), 1)
        store_rows(grad_read_weights, g * gate[:, None], rows, n, N, inside)
    row = (part * B + b) * R + r
    store_rows(grad_vectors, sum_vector, row, d, D, (r[:, None] < R) & (d[None, :] < D))
    tl.store(grad_gates + row, (sum_gate * gate * keep).to(grad_gates.dtype.element_ty), mask=r < R)


def write(
    memory: Tensor, read_weights: Tensor, slots: Tensor, vector: Tensor, gate: Tensor, shared: bool
) -> tuple[Tensor, Tensor]:
    """The memory after a write at chosen ``slots`` [B, R], and the write weights."""
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
    memory: Tensor,
    read_weights: Tensor,
    usage: Tensor,
    write_vector: Tensor,
    gate_logit: Tensor,
    shared_target: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    memory, read_weights, write_vector, gate_logit = contiguous(
        memory, read_weights, write_vector, gate_logit
    )
    slots = least_used(usage, read_weights.shape[1])
    return *write(memory, read_weights, slots, write_vector, gate_logit, shared_target), slots


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
    dtype = write_vector.dtype
    return grad_in, grad_read_weights, sum_programs(grad_vector, dtype), sum_programs(grad_gate, dtype)


def sentence(op: str, num_slots: int, slot_size: int, heads: int) -> str:
    if op == "least_used":
        return "a sort" if heads > SORT_ABOVE else "one launch, a program per sample"
    return pass_sentence(num_slots, slot_size, heads)
