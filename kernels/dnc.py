"""dnc_scan in Triton (a step is a scan of one).

One launch per direction: a program takes one sample through all steps. Its memory stays in registers (_memory.py). Its links
lie in global memory, and a step goes over them once, some rows at a time, for all heads together: update, both directions, and
in backward all that flows back through them. The order of allocation is by counting: a slot's place is the number of slots
before it. Backward keeps no memory and no links. It runs forward twice, without addressing, since weights and orders are kept:
once for the states every so many steps, then, from the last of them to the first, for those between, and back through these
steps. Where a memory is too large for one program, a scan is a loop of steps: dnc_steps.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.dnc import LINK_FLOOR as _LINK_FLOOR
from . import dnc_steps
from ._launch import BACKWARD, FORWARD, contiguous, launch, new_gradient_of_start, new_steps
from ._memory import (
    copy_slots,
    dot,
    inverse_root,
    load_memory,
    load_slots,
    load_vector,
    read_slots,
    row_squares,
    similarity_backward,
    softmax,
    store_memory,
    store_slots,
    store_vector,
)
from ._sequences import steps_of
from ._sizes import RESIDENT_NUMBERS, fits_one_program, held_numbers, power_of_two, resident, scan_sentence

RAW = ("dnc_scan", "dnc_scan_backward")
LINK_FLOOR = tl.constexpr(_LINK_FLOOR)
LINKS_PER_THREAD = 16  # numbers of a block [heads, rows, N] in registers


# ---- content -----------------------------------------------------------------------------------------------------------


@triton.jit
def _by_content(
    m1, m2, squares, keys, masks, sharpness, h, d1, d2, valid, D: tl.constexpr, MASKED: tl.constexpr, EPS: tl.constexpr
):  # fmt: skip
    """Head h's weights on the memory m, whose squares are those without masks, and what backward goes through: key times mask,
    squares of slots and key as they are compared, sharpness, dot products, 1 / root. A masked memory is never made."""
    k1, k2 = load_vector(keys + h * D, d1, d2, D, m1.dtype)
    if MASKED:
        q1, q2 = load_vector(masks + h * D, d1, d2, D, m1.dtype)
        k1, k2 = k1 * q1, k2 * q2
        squares = dot(q1 * q1, q2 * q2, m1 * m1, m2 * m2)
        dots = dot(k1 * q1, k2 * q2, m1, m2)
    else:
        dots = dot(k1, k2, m1, m2)
    key_square = tl.sum(k1 * k1, 0) + tl.sum(k2 * k2, 0)
    beta = tl.load(sharpness + h).to(m1.dtype)
    root = inverse_root(key_square, squares, EPS)
    return softmax(beta * dots * root, valid), k1, k2, squares, key_square, beta, dots, root


@triton.jit
def _by_content_backward(
    m1, m2, g1, g2, grad_w, w, k1, k2, squares, key_square, beta, dots, root, keys, masks, grad_keys, grad_masks,
    grad_sharpness, h, d1, d2, D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """From the gradient of head h's weights w, with what _by_content gave: stores the gradients of key, mask and sharpness, and
    adds to g, that of the memory m."""
    scaled = w * (grad_w - tl.sum(w * grad_w, 0)) * root
    grad_dots, grad_beta, grad_norms = similarity_backward(scaled, dots, beta, root)
    tl.store(grad_sharpness + h, tl.sum(grad_beta, 0).to(grad_sharpness.dtype.element_ty))
    twice = 2.0 * tl.sum(grad_norms * squares, 0)
    of_squares = 2.0 * grad_norms * key_square
    x1, x2 = read_slots(grad_dots, m1, m2)
    if MASKED:
        q1, q2 = load_vector(masks + h * D, d1, d2, D, m1.dtype)
        s1, s2 = read_slots(of_squares, m1 * m1, m2 * m2)
        of_mask1, of_mask2 = x1 * k1 + s1 * q1, x2 * k2 + s2 * q2  # by the slots; then by the key
        x1, x2 = x1 * q1 + twice * k1, x2 * q2 + twice * k2
        r1, r2 = load_vector(keys + h * D, d1, d2, D, m1.dtype)
        store_vector(grad_masks + h * D, of_mask1 + x1 * r1, of_mask2 + x2 * r2, d1, d2, D)
        x1, x2 = x1 * q1, x2 * q2
        g1 += grad_dots[:, None] * (k1 * q1)[None, :] + of_squares[:, None] * (q1 * q1)[None, :] * m1
        g2 += grad_dots[:, None] * (k2 * q2)[None, :] + of_squares[:, None] * (q2 * q2)[None, :] * m2
    else:
        x1, x2 = x1 + twice * k1, x2 + twice * k2
        g1 += grad_dots[:, None] * k1[None, :] + of_squares[:, None] * m1
        g2 += grad_dots[:, None] * k2[None, :] + of_squares[:, None] * m2
    store_vector(grad_keys + h * D, x1, x2, d1, d2, D)
    return g1, g2


# ---- usage and allocation ----------------------------------------------------------------------------------------------


@triton.jit
def _retention(free, before, n, valid, like, N: tl.constexpr, R: tl.constexpr):
    """How much each slot keeps of what the heads read last, with weights before [R, N]."""
    retained = tl.zeros_like(like) + 1.0
    for r in range(0, R):
        retained *= 1.0 - tl.load(free + r).to(like.dtype) * load_slots(before, r, n, valid, N)
    return retained


@triton.jit
def _places(usage, u, n, N: tl.constexpr, NP: tl.constexpr, ROWS: tl.constexpr):
    """Per slot the number of slots before it in the order of allocation: by usage, then by slot, NaN last. usage [N] are the
    numbers u once more, in global memory."""
    places = tl.zeros([NP], tl.int32)
    for first in range(0, N, ROWS):
        i = first + tl.arange(0, ROWS)
        v = tl.load(usage + i, mask=i < N, other=0.0)
        vi, uj, lower = v[:, None], u[None, :], i[:, None] < n[None, :]
        nan_i, nan_j = vi != vi, uj != uj
        earlier = (vi < uj) | ((vi == uj) & lower) | (nan_j & ((vi == vi) | (nan_i & lower)))
        places += tl.sum(tl.where(earlier & (i[:, None] < N), 1, 0), 0)
    return places


# ---- links -------------------------------------------------------------------------------------------------------------


@triton.jit
def _heads_by_slots(pointer, heads, slots, R: tl.constexpr, N: tl.constexpr):
    """A block of rows [R, N], 0 beyond them."""
    mask = (heads[:, None] < R) & (slots[None, :] < N)
    return tl.load(pointer + heads[:, None] * N + slots[None, :], mask=mask, other=0.0)


@triton.jit
def _copy_links(source, target, n, N: tl.constexpr, ROWS: tl.constexpr):
    for first in range(0, N, ROWS):
        i = first + tl.arange(0, ROWS)
        at, mask = i[:, None] * N + n[None, :], (i[:, None] < N) & (n[None, :] < N)
        tl.store(target + at, tl.load(source + at, mask=mask, other=0.0), mask=mask)


@triton.jit
def _clear_links(links, n, N: tl.constexpr, ROWS: tl.constexpr):
    for first in range(0, N, ROWS):
        i = first + tl.arange(0, ROWS)
        at, mask = i[:, None] * N + n[None, :], (i[:, None] < N) & (n[None, :] < N)
        tl.store(links + at, tl.zeros(at.shape, links.dtype.element_ty), mask=mask)


@triton.jit
def _linked(links, weights, w, p, i, n, N: tl.constexpr):
    """Rows i of the links before a step, then of those after it, whose write weights are w, [N] in global memory once more, and
    whose precedence was p; and where there is a link at all."""
    at = i[:, None] * N + n[None, :]
    there = (i[:, None] < N) & (n[None, :] < N)
    old = tl.load(links + at, mask=there, other=0.0)
    wi = tl.load(weights + i, mask=i < N, other=0.0)
    linked = there & (i[:, None] != n[None, :])
    kept = 1.0 - wi[:, None] - w[None, :]
    return old, tl.where(linked, kept * old + wi[:, None] * p[None, :], 0.0), wi, kept, linked, at, there


@triton.jit
def _link(
    source, target, weights, w, p, before, rows, n,
    N: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The links after a step into target, which may be source; the directions of all heads from their weights before [R, N]
    into rows [2, R, N], backward and forward."""
    heads = tl.arange(0, RP)
    wj = _heads_by_slots(before, heads, n, R, N)
    backward = tl.zeros_like(wj)
    for first in range(0, N, ROWS):
        i = first + tl.arange(0, ROWS)
        _, new, _, _, _, at, there = _linked(source, weights, w, p, i, n, N)
        tl.debug_barrier()  # another thread may store what this one has loaded
        tl.store(target + at, new, mask=there)
        wi = _heads_by_slots(before, heads, i, R, N)
        backward += tl.sum(new[None, :, :] * wi[:, :, None], 1)
        forward = tl.sum(wj[:, None, :] * new[None, :, :], 2)
        mask = (heads[:, None] < R) & (i[None, :] < N)
        tl.store(rows + (R + heads[:, None]) * N + i[None, :], forward, mask=mask)
    tl.store(rows + heads[:, None] * N + n[None, :], backward, mask=(heads[:, None] < R) & (n[None, :] < N))


