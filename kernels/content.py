"""content_read in Triton: one pass over the memory in tiles of slots, with an online softmax as in flash attention (Dao et
al. 2022). Where one sample's slots are split over programs, a second launch combines what they found."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import BACKWARD, FORWARD, contiguous, launch, split

RAW = ("content_read", "content_read_backward")


@triton.jit
def _load_rows(pointer, present: tl.constexpr, rows, columns, num_columns, mask, dtype: tl.constexpr):
    """[rows, columns] of a row-major array as dtype, 0 where masked; zeros where the array is absent."""
    if present:
        values = tl.load(pointer + rows[:, None] * num_columns + columns[None, :], mask=mask, other=0.0).to(dtype)
    else:
        values = tl.zeros([rows.shape[0], columns.shape[0]], dtype)
    return values


@triton.jit
def _read_kernel(
    memory, key, sharpness, read, weights, greatest, total, partial, N, span, splits, EPS: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr, TILE: tl.constexpr,
    SHARP: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Slots [part * span, ...) of one sample. Leaves similarities in weights, and the part's greatest, sum and read; where
    the part is the whole sample, the read and the weights themselves."""
    b = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    dtype = memory.dtype.element_ty
    d, r = tl.arange(0, DP), tl.arange(0, RP)
    valid_rd = (r[:, None] < R) & (d[None, :] < D)
    k = _load_rows(key, True, b * R + r, d, D, valid_rd, dtype)
    beta = tl.full([RP], 1.0, dtype)
    if SHARP:
        beta = tl.load(sharpness + b * R + r, mask=r < R, other=0.0).to(dtype)
    key_square = tl.sum(k * k, 1)
    largest = tl.full([RP], float("-inf"), dtype)
    sum_ = tl.zeros([RP], dtype)
    acc = tl.zeros([RP, DP], dtype)
    end = tl.minimum((part + 1) * span, N)
    for start in range(part * span, end, TILE):
        n = start + tl.arange(0, TILE)
        mask = n < end
        m = tl.load(memory + (b * N + n[:, None]) * D + d[None, :], mask=mask[:, None] & (d[None, :] < D), other=0.0)
        dots = tl.sum(k[:, None, :] * m[None, :, :], 2)
        norms = key_square[:, None] * tl.sum(m * m, 1)[None, :] + EPS
        score = tl.where(mask[None, :], beta[:, None] * dots / tl.sqrt(norms), float("-inf"))
        inside = (r[:, None] < R) & mask[None, :]
        tl.store(weights + (b * R + r[:, None]) * N + n[None, :], score, mask=inside)
        larger = tl.maximum(largest, tl.max(score, 1))
        shrink = tl.exp(largest - larger)
        e = tl.exp(score - larger[:, None])
        sum_ = sum_ * shrink + tl.sum(e, 1)
        acc = acc * shrink[:, None] + tl.sum(e[:, :, None] * m[None, :, :], 1)
        largest = larger
    if WHOLE:
        out = acc / sum_[:, None]
        tl.store(read + (b * R + r[:, None]) * D + d[None, :], out.to(read.dtype.element_ty), mask=valid_rd)
        tl.debug_barrier()
        for start in range(0, N, TILE):
            n = start + tl.arange(0, TILE)
            place = weights + (b * R + r[:, None]) * N + n[None, :]
            inside = (r[:, None] < R) & (n[None, :] < N)
            score = tl.load(place, mask=inside, other=float("-inf"))
            tl.store(place, tl.exp(score - largest[:, None]) / sum_[:, None], mask=inside)
    else:
        row = (b * splits + part) * R + r
        tl.store(greatest + row, largest, mask=r < R)
        tl.store(total + row, sum_, mask=r < R)
        tl.store(partial + row[:, None] * D + d[None, :], acc, mask=valid_rd)


