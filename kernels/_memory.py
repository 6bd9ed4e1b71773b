"""What the kernels share: loads and stores of a memory, dot products, similarity and softmax, and the way back through them.

Ops that go over a memory once take tiles of its slots for all heads together: blocks [heads, slots], [heads, width] and
[slots, width]. Scans hold a whole memory and take the heads one after the other: the memory [slots, width] and vectors
[width] are held in two pieces, m1 and m2, whose widths are powers of two (40 as 32 + 8), which pads less than one would; the
second piece may be padding in part. n are the slots, d1 and d2 the columns of the pieces; a slot is valid below N.
"""

from __future__ import annotations

import triton
import triton.language as tl

# ---- similarity, for one head or several -------------------------------------------------------------------------------


@triton.jit
def inverse_root(key_square, squares, EPS: tl.constexpr):
    return 1.0 / tl.sqrt(key_square * squares + EPS)


@triton.jit
def similarity_backward(scaled, dots, beta, q):
    """From the gradient of the similarity beta dots q, times q: those of the dot products, of beta per slot, and of the
    product of the squares under the root."""
    grad_dots = scaled * beta
    grad_beta = scaled * dots
    return grad_dots, grad_beta, grad_beta * (-0.5 * beta) * q * q


# ---- tiles -------------------------------------------------------------------------------------------------------------


@triton.jit
def load_rows(pointer, present: tl.constexpr, rows, columns, num_columns, mask, dtype: tl.constexpr):
    """[rows, columns] of a row-major array as dtype, 0 where masked; zeros where the array is absent."""
    if present:
        places = pointer + rows[:, None] * num_columns + columns[None, :]
        values = tl.load(places, mask=mask, other=0.0).to(dtype)
    else:
        values = tl.zeros([rows.shape[0], columns.shape[0]], dtype)
    return values


@triton.jit
def store_rows(pointer, values, rows, columns, num_columns, mask):
    values = values.to(pointer.dtype.element_ty)
    tl.store(pointer + rows[:, None] * num_columns + columns[None, :], values, mask=mask)


@triton.jit
def dot_rows(vectors, m):
    """[heads, slots]: the dot product of each head's vector with each row of a tile."""
    return tl.sum(vectors[:, None, :] * m[None, :, :], 2)


@triton.jit
def sum_slots(weights, m):
    """[heads, width]: the rows of a tile, weighted by each head.

    In this order, here and wherever such a sum stands: of `weights[:, :, None] * m[None, :, :]` with 16 heads and more Triton
    makes a matrix product in TF32, unasked, with errors of 5e-4 (scripts/triton_aot.py looks for any).
    """
    return tl.sum(m[None, :, :] * weights[:, :, None], 1)


@triton.jit
def sum_heads(weights, vectors):
    """[slots, width]: the heads' vectors, weighted at each slot."""
    return tl.sum(weights[:, :, None] * vectors[:, None, :], 0)


# ---- a whole memory in two pieces ----------------------------------------------------------------------------------------


@triton.jit
def load_memory(pointer, n, d1, d2, valid, D: tl.constexpr):
    """A memory [N, D], 0 beyond it."""
    m1 = tl.load(pointer + n[:, None] * D + d1[None, :], mask=valid[:, None], other=0.0)
    m2 = tl.load(pointer + n[:, None] * D + d2[None, :], mask=valid[:, None] & (d2[None, :] < D), other=0.0)
    return m1, m2


@triton.jit
def store_memory(pointer, m1, m2, n, d1, d2, valid, D: tl.constexpr):
    tl.store(pointer + n[:, None] * D + d1[None, :], m1, mask=valid[:, None])
    tl.store(pointer + n[:, None] * D + d2[None, :], m2, mask=valid[:, None] & (d2[None, :] < D))


@triton.jit
def load_vector(pointer, d1, d2, D: tl.constexpr, dtype: tl.constexpr):
    return tl.load(pointer + d1).to(dtype), tl.load(pointer + d2, mask=d2 < D, other=0.0).to(dtype)