@triton.jit
def _relink(source, target, weights, w, p, n, N: tl.constexpr, ROWS: tl.constexpr):
    """The links after a step, of those before it."""
    for first in range(0, N, ROWS):
        _, new, _, _, _, at, there = _linked(source, weights, w, p, first + tl.arange(0, ROWS), n, N)
        tl.store(target + at, new, mask=there)


@triton.jit
def _link_backward(
    links, grad_links, weights, w, p, before, modes, of_backward, of_forward, to_backward, to_forward, of_rows, n,
    N: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr, SHARPENED: tl.constexpr,
):  # fmt: skip
    """Back through _link. of_backward and of_forward [R, N] are the gradients of the directions, without SHARPENED still to be
    multiplied with the modes. to_backward and to_forward become the links times them, by which a head's weights before the step
    enter: dot products with those are the gradients of the modes. Those of the write weights: of_rows [N] in global memory, and
    what is returned first; then that of the precedence. grad_links becomes that of the links before the step."""
    heads = tl.arange(0, RP)
    mask = (heads[:, None] < R) & (n[None, :] < N)
    wj, xj = _heads_by_slots(before, heads, n, R, N), _heads_by_slots(of_backward, heads, n, R, N)
    share_b, share_f = tl.zeros([RP], w.dtype) + 1.0, tl.zeros([RP], w.dtype) + 1.0
    if not SHARPENED:
        share_b = tl.load(modes + heads * 3, mask=heads < R, other=0.0).to(w.dtype)
        share_f = tl.load(modes + heads * 3 + 2, mask=heads < R, other=0.0).to(w.dtype)
    forward = tl.zeros_like(wj)
    grad_w, grad_p = tl.zeros_like(w), tl.zeros_like(w)
    for first in range(0, N, ROWS):
        i = first + tl.arange(0, ROWS)
        old, new, wi, kept, linked, at, there = _linked(links, weights, w, p, i, n, N)
        grad = tl.load(grad_links + at, mask=there, other=0.0)
        xi = _heads_by_slots(of_forward, heads, i, R, N)
        read_i = _heads_by_slots(before, heads, i, R, N) * share_b[:, None]
        grad += tl.sum(read_i[:, :, None] * xj[:, None, :], 0)
        grad += tl.sum((xi * share_f[:, None])[:, :, None] * wj[:, None, :], 0)
        grad = tl.where(linked, grad, 0.0)
        forward += tl.sum(new[None, :, :] * xi[:, :, None], 1)
        backward = tl.sum(xj[:, None, :] * new[None, :, :], 2)
        mask_i = (heads[:, None] < R) & (i[None, :] < N)
        tl.store(to_backward + heads[:, None] * N + i[None, :], backward, mask=mask_i)
        through = grad * old
        tl.store(of_rows + i, tl.sum(grad * p[None, :] - through, 1), mask=i < N)
        grad_w -= tl.sum(through, 0)
        grad_p += tl.sum(wi[:, None] * grad, 0)
        tl.debug_barrier()  # as in _link
        tl.store(grad_links + at, kept * grad, mask=there)
    tl.store(to_forward + heads[:, None] * N + n[None, :], forward, mask=mask)
    return grad_w, grad_p


