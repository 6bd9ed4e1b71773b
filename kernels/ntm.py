"""ntm_scan in Triton (a step is a scan of one, an address a step without write heads).

One launch per direction: a program takes one sample through all steps and keeps its memory in registers, in two pieces as in
lrua.py. What a head has per slot goes through scratch rows where it is shifted, since a shift takes it from one thread to
another. An erase cannot be undone, so backward never divides: it replays the writes, whose weights are kept, from a memory
saved every so many steps, and goes back through the replayed memories. No GPU has run it yet: docs/triton.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import ntm_steps
from ._launch import BACKWARD, FORWARD, contiguous, launch
from ._sizes import fits_one_program
from .lrua import (
    _dot,
    _load_memory,
    _load_vector,
    _resident,
    _softmax,
    _store_memory,
    _store_vector,
)

RAW = ("ntm_scan", "ntm_scan_backward")


# ---- addressing (Graves et al. 2014, eqs. 5-9) -------------------------------------------------------------------------


@triton.jit
def _power(x, exponent):
    """x ** exponent for x >= 0, exponent >= 0; NaN of NaN."""
    power = tl.exp(exponent * tl.log(tl.where(x == 0, 1.0, x)))
    return tl.where(x == 0, tl.where(exponent == 0, 1.0, 0.0), power)


@triton.jit
def _round(n, by, N: tl.constexpr, MOVES: tl.constexpr):
    """Slots n + by, going round; by is from -MOVES // 2 to MOVES // 2, which may be more than N."""
    return (n + (by + (MOVES // 2 + N) // N * N)) % N


@triton.jit
def _address(
    a1, a2, squares, keys, sharpness, gates, shifts, sharpening, before, ring, h, n, d1, d2, valid,
    N: tl.constexpr, D: tl.constexpr, MOVES: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Head h's weights on the memory a, and what backward goes through: key, its square, sharpness, dot products, 1 / root,
    content weights, gate, weights of the step before, shifted weights in the greatest, which comes last. The gated weights
    stay in ring [H, N]."""
    k1, k2 = _load_vector(keys + h * D, d1, d2, D, a1.dtype)
    key_square = tl.sum(k1 * k1, 0) + tl.sum(k2 * k2, 0)
    beta = tl.load(sharpness + h).to(a1.dtype)
    dots = _dot(k1, k2, a1, a2)
    q = 1.0 / tl.sqrt(key_square * squares + EPS)
    content = _softmax(beta * dots * q, valid)
    gate = tl.load(gates + h).to(a1.dtype)
    previous = tl.load(before + h * N + n, mask=valid, other=0.0)
    tl.store(ring + h * N + n, gate * content + (1.0 - gate) * previous, mask=valid)
    tl.debug_barrier()
    shifted = tl.zeros_like(content)
    for j in range(0, MOVES):
        share = tl.load(shifts + h * MOVES + j).to(a1.dtype)
        at = _round(n, MOVES // 2 - j, N, MOVES)
        shifted += share * tl.load(ring + h * N + at, mask=valid, other=0.0)
    greatest = tl.max(tl.where(valid, shifted, 0.0), 0)
    u = tl.where(valid, shifted / greatest, 0.0)
    powers = _power(u, tl.load(sharpening + h).to(a1.dtype))
    powers = tl.where(valid, powers, 0.0)
    w = powers / tl.sum(powers, 0)
    return w, k1, k2, key_square, beta, dots, q, content, gate, previous, u, greatest


@triton.jit
def _erase_and_add(
    m1, m2, weights, erase, add, n, d1, d2, valid, N: tl.constexpr, D: tl.constexpr, W: tl.constexpr
):
    """The memory after a write with weights [W, N] (eqs. 3 and 4)."""
    kept1, kept2 = tl.zeros_like(m1) + 1.0, tl.zeros_like(m2) + 1.0
    added1, added2 = tl.zeros_like(m1), tl.zeros_like(m2)
    for w in range(0, W):
        weight = tl.load(weights + w * N + n, mask=valid, other=0.0)[:, None]
        e1, e2 = _load_vector(erase + w * D, d1, d2, D, m1.dtype)
        v1, v2 = _load_vector(add + w * D, d1, d2, D, m1.dtype)
        kept1 *= 1.0 - weight * e1[None, :]
        kept2 *= 1.0 - weight * e2[None, :]
        added1 += weight * v1[None, :]
        added2 += weight * v2[None, :]
    return m1 * kept1 + added1, m2 * kept2 + added2


# ---- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _address_heads(
    a1, a2, keys, sharpness, gates, shifts, sharpening, before, now, ring, first, last, n, d1, d2, valid,
    N: tl.constexpr, D: tl.constexpr, MOVES: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """The weights of heads [first, last) into rows of now."""
    squares = tl.sum(a1 * a1, 1) + tl.sum(a2 * a2, 1)
    for h in range(first, last):
        w, _, _, _, _, _, _, _, _, _, _, _ = _address(
            a1, a2, squares, keys, sharpness, gates, shifts, sharpening, before, ring, h, n, d1, d2, valid, N, D, MOVES, EPS
        )  # fmt: skip
        tl.store(now + h * N + n, w, mask=valid)


@triton.jit(do_not_specialize=["T", "B", "every"])
def _ntm_scan_kernel(
    memory, weights, keys, sharpness, gates, shifts, sharpening, erase, add, reads, out_memory, out_weights, history,
    anchors, scratch, T, B, every,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, NP: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    LD: tl.constexpr, W: tl.constexpr, MOVES: tl.constexpr, READ_FIRST: tl.constexpr, EPS: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Scratch: weights [2, H, N], this step's and those of the step before in turn, and gated weights [H, N]."""
    H: tl.constexpr = R + W
    b = tl.program_id(0).to(tl.int64)
    n, d1, d2 = tl.arange(0, NP), tl.arange(0, P1), P1 + tl.arange(0, P2)
    valid = n < N
    scratch += b * 3 * H * N
    ring = scratch + 2 * H * N
    m1, m2 = _load_memory(memory + b * N * D, n, d1, d2, valid, D)
    for h in range(0, H):
        w = tl.load(weights + (b * H + h) * N + n, mask=valid, other=0.0)
        tl.store(scratch + h * N + n, w, mask=valid)
    tl.debug_barrier()
    for t in range(0, T):
        row = t * B + b
        before, now = scratch + (t % 2) * H * N, scratch + ((t + 1) % 2) * H * N
        if KEEP:
            if (t > 0) & (t % every == 0):
                _store_memory(anchors + ((t // every - 1) * B + b) * D * LD, m1, m2, n, d1, d2, valid, D)
        _address_heads(
            m1, m2, keys + row * H * D, sharpness + row * H, gates + row * H, shifts + row * H * MOVES,
            sharpening + row * H, before, now, ring, R, H, n, d1, d2, valid, N, D, MOVES, EPS,
        )  # fmt: skip
        tl.debug_barrier()
        a1, a2 = m1, m2
        m1, m2 = _erase_and_add(
            m1, m2, now + R * N, erase + row * W * D, add + row * W * D, n, d1, d2, valid, N, D, W
        )
        if not READ_FIRST:
            a1, a2 = m1, m2
        _address_heads(
            a1, a2, keys + row * H * D, sharpness + row * H, gates + row * H, shifts + row * H * MOVES,
            sharpening + row * H, before, now, ring, 0, R, n, d1, d2, valid, N, D, MOVES, EPS,
        )  # fmt: skip
        tl.debug_barrier()
        for h in range(0, H):
            w = tl.load(now + h * N + n, mask=valid, other=0.0)
            if h < R:
                r1, r2 = tl.sum(w[:, None] * a1, 0), tl.sum(w[:, None] * a2, 0)
                _store_vector(reads + (row * R + h) * D, r1, r2, d1, d2, D)
            if KEEP:
                tl.store(history + (row * H + h) * N + n, w, mask=valid)
        tl.debug_barrier()
    _store_memory(out_memory + b * N * D, m1, m2, n, d1, d2, valid, D)
    for h in range(0, H):
        w = tl.load(scratch + ((T % 2) * H + h) * N + n, mask=valid, other=0.0)
        tl.store(out_weights + (b * H + h) * N + n, w, mask=valid)


# ---- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def _address_backward(
    a1, a2, g1, g2, keys, sharpness, gates, shifts, sharpening, before, grad_weights, grad_keys, grad_sharpness,
    grad_gates, grad_shifts, grad_sharpening, ring, grad_ring, first, last, n, d1, d2, valid,
    N: tl.constexpr, D: tl.constexpr, MOVES: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Back through the addressing of heads [first, last) on the memory a: adds to its gradient g and stores the heads' own;
    grad_weights becomes that of the weights of the step before."""
    squares = tl.sum(a1 * a1, 1) + tl.sum(a2 * a2, 1)
    grad_squares = tl.zeros_like(squares)
    for h in range(first, last):
        w, k1, k2, key_square, beta, dots, q, content, gate, previous, u, greatest = _address(
            a1, a2, squares, keys, sharpness, gates, shifts, sharpening, before, ring, h, n, d1, d2, valid, N, D, MOVES, EPS
        )  # fmt: skip
        grad_w = tl.load(grad_weights + h * N + n, mask=valid, other=0.0)
        # Sharpening: w = u^gamma over its sum, the inverse of which is the greatest weight, for there u is 1.
        gamma = tl.load(sharpening + h).to(a1.dtype)
        centred = tl.where(valid, grad_w - tl.sum(w * grad_w, 0), 0.0)
        of_gamma = tl.sum(w * centred * tl.log(tl.where(u > 0, u, 1.0)), 0)
        tl.store(grad_sharpening + h, of_gamma.to(grad_sharpening.dtype.element_ty))
        of_shifted = _power(u, gamma - 1.0) * centred * (gamma * tl.max(w, 0) / greatest)
        tl.store(grad_ring + h * N + n, of_shifted, mask=valid)
        tl.debug_barrier()
        # Shift.
        of_gated = tl.zeros_like(content)
        for j in range(0, MOVES):
            came = tl.load(ring + h * N + _round(n, MOVES // 2 - j, N, MOVES), mask=valid, other=0.0)
            of_share = tl.sum(of_shifted * came, 0)
            tl.store(grad_shifts + h * MOVES + j, of_share.to(grad_shifts.dtype.element_ty))
            share = tl.load(shifts + h * MOVES + j).to(a1.dtype)
            at = _round(n, j - MOVES // 2, N, MOVES)
            of_gated += share * tl.load(grad_ring + h * N + at, mask=valid, other=0.0)
        # Interpolation.
        of_gate = tl.sum(of_gated * (content - previous), 0)
        tl.store(grad_gates + h, of_gate.to(grad_gates.dtype.element_ty))
        tl.store(grad_weights + h * N + n, of_gated * (1.0 - gate), mask=valid)
        # Softmax and similarity.
        of_content = of_gated * gate
        scaled = content * (of_content - tl.sum(content * of_content, 0)) * q
        grad_dots, grad_cosine = scaled * beta, scaled * dots
        tl.store(grad_sharpness + h, tl.sum(grad_cosine, 0).to(grad_sharpness.dtype.element_ty))
        grad_norms = grad_cosine * (-0.5 * beta) * q * q
        grad_squares += grad_norms * key_square
        twice = 2.0 * tl.sum(grad_norms * squares, 0)
        x1 = tl.sum(grad_dots[:, None] * a1, 0) + twice * k1
        x2 = tl.sum(grad_dots[:, None] * a2, 0) + twice * k2
        _store_vector(grad_keys + h * D, x1, x2, d1, d2, D)
        g1 += grad_dots[:, None] * k1[None, :]
        g2 += grad_dots[:, None] * k2[None, :]
    g1 += 2.0 * grad_squares[:, None] * a1
    g2 += 2.0 * grad_squares[:, None] * a2
    return g1, g2


@triton.jit
def _read_backward(
    a1, a2, g1, g2, weights, grad_weights, grad_reads, n, d1, d2, valid,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    for r in range(0, R):
        h1, h2 = _load_vector(grad_reads + r * D, d1, d2, D, a1.dtype)
        w = tl.load(weights + r * N + n, mask=valid, other=0.0)
        grad_w = tl.load(grad_weights + r * N + n, mask=valid, other=0.0) + _dot(h1, h2, a1, a2)
        tl.debug_barrier()  # another thread may store what this one has loaded
        tl.store(grad_weights + r * N + n, grad_w, mask=valid)
        g1 += w[:, None] * h1[None, :]
        g2 += w[:, None] * h2[None, :]
    return g1, g2


@triton.jit
def _write_backward(
    b1, b2, g1, g2, weights, grad_weights, erase, add, grad_erase, grad_add, n, d1, d2, valid,
    N: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """From the gradient of the memory after the write to that of the memory b before it."""
    for w in range(0, W):
        others1, others2 = tl.zeros_like(g1) + 1.0, tl.zeros_like(g2) + 1.0
        for v in range(0, W):
            weight = tl.load(weights + v * N + n, mask=valid & (v != w), other=0.0)[:, None]
            e1, e2 = _load_vector(erase + v * D, d1, d2, D, g1.dtype)
            others1 *= 1.0 - weight * e1[None, :]
            others2 *= 1.0 - weight * e2[None, :]
        erased1, erased2 = g1 * b1 * others1, g2 * b2 * others2
        weight = tl.load(weights + w * N + n, mask=valid, other=0.0)
        x1, x2 = -tl.sum(erased1 * weight[:, None], 0), -tl.sum(erased2 * weight[:, None], 0)
        _store_vector(grad_erase + w * D, x1, x2, d1, d2, D)
        _store_vector(grad_add + w * D, tl.sum(g1 * weight[:, None], 0), tl.sum(g2 * weight[:, None], 0), d1, d2, D)
        e1, e2 = _load_vector(erase + w * D, d1, d2, D, g1.dtype)
        v1, v2 = _load_vector(add + w * D, d1, d2, D, g1.dtype)
        grad_w = tl.load(grad_weights + w * N + n, mask=valid, other=0.0)
        grad_w += _dot(v1, v2, g1, g2) - _dot(e1, e2, erased1, erased2)
        tl.debug_barrier()  # as in _read_backward
        tl.store(grad_weights + w * N + n, grad_w, mask=valid)
    kept1, kept2 = tl.zeros_like(g1) + 1.0, tl.zeros_like(g2) + 1.0
    for w in range(0, W):
        weight = tl.load(weights + w * N + n, mask=valid, other=0.0)[:, None]
        e1, e2 = _load_vector(erase + w * D, d1, d2, D, g1.dtype)
        kept1 *= 1.0 - weight * e1[None, :]
        kept2 *= 1.0 - weight * e2[None, :]
    return g1 * kept1, g2 * kept2


@triton.jit(do_not_specialize=["T", "B", "every"])
def _ntm_scan_backward_kernel(
    grad_reads, grad_out_memory, grad_out_weights, memory, weights, keys, sharpness, gates, shifts, sharpening, erase, add,
    history, anchors, grad_memory, grad_weights, grad_keys, grad_sharpness, grad_gates, grad_shifts, grad_sharpening,
    grad_erase, grad_add, memories, scratch, T, B, every,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, NP: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    LD: tl.constexpr, W: tl.constexpr, MOVES: tl.constexpr, READ_FIRST: tl.constexpr, EPS: tl.constexpr,
    OF_READS: tl.constexpr, OF_MEMORY: tl.constexpr, OF_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """From the last anchor forward again, memories [every, N, D] of the steps side by side; then back through these steps; then
    the anchor before. Scratch: gated weights and their gradients, [2, H, N]. grad_weights [H, N] is until the end that of the
    weights that a step comes out with."""
    H: tl.constexpr = R + W
    b = tl.program_id(0).to(tl.int64)
    n, d1, d2 = tl.arange(0, NP), tl.arange(0, P1), P1 + tl.arange(0, P2)
    valid = n < N
    dtype = memory.dtype.element_ty
    memories += b * every * N * D
    ring = scratch + b * 2 * H * N
    grad_ring = ring + H * N
    grad_weights += b * H * N
    g1, g2 = tl.zeros([NP, P1], dtype), tl.zeros([NP, P2], dtype)
    if OF_MEMORY:
        g1, g2 = _load_memory(grad_out_memory + b * N * D, n, d1, d2, valid, D)
    for h in range(0, H):
        g = tl.zeros([NP], dtype)
        if OF_WEIGHTS:
            g = tl.load(grad_out_weights + (b * H + h) * N + n, mask=valid, other=0.0)
        tl.store(grad_weights + h * N + n, g, mask=valid)
    segments = (T + every - 1) // every
    for i in range(0, segments):
        first = (segments - 1 - i) * every
        steps = tl.minimum(every, T - first)
        tl.debug_barrier()
        if first == 0:
            m1, m2 = _load_memory(memory + b * N * D, n, d1, d2, valid, D)
        else:
            m1, m2 = _load_memory(anchors + ((first // every - 1) * B + b) * D * LD, n, d1, d2, valid, D)
        for s in range(0, steps):
            row = (first + s) * B + b
            _store_memory(memories + s * N * D, m1, m2, n, d1, d2, valid, D)
            m1, m2 = _erase_and_add(
                m1, m2, history + (row * H + R) * N, erase + row * W * D, add + row * W * D, n, d1, d2, valid, N, D, W
            )
        tl.debug_barrier()
        for j in range(0, steps):
            s = steps - 1 - j
            t = first + s
            row = t * B + b
            before = weights + b * H * N
            if t > 0:
                before = history + (row - B) * H * N
            now = history + row * H * N
            b1, b2 = _load_memory(memories + s * N * D, n, d1, d2, valid, D)
            if not READ_FIRST:  # the read heads saw the memory after the write
                if OF_READS:
                    g1, g2 = _read_backward(
                        m1, m2, g1, g2, now, grad_weights, grad_reads + row * R * D, n, d1, d2, valid, N, D, R
                    )
                    tl.debug_barrier()
                g1, g2 = _address_backward(
                    m1, m2, g1, g2, keys + row * H * D, sharpness + row * H, gates + row * H, shifts + row * H * MOVES,
                    sharpening + row * H, before, grad_weights, grad_keys + row * H * D, grad_sharpness + row * H,
                    grad_gates + row * H, grad_shifts + row * H * MOVES, grad_sharpening + row * H, ring, grad_ring, 0, R,
                    n, d1, d2, valid, N, D, MOVES, EPS,
                )  # fmt: skip
            g1, g2 = _write_backward(
                b1, b2, g1, g2, now + R * N, grad_weights + R * N, erase + row * W * D, add + row * W * D,
                grad_erase + row * W * D, grad_add + row * W * D, n, d1, d2, valid, N, D, W,
            )  # fmt: skip
            if READ_FIRST:
                if OF_READS:
                    g1, g2 = _read_backward(
                        b1, b2, g1, g2, now, grad_weights, grad_reads + row * R * D, n, d1, d2, valid, N, D, R
                    )
            tl.debug_barrier()
            g1, g2 = _address_backward(
                b1, b2, g1, g2, keys + row * H * D, sharpness + row * H, gates + row * H, shifts + row * H * MOVES,
                sharpening + row * H, before, grad_weights, grad_keys + row * H * D, grad_sharpness + row * H,
                grad_gates + row * H, grad_shifts + row * H * MOVES, grad_sharpening + row * H, ring, grad_ring,
                0 if READ_FIRST else R, H, n, d1, d2, valid, N, D, MOVES, EPS,
            )  # fmt: skip
            tl.debug_barrier()
            m1, m2 = b1, b2
    _store_memory(grad_memory + b * N * D, g1, g2, n, d1, d2, valid, D)


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
    read_first: bool,
    eps: float,
    anchor_every: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (memory, weights, keys, sharpness, gates, shift, sharpening, erase, add)
    memory, weights, keys, *rest = contiguous(*inputs)
    (steps, batch, heads, slot_size), num_slots, writes = keys.shape, memory.shape[1], erase.shape[2]
    keeps = anchor_every > 0
    history = memory.new_empty((steps, *weights.shape) if keeps else (0,))
    # Beyond N D numbers an anchor is padding that nobody reads; 0, so that equal calls give equal results.
    new = memory.new_empty if num_slots % 16 == 0 else memory.new_zeros
    padded = (num_slots + 15) // 16 * 16
    anchors = new((max(steps - 1, 0) // anchor_every, batch, slot_size, padded) if keeps else (0,))
    reads = keys.new_empty(steps, batch, heads - writes, slot_size)
    if not fits_one_program(num_slots, slot_size):
        inputs = (keys, *rest)
        end = ntm_steps.scan(memory, weights, inputs, reads, history, anchors, read_first, eps, anchor_every)
        return reads, *end, history, anchors
    out_memory, out_weights = torch.empty_like(memory), torch.empty_like(weights)
    scratch = weights.new_empty(batch, 3, heads, num_slots)
    launch(
        _ntm_scan_kernel, (batch,), memory, weights, keys, *rest, reads, out_memory, out_weights, history, anchors, scratch,
        steps, batch, anchor_every, **_resident("ntm_scan", memory.device, num_slots, slot_size, heads - writes), W=writes,
        MOVES=shift.shape[3], READ_FIRST=read_first, EPS=eps, KEEP=keeps, options=FORWARD,
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
    history: Tensor,
    anchors: Tensor,
    read_first: bool,
    eps: float,
    anchor_every: int,
) -> tuple[Tensor, ...]:
    given = contiguous(grad_reads, grad_memory, grad_weights)
    inputs = contiguous(memory, weights, keys, sharpness, gates, shift, sharpening, erase, add)
    history, anchors = contiguous(history, anchors)
    (steps, batch, heads, slot_size), num_slots, writes = keys.shape, memory.shape[1], erase.shape[2]
    grads = [torch.empty_like(x) for x in inputs]
    every = max(min(anchor_every, steps), 1)
    if not fits_one_program(num_slots, slot_size):
        memory, weights, *rest = inputs
        options = (history, anchors, read_first, eps, every, grads[2:])
        return *ntm_steps.scan_backward(given, memory, weights, rest, *options), *grads[2:]
    memories = memory.new_empty(batch, every, num_slots, slot_size)
    scratch = weights.new_empty(batch, 2, heads, num_slots)
    launch(
        _ntm_scan_backward_kernel, (batch,), *given, *inputs, history, anchors, *grads, memories, scratch, steps,
        batch, every, **_resident("ntm_scan_backward", memory.device, num_slots, slot_size, heads - writes), W=writes,
        MOVES=shift.shape[3], READ_FIRST=read_first, EPS=eps, OF_READS=grad_reads is not None,
        OF_MEMORY=grad_memory is not None, OF_WEIGHTS=grad_weights is not None, options=BACKWARD,
    )  # fmt: skip
    return tuple(grads)
