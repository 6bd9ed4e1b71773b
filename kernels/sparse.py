"""sparse_read and sparse_scan in Triton, forward (a step is a scan of one); sparse_backward.py has the way back.

A step is three launches. In the first two, programs have a part of a sample's slots each, and change rows and times of that
part alone: so a launch is the only barrier between programs.

- _sparse_oldest_kernel begins samples anew, and finds the oldest slots of each part;
- _sparse_search_kernel finds the oldest of all, writes, and finds the slots of each part that are most like each key;
- _sparse_read_kernel, a program per sample, finds the most similar of all, reads them, and notes the access.

sparse_read is the last two without a write. The oldest and the most similar are the first few of a list in an order:
next_of takes one after the other, from a list in global memory, of any length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import FORWARD, contiguous, launch, new_steps
from ._memory import dot_rows, inverse_root, load_rows, softmax, store_rows
from ._sequences import steps_of
from ._sizes import pass_sentence, power_of_two, split
from .lrua import sigmoids

RAW = ("sparse_read", "sparse_scan")

PROGRAMS = 4  # of a search, on each multiprocessor: enough of the memory has to be on its way at a time
LIST_NUMBERS = 2048  # of a list, or of several side by side, that a program looks at at once
PIECE_NUMBERS = (
    4096  # of the rows that a head reads, and of other blocks of what heads touch, that it holds at once
)

# ---- the first few of a list ---------------------------------------------------------------------------------------------


@triton.jit
def before_all(like, dtype: tl.constexpr):
    """Key and place with which next_of begins, for as many lists as ``like`` has."""
    last: tl.constexpr = (1 << (dtype.primitive_bitwidth - 1)) - 1
    return tl.full(like.shape, -last - 1, dtype), tl.full(like.shape, -1, tl.int32)


@triton.jit
def next_of(keys, rows, valid, length, first, end, key, place, LIST: tl.constexpr):
    """Of some rows of keys [.., length], at places [first, end) of each: the one that follows (key, place), ascending by key,
    equal ones by place."""
    last: tl.constexpr = (1 << (keys.dtype.element_ty.primitive_bitwidth - 1)) - 1  # stands for none
    least = tl.full(rows.shape, last, keys.dtype.element_ty)
    least_place = tl.zeros(rows.shape, tl.int32)
    for start in range(first, end, LIST):
        n = start + tl.arange(0, LIST)
        inside = valid[:, None] & (n[None, :] < end)
        x = tl.load(keys + rows[:, None] * length + n[None, :], mask=inside, other=last)
        follows = (x > key[:, None]) | ((x == key[:, None]) & (n[None, :] > place[:, None]))
        found, at = tl.min(tl.where(follows, x, last), 1, return_indices=True)
        least_place = tl.where(found < least, start + at, least_place)
        least = tl.where(found < least, found, least)
    return least, least_place


@triton.jit
def _key_of(score, dtype: tl.constexpr):
    """An integer of the score's width that ascends as the score descends: NaN first, -0 equal to 0."""
    last: tl.constexpr = (1 << (dtype.primitive_bitwidth - 1)) - 1
    bits = tl.where(score == 0, 0.0, score).to(dtype, bitcast=True)
    ascending = tl.where(bits < 0, bits ^ last, bits)
    return ~tl.where(score == score, ascending, last)


@triton.jit
def _score_of(key, dtype: tl.constexpr):
    last: tl.constexpr = (1 << (key.dtype.primitive_bitwidth - 1)) - 1
    return tl.where(~key < 0, ~key ^ last, ~key).to(dtype, bitcast=True)


# ---- the write -----------------------------------------------------------------------------------------------------------


@triton.jit
def write_gates(gates, gates_of_write, row, dtype: tl.constexpr, GATED: tl.constexpr):
    """Of one head: the shares that go to the slots read last and to the oldest, the factor on both, and what it lacks of 1."""
    gate, rest = sigmoids(tl.load(gates + row).to(dtype))
    write, closed = gate * 0.0 + 1.0, gate * 0.0
    if GATED:
        write, closed = sigmoids(tl.load(gates_of_write + row).to(dtype))
    return gate, rest, write, closed