@triton.jit
def _sharpened(direction, exponent, valid):
    """A direction to the power, in shares; and its logarithms below the greatest."""
    logs = tl.where(valid, tl.log(direction + LINK_FLOOR), float("-inf"))
    logs = logs - tl.max(logs, 0)
    powers = tl.where(valid, tl.exp(exponent * logs), 0.0)
    return powers / tl.sum(powers, 0), tl.where(valid, logs, 0.0)


@triton.jit
def _sharpened_backward(grad, mode, direction, exponent, grad_mode, grad_exponent, valid):
    """From the gradient of the read weights to that of the direction; stores those of the mode and the exponent."""
    shares, logs = _sharpened(direction, exponent, valid)
    tl.store(grad_mode, tl.sum(grad * shares, 0).to(grad_mode.dtype.element_ty))
    grad = mode * grad
    grad = shares * (grad - tl.sum(shares * grad, 0))
    tl.store(grad_exponent, tl.sum(grad * logs, 0).to(grad_exponent.dtype.element_ty))
    return tl.where(valid, exponent * grad / (direction + LINK_FLOOR), 0.0)


# ---- the write -----------------------------------------------------------------------------------------------------------


@triton.jit
def _write(m1, m2, w, retained, erase, vector, d1, d2, D: tl.constexpr, DEALLOCATE: tl.constexpr):
    e1, e2 = load_vector(erase, d1, d2, D, m1.dtype)
    v1, v2 = load_vector(vector, d1, d2, D, m1.dtype)
    m1, m2 = m1 * (1.0 - w[:, None] * e1[None, :]), m2 * (1.0 - w[:, None] * e2[None, :])
    if DEALLOCATE:
        m1, m2 = m1 * retained[:, None], m2 * retained[:, None]
    return m1 + w[:, None] * v1[None, :], m2 + w[:, None] * v2[None, :]