@triton.jit
def _combine_kernel(
    read, weights, greatest, total, partial, N, span, splits,
    D: tl.constexpr, R: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The greatest and the sum of all parts; then this part's similarities made into weights. The first part reads."""
    b = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    dtype = weights.dtype.element_ty
    d, r = tl.arange(0, DP), tl.arange(0, RP)
    largest = tl.full([RP], float("-inf"), dtype)
    for p in range(0, splits):
        found = tl.load(greatest + (b * splits + p) * R + r, mask=r < R, other=0.0)
        largest = tl.where(found > largest, found, largest)
    sum_ = tl.zeros([RP], dtype)
    acc = tl.zeros([RP, DP], dtype)
    valid_rd = (r[:, None] < R) & (d[None, :] < D)
    for p in range(0, splits):
        row = (b * splits + p) * R + r
        shrink = tl.exp(tl.load(greatest + row, mask=r < R, other=0.0) - largest)
        sum_ += tl.load(total + row, mask=r < R, other=1.0) * shrink
        if part == 0:
            acc += tl.load(partial + row[:, None] * D + d[None, :], mask=valid_rd, other=0.0) * shrink[:, None]
    if part == 0:
        out = acc / sum_[:, None]
        tl.store(read + (b * R + r[:, None]) * D + d[None, :], out.to(read.dtype.element_ty), mask=valid_rd)
    end = tl.minimum((part + 1) * span, N)
    for start in range(part * span, end, TILE):
        n = start + tl.arange(0, TILE)
        place = weights + (b * R + r[:, None]) * N + n[None, :]
        inside = (r[:, None] < R) & (n[None, :] < end)
        score = tl.load(place, mask=inside, other=float("-inf"))
        tl.store(place, tl.exp(score - largest[:, None]) / sum_[:, None], mask=inside)


@triton.jit
def _backward_kernel(
    grad_read, grad_weights, memory, key, sharpness, read, weights, grad_memory, grad_key, grad_sharpness, B, N, span,
    EPS: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr, TILE: tl.constexpr,
    SHARP: tl.constexpr, OF_READ: tl.constexpr, OF_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Slots [part * span, ...) of one sample: their gradient, and their share of the gradients of key and sharpness."""
    b = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    dtype = memory.dtype.element_ty
    d, r = tl.arange(0, DP), tl.arange(0, RP)
    valid_rd = (r[:, None] < R) & (d[None, :] < D)
    rows = b * R + r
    k = _load_rows(key, True, rows, d, D, valid_rd, dtype)
    beta = tl.full([RP], 1.0, dtype)
    if SHARP:
        beta = tl.load(sharpness + rows, mask=r < R, other=0.0).to(dtype)
    key_square = tl.sum(k * k, 1)
    # delta: the sum over slots of w dL/dw; the part through the read is grad_read . read
    g = _load_rows(grad_read, OF_READ, rows, d, D, valid_rd, dtype)
    delta = tl.zeros([RP], dtype)
    if OF_READ:
        delta += tl.sum(g * _load_rows(read, True, rows, d, D, valid_rd, dtype), 1)
    if OF_WEIGHTS:
        for start in range(0, N, TILE):
            n = start + tl.arange(0, TILE)
            inside = (r[:, None] < R) & (n[None, :] < N)
            w = _load_rows(weights, True, rows, n, N, inside, dtype)
            delta += tl.sum(w * _load_rows(grad_weights, True, rows, n, N, inside, dtype), 1)
    sum_key = tl.zeros([RP, DP], dtype)
    sum_beta = tl.zeros([RP], dtype)
    sum_key_square = tl.zeros([RP], dtype)
    end = tl.minimum((part + 1) * span, N)
    for start in range(part * span, end, TILE):
        n = start + tl.arange(0, TILE)
        mask = n < end
        slots = (b * N + n[:, None]) * D + d[None, :]
        inside_m = mask[:, None] & (d[None, :] < D)
        m = tl.load(memory + slots, mask=inside_m, other=0.0)
        inside = (r[:, None] < R) & mask[None, :]
        w = _load_rows(weights, True, rows, n, N, inside, dtype)
        dots = tl.sum(k[:, None, :] * m[None, :, :], 2)
        squares = tl.sum(m * m, 1)
        q = 1.0 / tl.sqrt(key_square[:, None] * squares[None, :] + EPS)
        grad_w = _load_rows(grad_weights, OF_WEIGHTS, rows, n, N, inside, dtype)
        if OF_READ:
            grad_w += tl.sum(g[:, None, :] * m[None, :, :], 2)
        scaled = w * (grad_w - delta[:, None]) * q
        grad_dots = scaled * beta[:, None]
        grad_cosine = scaled * dots
        sum_beta += tl.sum(grad_cosine, 1)
        grad_norms = grad_cosine * (-0.5 * beta[:, None]) * q * q
        sum_key_square += tl.sum(grad_norms * squares[None, :], 1)
        grad_m = 2.0 * tl.sum(grad_norms * key_square[:, None], 0)[:, None] * m
        grad_m += tl.sum(grad_dots[:, :, None] * k[:, None, :], 0)
        if OF_READ:
            grad_m += tl.sum(w[:, :, None] * g[:, None, :], 0)
        tl.store(grad_memory + slots, grad_m, mask=inside_m)
        sum_key += tl.sum(grad_dots[:, :, None] * m[None, :, :], 1)
    sum_key += 2.0 * sum_key_square[:, None] * k
    row = (part * B + b) * R + r
    tl.store(grad_key + row[:, None] * D + d[None, :], sum_key.to(grad_key.dtype.element_ty), mask=valid_rd)
    if SHARP:
        tl.store(grad_sharpness + row, sum_beta.to(grad_sharpness.dtype.element_ty), mask=r < R)


def content_read(memory: Tensor, key: Tensor, sharpness: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    memory, key, sharpness = contiguous(memory, key, sharpness)
    batch, num_slots, slot_size = memory.shape
    heads = key.shape[1]
    constants, parts, span = split(batch, num_slots, slot_size, heads, memory.device)
    read, weights = torch.empty_like(key), memory.new_empty(batch, heads, num_slots)
    found = [weights] * 3
    if parts > 1:
        found = [memory.new_empty(batch, parts, heads, *tail) for tail in ((), (), (slot_size,))]
    launch(
        _read_kernel, (batch, parts), memory, key, sharpness, read, weights, *found, num_slots, span, parts,
        EPS=eps, **constants, SHARP=sharpness is not None, WHOLE=parts == 1, options=FORWARD,
    )  # fmt: skip
    if parts > 1:
        launch(
            _combine_kernel, (batch, parts), read, weights, *found, num_slots, span, parts, **constants, options=FORWARD
        )
    return read, weights


def content_read_backward(
    grad_read: Tensor | None,
    grad_weights: Tensor | None,
    memory: Tensor,
    key: Tensor,
    sharpness: Tensor | None,
    read: Tensor,
    weights: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_read, grad_weights, memory, key, sharpness, read, weights = contiguous(
        grad_read, grad_weights, memory, key, sharpness, read, weights
    )
    batch, num_slots, slot_size = memory.shape
    heads = key.shape[1]
    constants, parts, span = split(batch, num_slots, slot_size, heads, memory.device)
    dtype = key.dtype if parts == 1 else memory.dtype
    grad_memory = torch.empty_like(memory)
    grad_key = key.new_empty(parts, batch, heads, slot_size, dtype=dtype)
    grad_sharpness = key.new_empty((parts, batch, heads) if sharpness is not None else (parts, 0), dtype=dtype)
    launch(
        _backward_kernel, (batch, parts), grad_read, grad_weights, memory, key, sharpness, read, weights, grad_memory,
        grad_key, grad_sharpness, batch, num_slots, span, EPS=eps, **constants, SHARP=sharpness is not None,
        OF_READ=grad_read is not None, OF_WEIGHTS=grad_weights is not None, options=BACKWARD,
    )  # fmt: skip
    if parts == 1:
        return grad_memory, grad_key[0], grad_sharpness[0]
    return grad_memory, grad_key.sum(0).to(key.dtype), grad_sharpness.sum(0).to(key.dtype)