@triton.jit
def store_vector(pointer, v1, v2, d1, d2, D: tl.constexpr):
    tl.store(pointer + d1, v1.to(pointer.dtype.element_ty))
    tl.store(pointer + d2, v2.to(pointer.dtype.element_ty), mask=d2 < D)


@triton.jit
def load_slots(pointer, row, n, valid, N: tl.constexpr):
    """What a head has per slot: a row of [heads, N], 0 beyond it."""
    return tl.load(pointer + row * N + n, mask=valid, other=0.0)


@triton.jit
def store_slots(pointer, row, x, n, valid, N: tl.constexpr):
    tl.store(pointer + row * N + n, x, mask=valid)


@triton.jit
def copy_slots(source, target, n, valid, HEADS: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr):
    """What all heads have per slot, from rows FROM apart to rows TO apart."""
    for h in range(0, HEADS):
        store_slots(target, h, load_slots(source, h, n, valid, FROM), n, valid, TO)


@triton.jit
def dot(v1, v2, m1, m2):
    """Per slot, the dot product of a vector with its row."""
    return tl.sum(v1[None, :] * m1, 1) + tl.sum(v2[None, :] * m2, 1)


@triton.jit
def row_squares(m1, m2):
    return tl.sum(m1 * m1, 1) + tl.sum(m2 * m2, 1)


@triton.jit
def read_slots(w, m1, m2):
    """The rows of a memory, weighted."""
    return tl.sum(w[:, None] * m1, 0), tl.sum(w[:, None] * m2, 0)


@triton.jit
def similarity(
    m1, m2, squares, keys, sharpness, h, d1, d2, D: tl.constexpr, SHARP: tl.constexpr, EPS: tl.constexpr
):
    """Head h's key and its square, sharpness, and per slot dot product and 1 / root."""
    k1, k2 = load_vector(keys + h * D, d1, d2, D, m1.dtype)
    key_square = tl.sum(k1 * k1, 0) + tl.sum(k2 * k2, 0)
    beta = key_square * 0.0 + 1.0
    if SHARP:
        beta = tl.load(sharpness + h).to(m1.dtype)
    return k1, k2, key_square, beta, dot(k1, k2, m1, m2), inverse_root(key_square, squares, EPS)


@triton.jit
def softmax(score, valid):
    score = tl.where(valid, score, float("-inf"))
    e = tl.exp(score - tl.max(score, 0))
    return e / tl.sum(e, 0)


@triton.jit
def softmax_backward(
    w, grad_w, m1, m2, squares, k1, k2, key_square, beta, dots, q, g1, g2, grad_squares, grad_keys, grad_sharpness, h,
    d1, d2, D: tl.constexpr, SHARP: tl.constexpr,
):  # fmt: skip
    """Back through head h's softmax w and its similarity: stores the gradients of key and sharpness, adds to g, that of the
    memory but for its squares, and to grad_squares."""
    scaled = w * (grad_w - tl.sum(w * grad_w, 0)) * q
    grad_dots, grad_beta, grad_norms = similarity_backward(scaled, dots, beta, q)
    if SHARP:
        tl.store(grad_sharpness + h, tl.sum(grad_beta, 0).to(grad_sharpness.dtype.element_ty))
    grad_squares += grad_norms * key_square
    twice = 2.0 * tl.sum(grad_norms * squares, 0)
    x1, x2 = read_slots(grad_dots, m1, m2)
    store_vector(grad_keys + h * D, x1 + twice * k1, x2 + twice * k2, d1, d2, D)
    g1 += grad_dots[:, None] * k1[None, :]
    g2 += grad_dots[:, None] * k2[None, :]
    return g1, g2, grad_squares


@triton.jit
def squares_backward(m1, m2, grad_squares, g1, g2):
    return g1 + 2.0 * grad_squares[:, None] * m1, g2 + 2.0 * grad_squares[:, None] * m2