# ---- forward ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T", "B"])
def _dnc_scan_kernel(
    memory, usage, precedence, links, read_weights, write_weights, read_keys, read_sharpness, write_key, write_sharpness, erase,
    write_vector, free_gates, allocation_gate, write_gate, read_modes, read_masks, write_mask, link_sharpening, resets, lengths,
    start, reads, out_memory, out_usage, out_precedence, out_links, out_read_weights, out_write_weights, read_history,
    write_history, orders, directions, scratch, T, B,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, NP: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    RP: tl.constexpr, ROWS: tl.constexpr, PLACES: tl.constexpr, LINKS: tl.constexpr, MASKED: tl.constexpr,
    SHARPENED: tl.constexpr, DEALLOCATE: tl.constexpr, EPS: tl.constexpr, KEEP: tl.constexpr, RESETS: tl.constexpr,
    LENGTHS: tl.constexpr,
):  # fmt: skip
    """Scratch, rows of N: read weights of the step before and of this one in turn [2, R], directions [2, R], and one each for
    usage, products in the order of allocation, and write weights."""
    b = tl.program_id(0).to(tl.int64)
    n, d1, d2 = tl.arange(0, NP), tl.arange(0, P1), P1 + tl.arange(0, P2)
    valid = n < N
    scratch += b * (4 * R + 3) * N
    pointed = scratch + 2 * R * N
    used, products, writing = pointed + 2 * R * N, pointed + (2 * R + 1) * N, pointed + (2 * R + 2) * N
    m1, m2 = load_memory(memory + b * N * D, n, d1, d2, valid, D)
    u, written = load_slots(usage, b, n, valid, N), load_slots(write_weights, b, n, valid, N)
    p = tl.zeros_like(u)
    if LINKS:
        p = load_slots(precedence, b, n, valid, N)
    copy_slots(read_weights + b * R * N, scratch, n, valid, R, N, N)
    tl.debug_barrier()
    steps = steps_of(lengths, T, b, LENGTHS)
    for t in range(0, steps):
        row = t * B + b
        before, now = scratch + (t % 2) * R * N, scratch + ((t + 1) % 2) * R * N
        if LINKS:
            source = out_links + b * N * N
            if t == 0:
                source = links + b * N * N
        if RESETS:
            if tl.load(resets + row):
                m1, m2 = load_memory(start, n, d1, d2, valid, D)
                u, p, written = tl.zeros_like(u), tl.zeros_like(u), tl.zeros_like(u)
                for r in range(0, R):
                    store_slots(before, r, u, n, valid, N)
                if LINKS:
                    source = out_links + b * N * N
                    _clear_links(source, n, N, ROWS)
                tl.debug_barrier()
        # Usage, allocation.
        retained = _retention(free_gates + row * R, before, n, valid, u, N, R)
        u = (u + (1.0 - u) * written) * retained
        store_slots(used, 0, u, n, valid, N)
        tl.debug_barrier()
        places = _places(used, u, n, N, NP, PLACES)
        tl.store(products + places, u, mask=valid)
        if KEEP:
            tl.store(orders + row * N + places, n.to(tl.int64), mask=valid)
        tl.debug_barrier()
        ordered = tl.load(products + n - 1, mask=valid & (n > 0), other=1.0)
        tl.debug_barrier()
        store_slots(products, 0, tl.cumprod(ordered, 0), n, valid, N)
        tl.debug_barrier()
        allocation = (1.0 - u) * tl.load(products + places, mask=valid, other=0.0)
        # Write weights, write.
        squares = row_squares(m1, m2)
        content, _, _, _, _, _, _, _ = _by_content(
            m1, m2, squares, write_key + row * D, write_mask + row * D if MASKED else write_mask, write_sharpness + row, 0,
            d1, d2, valid, D, MASKED, EPS,
        )  # fmt: skip
        gate = tl.load(allocation_gate + row).to(u.dtype)
        mixed = gate * allocation + (1.0 - gate) * content
        written = tl.where(valid, tl.load(write_gate + row).to(u.dtype) * mixed, 0.0)
        if KEEP:
            store_slots(write_history, row, written, n, valid, N)
        m1, m2 = _write(
            m1, m2, written, retained, erase + row * D, write_vector + row * D, d1, d2, D, DEALLOCATE
        )
        # Links.
        if LINKS:
            store_slots(writing, 0, written, n, valid, N)
            tl.debug_barrier()
            _link(source, out_links + b * N * N, writing, written, p, before, pointed, n, N, R, RP, ROWS)
            p = (1.0 - tl.sum(written, 0)) * p + written
            tl.debug_barrier()
        # Read.
        squares = row_squares(m1, m2)
        for r in range(0, R):
            w, _, _, _, _, _, _, _ = _by_content(
                m1, m2, squares, read_keys + row * R * D, read_masks + row * R * D if MASKED else read_masks,
                read_sharpness + row * R, r, d1, d2, valid, D, MASKED, EPS,
            )  # fmt: skip
            if LINKS:
                backward, forward = (
                    load_slots(pointed, r, n, valid, N),
                    load_slots(pointed, R + r, n, valid, N),
                )
                if SHARPENED:
                    if KEEP:
                        store_slots(directions, (row * R + r) * 2, backward, n, valid, N)
                        store_slots(directions, (row * R + r) * 2 + 1, forward, n, valid, N)
                    exponents = link_sharpening + (row * R + r) * 2
                    backward, _ = _sharpened(backward, tl.load(exponents).to(u.dtype), valid)
                    forward, _ = _sharpened(forward, tl.load(exponents + 1).to(u.dtype), valid)
                modes = read_modes + (row * R + r) * 3
                w = tl.load(modes).to(u.dtype) * backward + tl.load(modes + 1).to(u.dtype) * w
                w += tl.load(modes + 2).to(u.dtype) * forward
            store_slots(now, r, w, n, valid, N)
            if KEEP:
                store_slots(read_history, row * R + r, w, n, valid, N)
            r1, r2 = read_slots(w, m1, m2)
            store_vector(reads + (row * R + r) * D, r1, r2, d1, d2, D)
        tl.debug_barrier()
    store_memory(out_memory + b * N * D, m1, m2, n, d1, d2, valid, D)
    store_slots(out_usage, b, u, n, valid, N)
    store_slots(out_write_weights, b, written, n, valid, N)
    copy_slots(scratch + (steps % 2) * R * N, out_read_weights + b * R * N, n, valid, R, N, N)
    if LINKS:
        store_slots(out_precedence, b, p, n, valid, N)
        if steps == 0:
            _copy_links(links + b * N * N, out_links + b * N * N, n, N, ROWS)


# ---- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def _state(states, t, every, segments, N: tl.constexpr, D: tl.constexpr, LINKS: tl.constexpr):
    """Where the state before step t lies in states [segments + every - 1, ...]: one for the beginning of each segment, then the
    inner ones of one segment. Memory, usage, precedence and links."""
    place = t // every
    if t % every > 0:
        place = segments + t % every - 1
    states += tl.cast(place, tl.int64) * (N * D + N + (N + N * N if LINKS else 0))
    return states, states + N * D, states + N * (D + 1), states + N * (D + 2)


@triton.jit
def _begin_anew(
    states, start, t, every, segments, n, d1, d2, valid,
    N: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, LINKS: tl.constexpr,
):  # fmt: skip
    """The state before step t becomes that of the start of a sequence."""
    memory, usage, precedence, links = _state(states, t, every, segments, N, D, LINKS)
    m1, m2 = load_memory(start, n, d1, d2, valid, D)
    store_memory(memory, m1, m2, n, d1, d2, valid, D)
    zero = tl.zeros(n.shape, m1.dtype)
    store_slots(usage, 0, zero, n, valid, N)
    if LINKS:
        store_slots(precedence, 0, zero, n, valid, N)
        _clear_links(links, n, N, ROWS)
    tl.debug_barrier()


@triton.jit
def _weights_before(
    read_weights, write_weights, read_history, write_history, resets, zeros, t, B, b,
    N: tl.constexpr, R: tl.constexpr, RESETS: tl.constexpr,
):  # fmt: skip
    """Where the read and the write weights lie that came to step t; after a reset these are zeros [R, N]."""
    row = t * B + b
    reading, writing = read_weights + b * R * N, write_weights + b * N
    if t > 0:
        reading, writing = read_history + (row - B) * R * N, write_history + (row - B) * N
    if RESETS:
        if tl.load(resets + row):
            reading, writing = zeros, zeros
    return reading, writing


