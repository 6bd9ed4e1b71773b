"""content_read in Triton: forward in one pass over the memory in tiles of slots, with an online softmax as in flash attention
(Dao et al. 2022), backward in two. Where one sample's slots are split over programs, a second launch combines what they
found."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import BACKWARD, FORWARD, contiguous, launch, sum_programs
from ._memory import dot_rows, inverse_root, load_rows, similarity_backward, store_rows, sum_heads, sum_slots
from ._sizes import pass_sentence, split

RAW = ("content_read", "content_read_backward")


@triton.jit
def _load_head_inputs(
    key, sharpness, rows, r, d, dtype: tl.constexpr, D: tl.constexpr, R: tl.constexpr, SHARP: tl.constexpr
):
    """Keys [heads, width], their squares and sharpness [heads] of one sample."""
    k = load_rows(key, True, rows, d, D, (r[:, None] < R) & (d[None, :] < D), dtype)
    beta = tl.full(r.shape, 1.0, dtype)
    if SHARP:
        beta = tl.load(sharpness + rows, mask=r < R, other=0.0).to(dtype)
    return k, tl.sum(k * k, 1), beta


@triton.jit
def _scores_to_weights(weights, rows, greatest, total, first, end, r, N, R: tl.constexpr, TILE: tl.constexpr):
    """Slots [first, end): softmax of the similarities that weights hold, their greatest and sum over all slots known."""
    for start in range(first, end, TILE):
        n = start + tl.arange(0, TILE)
        place = weights + rows[:, None] * N + n[None, :]
        inside = (r[:, None] < R) & (n[None, :] < end)
        score = tl.load(place, mask=inside, other=float("-inf"))
        tl.store(place, tl.exp(score - greatest[:, None]) / total[:, None], mask=inside)


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
    rows = b * R + r
    valid_rd = (r[:, None] < R) & (d[None, :] < D)
    k, key_square, beta = _load_head_inputs(key, sharpness, rows, r, d, dtype, D, R, SHARP)
    largest = tl.full([RP], float("-inf"), dtype)
    sum_ = tl.zeros([RP], dtype)
    acc = tl.zeros([RP, DP], dtype)
    end = tl.minimum((part + 1) * span, N)
    for start in range(part * span, end, TILE):
        n = start + tl.arange(0, TILE)
        mask = n < end
        m = load_rows(memory, True, b * N + n, d, D, mask[:, None] & (d[None, :] < D), dtype)
        norms = key_square[:, None] * tl.sum(m * m, 1)[None, :] + EPS
        score = tl.where(mask[None, :], beta[:, None] * dot_rows(k, m) / tl.sqrt(norms), float("-inf"))
        store_rows(weights, score, rows, n, N, (r[:, None] < R) & mask[None, :])
        larger = tl.maximum(largest, tl.max(score, 1))
        shrink = tl.exp(largest - larger)
        e = tl.exp(score - larger[:, None])
        sum_ = sum_ * shrink + tl.sum(e, 1)
        acc = acc * shrink[:, None] + sum_slots(e, m)
        largest = larger
    if WHOLE:
        store_rows(read, acc / sum_[:, None], rows, d, D, valid_rd)
        tl.debug_barrier()
        _scores_to_weights(weights, rows, largest, sum_, 0, N, r, N, R, TILE)
    else:
        row = (b * splits + part) * R + r
        tl.store(greatest + row, largest, mask=r < R)
        tl.store(total + row, sum_, mask=r < R)
        store_rows(partial, acc, row, d, D, valid_rd)


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
    rows = b * R + r
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
            acc += load_rows(partial, True, row, d, D, valid_rd, dtype) * shrink[:, None]
    if part == 0:
        store_rows(read, acc / sum_[:, None], rows, d, D, valid_rd)
    end = tl.minimum((part + 1) * span, N)
    _scores_to_weights(weights, rows, largest, sum_, part * span, end, r, N, R, TILE)


@triton.jit
def _mean_kernel(
    grad_read, grad_weights, memory, weights, grads, means, N, span, splits, D: tl.constexpr, R: tl.constexpr,
    DP: tl.constexpr, RP: tl.constexpr, TILE: tl.constexpr, OF_READ: tl.constexpr, OF_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """dL/dw per slot, and a part's share of the sum over slots of w dL/dw. The gradients count only as far as they differ from
    it, so both must come from the very same bits, which a great sharpness would tell apart: neither a product of the read's
    gradient and the read would do, nor to compute dL/dw again in another kernel."""
    b = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    dtype = memory.dtype.element_ty
    d, r = tl.arange(0, DP), tl.arange(0, RP)
    rows = b * R + r
    g = load_rows(grad_read, OF_READ, rows, d, D, (r[:, None] < R) & (d[None, :] < D), dtype)
    mean = tl.zeros([RP], dtype)
    end = tl.minimum((part + 1) * span, N)
    for start in range(part * span, end, TILE):
        n = start + tl.arange(0, TILE)
        mask = n < end
        m = load_rows(memory, True, b * N + n, d, D, mask[:, None] & (d[None, :] < D), dtype)
        inside = (r[:, None] < R) & mask[None, :]
        w = load_rows(weights, True, rows, n, N, inside, dtype)
        grad_w = load_rows(grad_weights, OF_WEIGHTS, rows, n, N, inside, dtype)
        if OF_READ:
            grad_w += dot_rows(g, m)
        store_rows(grads, grad_w, rows, n, N, inside)
        mean += tl.sum(w * grad_w, 1)
    tl.store(means + (b * splits + part) * R + r, mean, mask=r < R)


@triton.jit
def _backward_kernel(
    grad_read, memory, key, sharpness, weights, grads, means, grad_memory, grad_key, grad_sharpness, B, N, span,
    splits, EPS: tl.constexpr,
    D: tl.constexpr, R: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr, TILE: tl.constexpr,
    SHARP: tl.constexpr, OF_READ: tl.constexpr,
):  # fmt: skip
    """Slots [part * span, ...) of one sample: their gradient, and their share of the gradients of key and sharpness."""
    b = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    dtype = memory.dtype.element_ty
    d, r = tl.arange(0, DP), tl.arange(0, RP)
    valid_rd = (r[:, None] < R) & (d[None, :] < D)
    rows = b * R + r
    k, key_square, beta = _load_head_inputs(key, sharpness, rows, r, d, dtype, D, R, SHARP)
    mean = tl.zeros([RP], dtype)
    for p in range(0, splits):
        mean += tl.load(means + (b * splits + p) * R + r, mask=r < R, other=0.0)
    sum_key = tl.zeros([RP, DP], dtype)
    sum_beta = tl.zeros([RP], dtype)
    sum_key_square = tl.zeros([RP], dtype)
    end = tl.minimum((part + 1) * span, N)
    for start in range(part * span, end, TILE):
        n = start + tl.arange(0, TILE)
        mask = n < end
        inside_m = mask[:, None] & (d[None, :] < D)
        slots = (b * N + n[:, None]) * D + d[None, :]  # once for load and store: fewer registers
        m = tl.load(memory + slots, mask=inside_m, other=0.0)
        inside = (r[:, None] < R) & mask[None, :]
        g = load_rows(grad_read, OF_READ, rows, d, D, valid_rd, dtype)  # again for each tile: fewer registers
        w = load_rows(weights, True, rows, n, N, inside, dtype)
        dots, squares = dot_rows(k, m), tl.sum(m * m, 1)
        q = inverse_root(key_square[:, None], squares[None, :], EPS)
        grad_w = load_rows(grads, True, rows, n, N, inside, dtype)
        scaled = w * (grad_w - mean[:, None]) * q
        grad_dots, grad_beta, grad_norms = similarity_backward(scaled, dots, beta[:, None], q)
        sum_beta += tl.sum(grad_beta, 1)
        sum_key_square += tl.sum(grad_norms * squares[None, :], 1)
        grad_m = 2.0 * tl.sum(grad_norms * key_square[:, None], 0)[:, None] * m
        grad_m += sum_heads(grad_dots, k)
        if OF_READ:
            grad_m += sum_heads(w, g)
        tl.store(grad_memory + slots, grad_m, mask=inside_m)
        sum_key += sum_slots(grad_dots, m)
    sum_key += 2.0 * sum_key_square[:, None] * k
    row = (part * B + b) * R + r
    store_rows(grad_key, sum_key, row, d, D, valid_rd)
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
            _combine_kernel, (batch, parts), read, weights, *found, num_slots, span, parts,
            **constants, options=FORWARD,
        )  # fmt: skip
    return read, weights


def content_read_backward(
    grad_read: Tensor | None,
    grad_weights: Tensor | None,
    memory: Tensor,
    key: Tensor,
    sharpness: Tensor | None,
    weights: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_read, grad_weights, memory, key, sharpness, weights = contiguous(
        grad_read, grad_weights, memory, key, sharpness, weights
    )
    batch, num_slots, slot_size = memory.shape
    heads = key.shape[1]
    constants, parts, span = split(batch, num_slots, slot_size, heads, memory.device)
    dtype = key.dtype if parts == 1 else memory.dtype
    grad_memory = torch.empty_like(memory)
    grad_key = key.new_empty(parts, batch, heads, slot_size, dtype=dtype)
    grad_sharpness = key.new_empty(
        (parts, batch, heads) if sharpness is not None else (parts, 0), dtype=dtype
    )
    grads, means = torch.empty_like(weights), memory.new_empty(batch, parts, heads)
    of_read = grad_read is not None
    launch(
        _mean_kernel, (batch, parts), grad_read, grad_weights, memory, weights, grads, means, num_slots, span, parts,
        **constants, OF_READ=of_read, OF_WEIGHTS=grad_weights is not None, options=BACKWARD,
    )  # fmt: skip
    launch(
        _backward_kernel, (batch, parts), grad_read, memory, key, sharpness, weights, grads, means, grad_memory,
        grad_key, grad_sharpness, batch, num_slots, span, parts, EPS=eps, **constants, SHARP=sharpness is not None,
        OF_READ=of_read, options=BACKWARD,
    )  # fmt: skip
    return grad_memory, sum_programs(grad_key, key.dtype), sum_programs(grad_sharpness, key.dtype)


def sentence(op: str, num_slots: int, slot_size: int, heads: int) -> str:
    return f"{pass_sentence(num_slots, slot_size, heads)}; backward two"
