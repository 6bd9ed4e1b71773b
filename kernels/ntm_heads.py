"""What a head of the NTM does in a kernel, on a memory held whole (_memory.py), and the way back: addressing, read and write
(Graves et al. 2014, eqs. 2-9)."""

from __future__ import annotations

import triton
import triton.language as tl

from ._memory import (
    dot,
    load_slots,
    load_vector,
    read_slots,
    row_squares,
    similarity,
    softmax,
    softmax_backward,
    squares_backward,
    store_slots,
    store_vector,
)

# ---- addressing (eqs. 5-9) ---------------------------------------------------------------------------------------------


@triton.jit
def _power(x, exponent):
    """x ** exponent for x >= 0, exponent >= 0 and infinite too; NaN of NaN."""
    power = tl.where(x == 1, 1.0, tl.exp(exponent * tl.log(tl.where(x == 0, 1.0, x))))
    return tl.where(x == 0, tl.where(exponent == 0, 1.0, 0.0), power)


@triton.jit
def _round(n, by, N: tl.constexpr, MOVES: tl.constexpr):
    """Slots n + by, going round; by is from -MOVES // 2 to MOVES // 2, which may be more than N."""
    return (n + (by + (MOVES // 2 + N) // N * N)) % N


@triton.jit
def address(
    a1, a2, squares, keys, sharpness, gates, shifts, sharpening, before, ring, h, n, d1, d2, valid,
    N: tl.constexpr, D: tl.constexpr, MOVES: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Head h's weights on the memory a, and what backward goes through: key, its square, sharpness, dot products, 1 / root,
    content weights, gate, weights of the step before, shifted weights in the greatest, which comes last. The gated weights
    stay in ring [HEADS, N]."""
    k1, k2, key_square, beta, dots, q = similarity(a1, a2, squares, keys, sharpness, h, d1, d2, D, True, EPS)
    content = softmax(beta * dots * q, valid)
    gate = tl.load(gates + h).to(a1.dtype)
    previous = load_slots(before, h, n, valid, N)
    store_slots(ring, h, gate * content + (1.0 - gate) * previous, n, valid, N)
    tl.debug_barrier()
    shifted = tl.zeros_like(content)
    for j in range(0, MOVES):
        share = tl.load(shifts + h * MOVES + j).to(a1.dtype)
        at = _round(n, MOVES // 2 - j, N, MOVES)
        shifted += share * tl.load(ring + h * N + at, mask=valid, other=0.0)
    greatest = tl.max(tl.where(valid, shifted, 0.0), 0)
    # A GPU's division of a number by itself need not give 1, to the last bit, of which an infinite sharpening would leave 0.
    u = tl.where(valid, tl.where((shifted == greatest) & (shifted > 0), 1.0, shifted / greatest), 0.0)
    powers = _power(u, tl.load(sharpening + h).to(a1.dtype))
    powers = tl.where(valid, powers, 0.0)
    w = powers / tl.sum(powers, 0)
    return w, k1, k2, key_square, beta, dots, q, content, gate, previous, u, greatest


@triton.jit
def address_backward(
    a1, a2, g1, g2, keys, sharpness, gates, shifts, sharpening, before, grad_weights, grad_keys, grad_sharpness,
    grad_gates, grad_shifts, grad_sharpening, ring, grad_ring, first, last, n, d1, d2, valid,
    N: tl.constexpr, D: tl.constexpr, MOVES: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Back through the addressing of heads [first, last) on the memory a: adds to its gradient g and stores the heads' own;
    grad_weights becomes that of the weights of the step before."""
    squares = row_squares(a1, a2)
    grad_squares = tl.zeros_like(squares)
    for h in range(first, last):
        w, k1, k2, key_square, beta, dots, q, content, gate, previous, u, greatest = address(
            a1, a2, squares, keys, sharpness, gates, shifts, sharpening, before, ring, h, n, d1, d2, valid, N, D, MOVES, EPS
        )  # fmt: skip
        grad_w = load_slots(grad_weights, h, n, valid, N)
        # Sharpening: w = u^gamma over its sum, the inverse of which is the greatest weight, for there u is 1.
        gamma = tl.load(sharpening + h).to(a1.dtype)
        centred = tl.where(valid, grad_w - tl.sum(w * grad_w, 0), 0.0)
        of_gamma = tl.sum(w * centred * tl.log(tl.where(u > 0, u, 1.0)), 0)
        tl.store(grad_sharpening + h, of_gamma.to(grad_sharpening.dtype.element_ty))
        of_shifted = _power(u, gamma - 1.0) * centred * (gamma * tl.max(w, 0) / greatest)
        store_slots(grad_ring, h, of_shifted, n, valid, N)
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
        store_slots(grad_weights, h, of_gated * (1.0 - gate), n, valid, N)
        # Softmax and similarity.
        of_content = of_gated * gate
        g1, g2, grad_squares = softmax_backward(
            content, of_content, a1, a2, squares, k1, k2, key_square, beta, dots, q, g1, g2, grad_squares, grad_keys,
            grad_sharpness, h, d1, d2, D, True,
        )  # fmt: skip
    return squares_backward(a1, a2, grad_squares, g1, g2)


# ---- read and write (eqs. 2-4) -----------------------------------------------------------------------------------------


@triton.jit
def read_backward(
    a1, a2, g1, g2, weights, grad_weights, grad_reads, n, d1, d2, valid,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    for r in range(0, R):
        h1, h2 = load_vector(grad_reads + r * D, d1, d2, D, a1.dtype)
        w = load_slots(weights, r, n, valid, N)
        grad_w = load_slots(grad_weights, r, n, valid, N) + dot(h1, h2, a1, a2)
        tl.debug_barrier()  # another thread may store what this one has loaded
        store_slots(grad_weights, r, grad_w, n, valid, N)
        g1 += w[:, None] * h1[None, :]
        g2 += w[:, None] * h2[None, :]
    return g1, g2


@triton.jit
def erase_and_add(
    m1, m2, weights, erase, add, n, d1, d2, valid, N: tl.constexpr, D: tl.constexpr, W: tl.constexpr
):
    """The memory after a write with weights [W, N] (eqs. 3 and 4)."""
    kept1, kept2 = tl.zeros_like(m1) + 1.0, tl.zeros_like(m2) + 1.0
    added1, added2 = tl.zeros_like(m1), tl.zeros_like(m2)
    for w in range(0, W):
        weight = load_slots(weights, w, n, valid, N)[:, None]
        e1, e2 = load_vector(erase + w * D, d1, d2, D, m1.dtype)
        v1, v2 = load_vector(add + w * D, d1, d2, D, m1.dtype)
        kept1 *= 1.0 - weight * e1[None, :]
        kept2 *= 1.0 - weight * e2[None, :]
        added1 += weight * v1[None, :]
        added2 += weight * v2[None, :]
    return m1 * kept1 + added1, m2 * kept2 + added2


@triton.jit
def write_backward(
    b1, b2, g1, g2, weights, grad_weights, erase, add, grad_erase, grad_add, n, d1, d2, valid,
    N: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """From the gradient of the memory after the write to that of the memory b before it."""
    for w in range(0, W):
        others1, others2 = tl.zeros_like(g1) + 1.0, tl.zeros_like(g2) + 1.0
        for v in range(0, W):
            weight = tl.load(weights + v * N + n, mask=valid & (v != w), other=0.0)[:, None]
            e1, e2 = load_vector(erase + v * D, d1, d2, D, g1.dtype)
            others1 *= 1.0 - weight * e1[None, :]
            others2 *= 1.0 - weight * e2[None, :]
        erased1, erased2 = g1 * b1 * others1, g2 * b2 * others2
        weight = load_slots(weights, w, n, valid, N)
        x1, x2 = read_slots(weight, erased1, erased2)
        store_vector(grad_erase + w * D, -x1, -x2, d1, d2, D)
        x1, x2 = read_slots(weight, g1, g2)
        store_vector(grad_add + w * D, x1, x2, d1, d2, D)
        e1, e2 = load_vector(erase + w * D, d1, d2, D, g1.dtype)
        v1, v2 = load_vector(add + w * D, d1, d2, D, g1.dtype)
        grad_w = load_slots(grad_weights, w, n, valid, N)
        grad_w += dot(v1, v2, g1, g2) - dot(e1, e2, erased1, erased2)
        tl.debug_barrier()  # as in read_backward
        store_slots(grad_weights, w, grad_w, n, valid, N)
    kept1, kept2 = tl.zeros_like(g1) + 1.0, tl.zeros_like(g2) + 1.0
    for w in range(0, W):
        weight = load_slots(weights, w, n, valid, N)[:, None]
        e1, e2 = load_vector(erase + w * D, d1, d2, D, g1.dtype)
        kept1 *= 1.0 - weight * e1[None, :]
        kept2 *= 1.0 - weight * e2[None, :]
    return g1 * kept1, g2 * kept2