@triton.jit(do_not_specialize=["first", "last", "T", "B", "every", "segments"])
def _replay(
    first, last, read_weights, write_weights, erase, write_vector, free_gates, resets, start, read_history, write_history,
    states, zeros, B, b, every, segments, n, d1, d2, valid,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, LINKS: tl.constexpr, DEALLOCATE: tl.constexpr,
    RESETS: tl.constexpr,
):  # fmt: skip
    """The states before steps first + 1 to last, from that before step first."""
    for t in range(first, last):
        row = t * B + b
        if RESETS:
            if tl.load(resets + row):
                _begin_anew(states, start, t, every, segments, n, d1, d2, valid, N, D, ROWS, LINKS)
        memory, usage, precedence, links = _state(states, t, every, segments, N, D, LINKS)
        next_memory, next_usage, next_precedence, next_links = _state(
            states, t + 1, every, segments, N, D, LINKS
        )
        reading, writing = _weights_before(
            read_weights, write_weights, read_history, write_history, resets, zeros, t, B, b, N, R, RESETS
        )
        u, w = load_slots(usage, 0, n, valid, N), load_slots(write_history, row, n, valid, N)
        retained = _retention(free_gates + row * R, reading, n, valid, u, N, R)
        u = (u + (1.0 - u) * load_slots(writing, 0, n, valid, N)) * retained
        store_slots(next_usage, 0, u, n, valid, N)
        m1, m2 = load_memory(memory, n, d1, d2, valid, D)
        m1, m2 = _write(m1, m2, w, retained, erase + row * D, write_vector + row * D, d1, d2, D, DEALLOCATE)
        store_memory(next_memory, m1, m2, n, d1, d2, valid, D)
        if LINKS:
            p = load_slots(precedence, 0, n, valid, N)
            store_slots(next_precedence, 0, (1.0 - tl.sum(w, 0)) * p + w, n, valid, N)
            _relink(links, next_links, write_history + row * N, w, p, n, N, ROWS)
        tl.debug_barrier()


@triton.jit
def _then(a, b, c, d):
    """x -> a x + b, then x -> c x + d."""
    return a * c, c * b + d