@triton.jit
def _sum_where_same(slot, others, weights):
    """Per slot, the weights of those of the others that are it."""
    return tl.sum(tl.where(slot[:, None] == others[None, :], weights[None, :], 0.0), 1)


@triton.jit
def _add_to_rows(memory, slot, weight, vector, d, b, begin, end, N, D: tl.constexpr):
    ours = ((slot >= begin) & (slot < end))[:, None] & (d[None, :] < D)
    m = load_rows(memory, True, b * N + slot, d, D, ours, vector.dtype) + weight[:, None] * vector[None, :]
    tl.debug_barrier()  # all have loaded them
    store_rows(memory, m, b * N + slot, d, D, ours)
    tl.debug_barrier()


@triton.jit
def _erase_and_add(
    memory, slots, weights, vectors, gates, gates_of_write, old_times, old_slots, oldest, b, row, of_step, begin, end, N,
    parts, D: tl.constexpr, R: tl.constexpr, K: tl.constexpr, DP: tl.constexpr, PIECE: tl.constexpr,
    LIST: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """On the rows [begin, end) of sample b. All programs join what each found to be old, and store the same."""
    d = tl.arange(0, DP)
    one = b + tl.arange(0, 1)
    age, place = before_all(one, tl.int64)
    for r in range(0, R):
        age, place = next_of(old_times, one, one >= 0, parts * R, 0, parts * R, age, place, LIST)
        slot = tl.load(old_slots + one * parts * R + place)
        tl.store(oldest + of_step * R + r + tl.arange(0, 1), slot)
        ours = ((slot >= begin) & (slot < end))[:, None] & (d[None, :] < D)
        store_rows(memory, tl.zeros([1, DP], memory.dtype.element_ty), one * N + slot, d, D, ours)
    tl.debug_barrier()
    for r in range(0, R):
        gate, rest, write, _ = write_gates(gates, gates_of_write, row * R + r, memory.dtype.element_ty, GATED)
        vector = tl.load(vectors + (row * R + r) * D + d, mask=d < D, other=0.0).to(memory.dtype.element_ty)
        for first in range(0, K, PIECE):
            p = first + tl.arange(0, PIECE)
            slot = tl.load(slots + (b * R + r) * K + p, mask=p < K, other=-1)
            weight = write * (gate * tl.load(weights + (b * R + r) * K + p, mask=p < K, other=0.0))
            # A slot that a caller has named twice is stored twice, so each time with all that goes to it.
            weight = _sum_where_same(slot, slot, weight)
            _add_to_rows(memory, slot, weight, vector, d, b, begin, end, N, D)
        slot = tl.load(oldest + of_step * R + r + tl.arange(0, 1))
        _add_to_rows(memory, slot, tl.zeros([1], write.dtype) + write * rest, vector, d, b, begin, end, N, D)


# ---- kernels -------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["t", "T", "B"])
def _sparse_oldest_kernel(
    memory, slots, weights, last_access, clock, resets, lengths, start, old_times, old_slots, t, T, B, N, span, parts,
    D: tl.constexpr, R: tl.constexpr, K: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr, LIST: tl.constexpr,
    RESETS: tl.constexpr, LENGTHS: tl.constexpr,
):  # fmt: skip
    """Slots [part * span, ...) of one sample: begun anew where there is a reset; then the R oldest, by (last access, slot)."""
    b = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if t >= steps_of(lengths, T, b, LENGTHS):
        return
    begin = part * span
    end = tl.minimum(begin + span, N)
    if RESETS:
        if tl.load(resets + t * B + b):
            d = tl.arange(0, DP)
            for first in range(begin, end, TILE):
                n = first + tl.arange(0, TILE)
                inside = (n < end)[:, None] & (d[None, :] < D)
                m = load_rows(start, True, n.to(tl.int64), d, D, inside, memory.dtype.element_ty)
                store_rows(memory, m, b * N + n, d, D, inside)
                tl.store(last_access + b * N + n, tl.where(n == 0, 0, -1).to(tl.int64), mask=n < end)
            if part == 0:
                for first in range(0, R * K, LIST):
                    j = first + tl.arange(0, LIST)
                    tl.store(slots + b * R * K + j, (j % K).to(tl.int64), mask=j < R * K)
                    at_first = tl.where(j % K == 0, 1.0, 0.0).to(weights.dtype.element_ty)
                    tl.store(weights + b * R * K + j, at_first, mask=j < R * K)
                tl.store(clock + b, 0)
            tl.debug_barrier()
    one = b + tl.arange(0, 1)
    age, place = before_all(one, tl.int64)
    for r in range(0, R):
        age, place = next_of(last_access, one, one >= 0, N, begin, end, age, place, LIST)
        tl.store(old_times + (one * parts + part) * R + r, age)
        tl.store(old_slots + (one * parts + part) * R + r, place.to(tl.int64))


@triton.jit(do_not_specialize=["t", "T", "B", "kept"])
def _sparse_search_kernel(
    memory, key, slots, weights, vectors, gates, gates_of_write, lengths, old_times, old_slots, oldest, scores, near_keys,
    near_slots, t, T, B, N, span, parts, kept, EPS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    DP: tl.constexpr, RP: tl.constexpr, TILE: tl.constexpr, PIECE: tl.constexpr, LIST: tl.constexpr, STEP: tl.constexpr,
    GATED: tl.constexpr, LENGTHS: tl.constexpr,
):  # fmt: skip
    """Slots [part * span, ...) of one sample: written to, in a step; then each head's K most similar. ``scores`` [B, R, N] is
    scratch."""
    b = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if t >= steps_of(lengths, T, b, LENGTHS):
        return
    begin = part * span
    end = tl.minimum(begin + span, N)
    row = t * B + b
    if STEP:
        _erase_and_add(
            memory, slots, weights, vectors, gates, gates_of_write, old_times, old_slots, oldest, b, row, t * kept * B + b,
            begin, end, N, parts, D, R, K, DP, PIECE, LIST, GATED,
        )  # fmt: skip
    dtype = memory.dtype.element_ty
    d, r = tl.arange(0, DP), tl.arange(0, RP)
    of_width = d[None, :] < D
    k = load_rows(key, True, row * R + r, d, D, (r[:, None] < R) & of_width, dtype)
    key_square = tl.sum(k * k, 1)
    rows = b * R + r
    for first in range(begin, end, TILE):
        n = first + tl.arange(0, TILE)
        m = load_rows(memory, True, b * N + n, d, D, (n < end)[:, None] & of_width, dtype)
        score = dot_rows(k, m) * inverse_root(key_square[:, None], tl.sum(m * m, 1)[None, :], EPS)
        store_rows(
            scores, _key_of(score, scores.dtype.element_ty), rows, n, N, (r[:, None] < R) & (n[None, :] < end)
        )
    tl.debug_barrier()
    score, place = before_all(r, scores.dtype.element_ty)
    for j in range(0, K):
        score, place = next_of(scores, rows, r < R, N, begin, end, score, place, LIST)
        tl.store(near_keys + (rows * parts + part) * K + j, score, mask=r < R)
        tl.store(near_slots + (rows * parts + part) * K + j, place.to(tl.int64), mask=r < R)


@triton.jit
def _note_access(
    last_access, clock, slots, weights, gates, gates_of_write, oldest, new_slots, new_weights, row,
    R: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, TOUCHED: tl.constexpr, THRESHOLD: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Of one sample: the slots that a head read before, its oldest, and those that it reads get the clock, where all weights
    that they have exceed the threshold, summed as the reference does: each head's in this order, then over the heads."""
    touched: tl.constexpr = 2 * K + 1  # by a head
    dtype = weights.dtype.element_ty
    now = tl.load(clock) + 1
    k = tl.arange(0, KP)
    for first in range(0, R * touched, TOUCHED):
        j = first + tl.arange(0, TOUCHED)
        r, e, valid = j // touched, j % touched, j < R * touched
        slot = tl.load(slots + r * K + e, mask=valid & (e < K), other=0)
        slot += tl.load(oldest + r, mask=valid & (e == K), other=0)
        slot += tl.load(new_slots + r * K + (e - K - 1), mask=valid & (e > K), other=0)
        total = tl.zeros([TOUCHED], dtype)
        for h in range(0, R):
            gate, rest, write, _ = write_gates(gates, gates_of_write, row * R + h, dtype, GATED)
            before = tl.load(slots + h * K + k, mask=k < K, other=-1)
            written = write * (gate * tl.load(weights + h * K + k, mask=k < K, other=0.0))
            of_head = _sum_where_same(slot, before, written)
            of_head += tl.where(slot == tl.load(oldest + h), write * rest, 0.0)
            read = tl.load(new_slots + h * K + k, mask=k < K, other=-1)
            total += of_head + _sum_where_same(
                slot, read, tl.load(new_weights + h * K + k, mask=k < K, other=0.0)
            )
        tl.store(last_access + slot, now + slot * 0, mask=valid & (total > THRESHOLD))
    tl.debug_barrier()  # all have seen the clock
    tl.store(clock, now)


@triton.jit(do_not_specialize=["t", "T", "B", "kept"])
def _sparse_read_kernel(
    memory, sharpness, near_keys, near_slots, new_slots, new_weights, rows, read, slots, weights, last_access, clock, gates,
    gates_of_write, oldest, lengths, t, T, B, N, parts, kept, D: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    DP: tl.constexpr, RP: tl.constexpr, KP: tl.constexpr, PIECE: tl.constexpr, LIST: tl.constexpr, TOUCHED: tl.constexpr,
    THRESHOLD: tl.constexpr, SHARP: tl.constexpr, KEEP: tl.constexpr, STEP: tl.constexpr, GATED: tl.constexpr,
    LENGTHS: tl.constexpr,
):  # fmt: skip
    """One sample: joins what the parts found to be similar, reads it, and in a step notes the access and hands on what was
    read."""
    b = tl.program_id(0).to(tl.int64)
    if t >= steps_of(lengths, T, b, LENGTHS):
        return
    dtype = memory.dtype.element_ty
    row, of_step = t * B + b, t * kept * B + b
    new_slots += of_step * R * K
    new_weights += of_step * R * K
    r = tl.arange(0, RP)
    lists = b * R + r
    score, place = before_all(r, near_keys.dtype.element_ty)
    for j in range(0, K):
        score, place = next_of(near_keys, lists, r < R, parts * K, 0, parts * K, score, place, LIST)
        slot = tl.load(near_slots + lists * parts * K + place, mask=r < R, other=0)
        tl.store(new_slots + r * K + j, slot, mask=r < R)
        tl.store(new_weights + r * K + j, _score_of(score, dtype), mask=r < R)
    tl.debug_barrier()
    d, k = tl.arange(0, DP), tl.arange(0, KP)
    for h in range(0, R):
        beta = tl.full([], 1.0, dtype)
        if SHARP:
            beta = tl.load(sharpness + row * R + h).to(dtype)
        of_head = tl.load(new_weights + h * K + k, mask=k < K, other=0.0)
        tl.debug_barrier()  # the weights take the place of the scores
        tl.store(new_weights + h * K + k, softmax(beta * of_head, k < K), mask=k < K)
        tl.debug_barrier()
        sum_ = tl.zeros([DP], dtype)
        for first in range(0, K, PIECE):
            i = first + tl.arange(0, PIECE)
            slot = tl.load(new_slots + h * K + i, mask=i < K, other=0)
            inside = (i < K)[:, None] & (d[None, :] < D)
            m = load_rows(memory, True, b * N + slot, d, D, inside, dtype)
            if KEEP:
                store_rows(rows, m, (row * R + h) * K + i, d, D, inside)
            sum_ += tl.sum(tl.load(new_weights + h * K + i, mask=i < K, other=0.0)[:, None] * m, 0)
        tl.store(read + (row * R + h) * D + d, sum_.to(read.dtype.element_ty), mask=d < D)
    if STEP:
        slots += b * R * K
        weights += b * R * K
        _note_access(
            last_access + b * N, clock + b, slots, weights, gates, gates_of_write, oldest + of_step * R, new_slots, new_weights,
            row, R, K, KP, TOUCHED, THRESHOLD, GATED,
        )  # fmt: skip
        for first in range(0, R * K, LIST):
            p = first + tl.arange(0, LIST)
            tl.store(slots + p, tl.load(new_slots + p, mask=p < R * K, other=0), mask=p < R * K)
            tl.store(weights + p, tl.load(new_weights + p, mask=p < R * K, other=0.0), mask=p < R * K)


# ---- launchers -----------------------------------------------------------------------------------------------------------


def _search(
    memory: Tensor, heads: int, reads: int
) -> tuple[dict[str, int], dict[str, int], int, int, list[Tensor]]:
    """Constants of the search and of the read, parts of a sample and slots of each, and room for scores and for what the parts
    find."""
    batch, num_slots, slot_size = memory.shape
    padded, parts, span = split(batch, num_slots, slot_size, heads, memory.device, each=PROGRAMS)
    list_size = max(1, min(power_of_two(num_slots), LIST_NUMBERS // padded["RP"]))
    searched = {**padded, "K": reads, "LIST": list_size, "PIECE": piece_of_reads(slot_size, reads)}
    several = power_of_two(reads)
    touched = max(1, min(power_of_two(heads * (2 * reads + 1)), PIECE_NUMBERS // several))
    read = {**{name: x for name, x in searched.items() if name != "TILE"}, "KP": several, "TOUCHED": touched}
    integers = torch.int64 if memory.dtype == torch.float64 else torch.int32
    near_keys = memory.new_empty(batch, heads, parts, reads, dtype=integers)
    scores = memory.new_empty(batch, heads, num_slots, dtype=integers)
    return searched, read, parts, span, [scores, near_keys, torch.empty_like(near_keys, dtype=torch.int64)]


def piece_of_reads(slot_size: int, reads: int) -> int:
    """How many of the rows that a head reads a program holds at once."""
    return max(1, min(power_of_two(reads), PIECE_NUMBERS // power_of_two(slot_size), 64))


def sparse_read(
    memory: Tensor, key: Tensor, sharpness: Tensor | None, num_slots: int, num_reads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    memory, key, sharpness = contiguous(memory, key, sharpness)
    batch, heads, slot_size = key.shape
    of_search, of_read, parts, span, (scores, near_keys, near_slots) = _search(memory, heads, num_reads)
    read, weights = torch.empty_like(key), memory.new_empty(batch, heads, num_reads)
    slots = torch.empty_like(weights, dtype=torch.int64)
    rows = memory.new_empty(batch, heads, num_reads, slot_size)
    launch(
        _sparse_search_kernel, (batch, parts), memory, key, *[None] * 9, scores, near_keys, near_slots, 0, 1, batch, num_slots,
        span, parts, 0, EPS=eps, **of_search, STEP=False, GATED=False, LENGTHS=False, options=FORWARD,
    )  # fmt: skip
    launch(
        _sparse_read_kernel, (batch,), memory, sharpness, near_keys, near_slots, slots, weights, rows, read, *[None] * 8, 0, 1,
        batch, num_slots, parts, 0, **of_read, THRESHOLD=0.0, SHARP=sharpness is not None, KEEP=True, STEP=False, GATED=False,
        LENGTHS=False, options=FORWARD,
    )  # fmt: skip
    return read, slots, weights, rows


def sparse_scan(
    memory: Tensor,
    read_slots: Tensor,
    read_weights: Tensor,
    last_access: Tensor,
    clock: Tensor,
    keys: Tensor,
    write_vectors: Tensor,
    gate_logits: Tensor,
    sharpness: Tensor | None,
    write_gate_logits: Tensor | None,
    resets: Tensor | None,
    lengths: Tensor | None,
    start: Tensor | None,
    num_slots: int,
    threshold: float,
    eps: float,
    anchor_every: int,
) -> tuple[Tensor, ...]:
    """The state is changed where it comes out."""
    keys, vectors, gates, sharpness, gates_of_write = contiguous(
        keys, write_vectors, gate_logits, sharpness, write_gate_logits
    )
    resets, lengths, start = contiguous(resets, lengths, start)
    slots = read_slots.clamp(0, num_slots - 1).contiguous()
    memory, weights, last_access, clock = (
        x.clone(memory_format=torch.contiguous_format) for x in (memory, read_weights, last_access, clock)
    )
    (steps, batch, heads, slot_size), reads = keys.shape, slots.shape[2]
    kept = int(anchor_every > 0)
    of_search, of_read, parts, span, (scores, near_keys, near_slots) = _search(memory, heads, reads)
    old_times = last_access.new_empty(batch, parts, heads)
    old_slots = torch.empty_like(old_times)
    history = steps if kept else 1
    oldest = new_steps(memory, (history, batch, heads), lengths, torch.int64)
    slot_history = new_steps(memory, (history, batch, heads, reads), lengths, torch.int64)
    weight_history = new_steps(memory, (history, batch, heads, reads), lengths)
    rows = new_steps(memory, (steps, batch, heads, reads, slot_size) if kept else (0,), lengths)
    out = new_steps(keys, keys.shape, lengths)
    of_oldest = {name: x for name, x in of_search.items() if name not in ("RP", "PIECE")}
    gated, cut = gates_of_write is not None, lengths is not None
    for t in range(steps):
        launch(
            _sparse_oldest_kernel, (batch, parts), memory, slots, weights, last_access, clock, resets, lengths, start,
            old_times, old_slots, t, steps, batch, num_slots, span, parts, **of_oldest, RESETS=resets is not None, LENGTHS=cut,
            options=FORWARD,
        )  # fmt: skip
        launch(
            _sparse_search_kernel, (batch, parts), memory, keys, slots, weights, vectors, gates, gates_of_write, lengths,
            old_times, old_slots, oldest, scores, near_keys, near_slots, t, steps, batch, num_slots, span, parts, kept, EPS=eps,
            **of_search, STEP=True, GATED=gated, LENGTHS=cut, options=FORWARD,
        )  # fmt: skip
        launch(
            _sparse_read_kernel, (batch,), memory, sharpness, near_keys, near_slots, slot_history, weight_history, rows, out,
            slots, weights, last_access, clock, gates, gates_of_write, oldest, lengths, t, steps, batch, num_slots, parts, kept,
            **of_read, THRESHOLD=threshold, SHARP=sharpness is not None, KEEP=bool(kept), STEP=True, GATED=gated, LENGTHS=cut,
            options=FORWARD,
        )  # fmt: skip
    if not kept:
        oldest, slot_history, weight_history = oldest.new_empty(0), slots.new_empty(0), weights.new_empty(0)
    return out, memory, slots, weights, last_access, clock, oldest, slot_history, weight_history, rows


def sentence(op: str, num_slots: int, slot_size: int, heads: int) -> str:
    search = f"{pass_sentence(num_slots, slot_size, heads)}; then a program per sample"
    if op == "sparse_read":
        return f"a launch for {search} that reads; one launch backward, a program per sample"
    return (
        f"three launches a step: for the oldest slots, for the write and {search} that reads; one launch backward for all "
        "steps, a program per sample"
    )