@triton.jit(do_not_specialize=["T", "B", "every", "segments"])
def _dnc_scan_backward_kernel(
    grad_reads, grad_out_memory, grad_out_usage, grad_out_precedence, grad_out_links, grad_out_read_weights,
    grad_out_write_weights, memory, usage, precedence, links, read_weights, write_weights, read_keys, read_sharpness, write_key,
    write_sharpness, erase, write_vector, free_gates, allocation_gate, write_gate, read_modes, read_masks, write_mask,
    link_sharpening, resets, lengths, start, read_history, write_history, orders, directions, grad_memory, grad_usage,
    grad_precedence, grad_links, grad_read_weights, grad_read_keys, grad_read_sharpness, grad_write_key, grad_write_sharpness,
    grad_erase, grad_write_vector, grad_free_gates, grad_allocation_gate, grad_write_gate, grad_read_modes, grad_read_masks,
    grad_write_mask, grad_link_sharpening, grad_start, states, scratch, T, B, every, segments,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, NP: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    RP: tl.constexpr, ROWS: tl.constexpr, LINKS: tl.constexpr, MASKED: tl.constexpr, SHARPENED: tl.constexpr,
    DEALLOCATE: tl.constexpr, EPS: tl.constexpr, OF_READS: tl.constexpr, OF_MEMORY: tl.constexpr, OF_USAGE: tl.constexpr,
    OF_PRECEDENCE: tl.constexpr, OF_LINKS: tl.constexpr, OF_READ_WEIGHTS: tl.constexpr, OF_WRITE_WEIGHTS: tl.constexpr,
    RESETS: tl.constexpr, LENGTHS: tl.constexpr,
):  # fmt: skip
    """Scratch, rows of N: gradients of the directions [2, R], what comes back through them [2, R], zeros [R], and one each for
    the links' gradient of the write weights, usage, products before a slot, gradients of the allocation and what comes from
    behind a slot. grad_read_weights [R, N] and grad_links [N, N] are until the end those of what a step comes out with."""
    b = tl.program_id(0).to(tl.int64)
    n, d1, d2 = tl.arange(0, NP), tl.arange(0, P1), P1 + tl.arange(0, P2)
    valid = n < N
    dtype = memory.dtype.element_ty
    none = tl.zeros([NP], dtype)
    states += b * (segments + every - 1) * (N * D + N + (N + N * N if LINKS else 0))
    scratch += b * (5 * R + 5) * N
    of_backward = scratch
    of_forward = scratch + R * N if SHARPENED else scratch
    to_backward, to_forward, zeros = scratch + 2 * R * N, scratch + 3 * R * N, scratch + 4 * R * N
    of_rows, used, products = scratch + 5 * R * N, scratch + (5 * R + 1) * N, scratch + (5 * R + 2) * N
    of_allocation, behind = scratch + (5 * R + 3) * N, scratch + (5 * R + 4) * N
    grad_read_weights += b * R * N
    # The gradients of what comes out.
    g1, g2 = tl.zeros([NP, P1], dtype), tl.zeros([NP, P2], dtype)
    if OF_MEMORY:
        g1, g2 = load_memory(grad_out_memory + b * N * D, n, d1, d2, valid, D)
    gu, gp = none, none
    if OF_USAGE:
        gu = load_slots(grad_out_usage, b, n, valid, N)
    if OF_PRECEDENCE:
        gp = load_slots(grad_out_precedence, b, n, valid, N)
    for r in range(0, R):
        g = none
        if OF_READ_WEIGHTS:
            g = load_slots(grad_out_read_weights, b * R + r, n, valid, N)
        store_slots(grad_read_weights, r, g, n, valid, N)
        if RESETS:
            store_slots(zeros, r, none, n, valid, N)
    if LINKS:
        grad_links += b * N * N
        if OF_LINKS:
            _copy_links(grad_out_links + b * N * N, grad_links, n, N, ROWS)
        else:
            _clear_links(grad_links, n, N, ROWS)
    steps = steps_of(lengths, T, b, LENGTHS)
    if steps > 0:
        # The state that came in, and from it the first of each segment.
        m1, m2 = load_memory(memory + b * N * D, n, d1, d2, valid, D)
        store_memory(states, m1, m2, n, d1, d2, valid, D)
        store_slots(states + N * D, 0, load_slots(usage, b, n, valid, N), n, valid, N)
        if LINKS:
            store_slots(states + N * (D + 1), 0, load_slots(precedence, b, n, valid, N), n, valid, N)
            _copy_links(links + b * N * N, states + N * (D + 2), n, N, ROWS)
        tl.debug_barrier()
        _replay(
            0, (steps - 1) // every * every, read_weights, write_weights, erase, write_vector, free_gates, resets, start,
            read_history, write_history, states, zeros, B, b, every, segments, n, d1, d2, valid,
            N, D, R, ROWS, LINKS, DEALLOCATE, RESETS,
        )  # fmt: skip
    for back in range(0, steps):
        t = steps - 1 - back
        row = t * B + b
        if (t == steps - 1) | ((t + 1) % every == 0):  # into another segment
            _replay(
                t // every * every, t, read_weights, write_weights, erase, write_vector, free_gates, resets, start,
                read_history, write_history, states, zeros, B, b, every, segments, n, d1, d2, valid,
                N, D, R, ROWS, LINKS, DEALLOCATE, RESETS,
            )  # fmt: skip
        if RESETS:
            begins = tl.load(resets + row)
            if begins:
                _begin_anew(states, start, t, every, segments, n, d1, d2, valid, N, D, ROWS, LINKS)
        old_memory, old_usage, old_precedence, old_links = _state(states, t, every, segments, N, D, LINKS)
        reading, writing = _weights_before(
            read_weights, write_weights, read_history, write_history, resets, zeros, t, B, b, N, R, RESETS
        )
        free = free_gates + row * R
        w = load_slots(write_history, row, n, valid, N)
        retained = _retention(free, reading, n, valid, w, N, R)
        b1, b2 = load_memory(old_memory, n, d1, d2, valid, D)
        m1, m2 = _write(b1, b2, w, retained, erase + row * D, write_vector + row * D, d1, d2, D, DEALLOCATE)
        # Read, content of the reads, directions.
        squares = row_squares(m1, m2)
        for r in range(0, R):
            grad = load_slots(grad_read_weights, r, n, valid, N)
            if OF_READS:
                h1, h2 = load_vector(grad_reads + (row * R + r) * D, d1, d2, D, dtype)
                grad += dot(h1, h2, m1, m2)
                weight = load_slots(read_history, row * R + r, n, valid, N)
                g1 += weight[:, None] * h1[None, :]
                g2 += weight[:, None] * h2[None, :]
            content, k1, k2, compared, key_square, beta, dots, root = _by_content(
                m1, m2, squares, read_keys + row * R * D, read_masks + row * R * D if MASKED else read_masks,
                read_sharpness + row * R, r, d1, d2, valid, D, MASKED, EPS,
            )  # fmt: skip
            of_content = grad
            if LINKS:
                modes, grad_modes = read_modes + (row * R + r) * 3, grad_read_modes + (row * R + r) * 3
                tl.store(grad_modes + 1, tl.sum(grad * content, 0).to(grad_modes.dtype.element_ty))
                of_content = tl.load(modes + 1).to(dtype) * grad
                if SHARPENED:
                    pointed = directions + (row * R + r) * 2 * N
                    exponents = link_sharpening + (row * R + r) * 2
                    grad_exponents = grad_link_sharpening + (row * R + r) * 2
                    x = _sharpened_backward(
                        grad, tl.load(modes).to(dtype), load_slots(pointed, 0, n, valid, N), tl.load(exponents).to(dtype),
                        grad_modes, grad_exponents, valid,
                    )  # fmt: skip
                    store_slots(of_backward, r, x, n, valid, N)
                    x = _sharpened_backward(
                        grad, tl.load(modes + 2).to(dtype), load_slots(pointed, 1, n, valid, N),
                        tl.load(exponents + 1).to(dtype), grad_modes + 2, grad_exponents + 1, valid,
                    )  # fmt: skip
                    store_slots(of_forward, r, x, n, valid, N)
                else:
                    store_slots(of_backward, r, grad, n, valid, N)
            g1, g2 = _by_content_backward(
                m1, m2, g1, g2, of_content, content, k1, k2, compared, key_square, beta, dots, root,
                read_keys + row * R * D, read_masks + row * R * D if MASKED else read_masks, grad_read_keys + row * R * D,
                grad_read_masks + row * R * D if MASKED else grad_read_masks, grad_read_sharpness + row * R, r, d1, d2,
                D, MASKED,
            )  # fmt: skip
        # Links, precedence.
        gw = none
        if OF_WRITE_WEIGHTS:
            if back == 0:
                gw = load_slots(grad_out_write_weights, b, n, valid, N)
        if LINKS:
            tl.debug_barrier()
            p = load_slots(old_precedence, 0, n, valid, N)
            x, y = _link_backward(
                old_links, grad_links, write_history + row * N, w, p, reading, read_modes + row * R * 3, of_backward,
                of_forward, to_backward, to_forward, of_rows, n, N, R, RP, ROWS, SHARPENED,
            )  # fmt: skip
            tl.debug_barrier()
            gw += x + load_slots(of_rows, 0, n, valid, N) + gp - tl.sum(gp * p, 0)
            gp = (1.0 - tl.sum(w, 0)) * gp + y
        # Write.
        b1, b2 = load_memory(old_memory, n, d1, d2, valid, D)
        e1, e2 = load_vector(erase + row * D, d1, d2, D, dtype)
        v1, v2 = load_vector(write_vector + row * D, d1, d2, D, dtype)
        gw += dot(v1, v2, g1, g2)
        x1, x2 = read_slots(w, g1, g2)
        store_vector(grad_write_vector + row * D, x1, x2, d1, d2, D)
        g_retained = none
        o1, o2 = g1 * b1, g2 * b2
        if DEALLOCATE:
            g_retained = tl.sum(o1 * (1.0 - w[:, None] * e1[None, :]), 1) + tl.sum(
                o2 * (1.0 - w[:, None] * e2[None, :]), 1
            )
            o1, o2 = o1 * retained[:, None], o2 * retained[:, None]
            g1, g2 = g1 * retained[:, None], g2 * retained[:, None]
        x1, x2 = read_slots(w, o1, o2)
        store_vector(grad_erase + row * D, -x1, -x2, d1, d2, D)
        gw -= dot(e1, e2, o1, o2)
        g1, g2 = g1 * (1.0 - w[:, None] * e1[None, :]), g2 * (1.0 - w[:, None] * e2[None, :])
        # Allocation: the product before each slot.
        u, written = load_slots(old_usage, 0, n, valid, N), load_slots(writing, 0, n, valid, N)
        taken = u + (1.0 - u) * written
        u = taken * retained
        store_slots(used, 0, u, n, valid, N)
        order = orders + row * N
        tl.debug_barrier()
        slot = tl.load(order + n, mask=valid, other=0)
        previous = tl.load(order + n - 1, mask=valid & (n > 0), other=0)
        product = tl.cumprod(tl.load(used + previous, mask=valid & (n > 0), other=1.0), 0)
        tl.store(products + slot, product, mask=valid)
        tl.debug_barrier()
        product = load_slots(products, 0, n, valid, N)
        allocation = (1.0 - u) * product
        # Write weights, content of the write.
        content, k1, k2, compared, key_square, beta, dots, root = _by_content(
            b1, b2, row_squares(b1, b2), write_key + row * D, write_mask + row * D if MASKED else write_mask,
            write_sharpness + row, 0, d1, d2, valid, D, MASKED, EPS,
        )  # fmt: skip
        gate, written_share = tl.load(allocation_gate + row).to(dtype), tl.load(write_gate + row).to(dtype)
        x = tl.sum(gw * (gate * allocation + (1.0 - gate) * content), 0)
        tl.store(grad_write_gate + row, x.to(grad_write_gate.dtype.element_ty))
        gw = gw * written_share
        x = tl.sum(gw * (allocation - content), 0)
        tl.store(grad_allocation_gate + row, x.to(grad_allocation_gate.dtype.element_ty))
        g1, g2 = _by_content_backward(
            b1, b2, g1, g2, (1.0 - gate) * gw, content, k1, k2, compared, key_square, beta, dots, root,
            write_key + row * D, write_mask + row * D if MASKED else write_mask, grad_write_key + row * D,
            grad_write_mask + row * D if MASKED else grad_write_mask, grad_write_sharpness + row, 0, d1, d2, D, MASKED,
        )  # fmt: skip
        # Back through the allocation from the last slot in order: behind a slot, q = (1 - u) g + u q of the slots behind.
        ga = gate * gw
        store_slots(of_allocation, 0, ga, n, valid, N)
        tl.debug_barrier()
        inner = valid & (n > 0)
        after = tl.load(order + N - n, mask=inner, other=0)
        u_after = tl.load(used + after, mask=inner, other=1.0)
        ga_after = tl.load(of_allocation + after, mask=inner, other=0.0)
        _, q = tl.associative_scan((u_after, (1.0 - u_after) * ga_after), 0, _then)
        tl.store(behind + tl.load(order + N - 1 - n, mask=valid, other=0), q, mask=valid)
        tl.debug_barrier()
        gu += product * (load_slots(behind, 0, n, valid, N) - ga)
        # Usage, retention.
        g_retained += gu * taken
        gu = gu * retained * (1.0 - written)
        for r in range(0, R):
            others = none + 1.0
            for s in range(0, R):
                if s != r:
                    others *= 1.0 - tl.load(free + s).to(dtype) * load_slots(reading, s, n, valid, N)
            before = load_slots(reading, r, n, valid, N)
            through = g_retained * others
            of_gate = -tl.sum(through * before, 0)
            tl.store(grad_free_gates + row * R + r, of_gate.to(grad_free_gates.dtype.element_ty))
            grad = -tl.load(free + r).to(dtype) * through
            if LINKS:
                back_b, back_f = (
                    load_slots(to_backward, r, n, valid, N),
                    load_slots(to_forward, r, n, valid, N),
                )
                if not SHARPENED:
                    modes, grad_modes = read_modes + (row * R + r) * 3, grad_read_modes + (row * R + r) * 3
                    tl.store(grad_modes, tl.sum(before * back_b, 0).to(grad_modes.dtype.element_ty))
                    tl.store(grad_modes + 2, tl.sum(before * back_f, 0).to(grad_modes.dtype.element_ty))
                    back_b, back_f = tl.load(modes).to(dtype) * back_b, tl.load(modes + 2).to(dtype) * back_f
                grad += back_b + back_f
            store_slots(grad_read_weights, r, grad, n, valid, N)
        if RESETS:
            if begins:
                s1, s2 = load_memory(grad_start + b * N * D, n, d1, d2, valid, D)
                tl.debug_barrier()
                store_memory(grad_start + b * N * D, s1 + g1, s2 + g2, n, d1, d2, valid, D)
                g1, g2, gu, gp = tl.zeros_like(g1), tl.zeros_like(g2), none, none
                for r in range(0, R):
                    store_slots(grad_read_weights, r, none, n, valid, N)
                if LINKS:
                    _clear_links(grad_links, n, N, ROWS)
        tl.debug_barrier()
    store_memory(grad_memory + b * N * D, g1, g2, n, d1, d2, valid, D)
    store_slots(grad_usage, b, gu, n, valid, N)
    if LINKS:
        store_slots(grad_precedence, b, gp, n, valid, N)


# ---- launchers ---------------------------------------------------------------------------------------------------------


def _fits(num_slots: int, slot_size: int, heads: int) -> bool:
    return fits_one_program(num_slots, slot_size, power_of_two(heads))


def _constants(kernel: str, memory: Tensor, heads: int) -> dict[str, int]:
    _, num_slots, slot_size = memory.shape
    held = power_of_two(heads)
    constants = resident(kernel, memory.device, num_slots, slot_size, heads, held)
    rows = LINKS_PER_THREAD * 32 * constants["num_warps"] // constants["NP"]
    return {
        **constants,
        "RP": held,
        "ROWS": max(1, min(constants["NP"], power_of_two(rows // held + 1) // 2)),
    }


def dnc_scan(*values: object) -> tuple[Tensor, ...]:
    *tensors, deallocate, eps, anchor_every = values
    memory, usage, precedence, links, read_weights, write_weights, *told = contiguous(*tensors[:19])
    resets, lengths, start = contiguous(*tensors[19:])
    (steps, batch, heads, slot_size), num_slots = told[0].shape, memory.shape[1]
    linked, sharpened, keeps = links is not None, told[-1] is not None, anchor_every > 0
    state = (memory, usage, precedence, links, read_weights, write_weights)
    reads = new_steps(told[0], told[0].shape, lengths)

    def kept(*shape: int, there: bool = True, dtype: torch.dtype | None = None) -> Tensor:
        return new_steps(memory, (steps, batch, *shape) if keeps and there else (0,), lengths, dtype)

    read_history, write_history = kept(heads, num_slots), kept(num_slots)
    orders = kept(num_slots, dtype=torch.int64)
    directions = kept(heads, 2, num_slots, there=sharpened)
    histories = (read_history, write_history, orders, directions)
    if not _fits(num_slots, slot_size, heads):
        out = dnc_steps.scan(state, told, (resets, lengths, start), deallocate, eps, reads, histories)
        return reads, *[memory.new_empty(0) if x is None else x for x in out], *histories
    out = [memory.new_empty(0) if x is None else torch.empty_like(x) for x in state]
    scratch = memory.new_empty(batch, 4 * heads + 3, num_slots)
    constants = _constants("dnc_scan", memory, heads)
    places = LINKS_PER_THREAD * 32 * constants["num_warps"] // constants["NP"]
    launch(
        _dnc_scan_kernel, (batch,), *state, *told, resets, lengths, start, reads, *out, *histories, scratch, steps, batch,
        **constants, PLACES=max(1, min(constants["NP"], power_of_two(places + 1) // 2)), LINKS=linked,
        MASKED=told[10] is not None, SHARPENED=sharpened, DEALLOCATE=deallocate, EPS=eps, KEEP=keeps,
        RESETS=resets is not None, LENGTHS=lengths is not None, options=FORWARD,
    )  # fmt: skip
    return reads, *out, *histories


def dnc_scan_backward(*values: object) -> tuple[Tensor, ...]:
    *tensors, deallocate, eps, _ = values
    given, state, told = (contiguous(*tensors[i:j]) for i, j in ((0, 7), (7, 13), (13, 26)))
    resets, lengths, start, *histories = contiguous(*tensors[26:])
    memory, links, read_keys = state[0], state[3], told[0]
    (steps, batch, heads, slot_size), num_slots = read_keys.shape, memory.shape[1]
    of_state = [memory.new_empty(0) if x is None else torch.empty_like(x) for x in state[:5]]
    of_told = [read_keys.new_empty(0) if x is None else new_steps(x, x.shape, lengths) for x in told]
    grad_start = new_gradient_of_start(start, memory)
    every = dnc_steps.interval(steps)
    if not _fits(num_slots, slot_size, heads):
        sequences, results = (resets, lengths, start), (of_state, of_told, grad_start)
        dnc_steps.scan_backward(given, state, told, sequences, histories[2], deallocate, eps, every, results)
        return *of_state, *of_told, grad_start
    segments = triton.cdiv(steps, every)
    numbers = num_slots * (slot_size + 1) + (0 if links is None else num_slots * (num_slots + 1))
    states = memory.new_empty(batch, segments + every - 1, numbers)
    scratch = memory.new_empty(batch, 5 * heads + 5, num_slots)
    launch(
        _dnc_scan_backward_kernel, (batch,), *given, *state, *told, resets, lengths, start, *histories, *of_state, *of_told,
        grad_start, states, scratch, steps, batch, every, segments,
        **_constants("dnc_scan_backward", memory, heads), LINKS=links is not None, MASKED=told[10] is not None,
        SHARPENED=told[12] is not None, DEALLOCATE=deallocate, EPS=eps, OF_READS=given[0] is not None,
        OF_MEMORY=given[1] is not None, OF_USAGE=given[2] is not None, OF_PRECEDENCE=given[3] is not None,
        OF_LINKS=given[4] is not None, OF_READ_WEIGHTS=given[5] is not None, OF_WRITE_WEIGHTS=given[6] is not None,
        RESETS=resets is not None, LENGTHS=lengths is not None, options=BACKWARD,
    )  # fmt: skip
    return *of_state, *of_told, grad_start


def sentence(op: str, num_slots: int, slot_size: int, heads: int) -> str:
    steps, loop = "the step", "a step of PyTorch operations"
    if op == "dnc_scan":
        steps, loop = "all steps", "a loop of steps, each PyTorch operations"
    if _fits(num_slots, slot_size, heads):
        return scan_sentence("dnc_scan", steps, loop, num_slots, slot_size, heads, power_of_two(heads))
    numbers = held_numbers(num_slots, slot_size, power_of_two(heads))
    return (
        f"{loop}: a program would hold {numbers} numbers at once, of the memory or per slot and head, with padding, and can "
        f"hold {RESIDENT_NUMBERS} in registers"
    )
