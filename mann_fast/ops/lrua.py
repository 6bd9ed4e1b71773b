"""Least recently used access (Santoro et al. 2016): least_used, lrua_write, lrua_step, lrua_scan."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..reference.lrua import LRUAState
from . import _backend, _checks

ORDERS = ("write_first", "read_first")
WRITE_TARGETS = ("per_head", "shared")

_backend.define("least_used(Tensor usage, SymInt n) -> Tensor")
_backend.define(
    "lrua_write(Tensor memory, Tensor read_weights, Tensor usage, Tensor write_vector, Tensor gate_logit, "
    "bool shared_target) -> (Tensor memory, Tensor write_weights, Tensor slots)"
)
_backend.define(
    "lrua_write_backward(Tensor? grad_memory, Tensor? grad_write_weights, Tensor read_weights, Tensor write_vector, "
    "Tensor gate_logit, Tensor slots, bool shared_target) -> "
    "(Tensor grad_memory, Tensor grad_read_weights, Tensor grad_write_vector, Tensor grad_gate_logit)"
)
# keys, write_vectors, gate_logits and sharpness have a leading T for a scan and none for a single step. Where
# anchor_every is 0 nothing is kept for backward, and slots and anchors come out empty.
_backend.define(
    "lrua_scan(Tensor memory, Tensor read_weights, Tensor usage, Tensor keys, Tensor write_vectors, Tensor gate_logits, "
    "Tensor? sharpness, bool read_first, bool shared_target, float usage_decay, float eps, SymInt anchor_every) -> "
    "(Tensor reads, Tensor memory, Tensor read_weights, Tensor usage, Tensor slots, Tensor anchors)"
)
_backend.define(
    "lrua_scan_backward(Tensor? grad_reads, Tensor? grad_memory, Tensor? grad_read_weights, Tensor memory, "
    "Tensor read_weights, Tensor keys, Tensor write_vectors, Tensor gate_logits, Tensor? sharpness, Tensor slots, "
    "Tensor anchors, bool read_first, bool shared_target, float eps, SymInt anchor_every) -> "
    "(Tensor grad_memory, Tensor grad_read_weights, Tensor grad_keys, Tensor grad_write_vectors, "
    "Tensor grad_gate_logits, Tensor grad_sharpness)"
)


@_backend.fake("least_used")
def _(usage, n):
    return usage.new_empty((usage.shape[0], n), dtype=torch.int64)


@_backend.fake("lrua_write")
def _(memory, read_weights, usage, write_vector, gate_logit, shared_target):
    slots = usage.new_empty(read_weights.shape[:2], dtype=torch.int64)
    return memory.new_empty(memory.shape), read_weights.new_empty(read_weights.shape), slots


@_backend.fake("lrua_write_backward")
def _(grad_memory, grad_write_weights, read_weights, write_vector, gate_logit, slots, shared_target):
    batch, _, num_slots = read_weights.shape
    return (
        read_weights.new_empty((batch, num_slots, write_vector.shape[2])),
        read_weights.new_empty(read_weights.shape),
        write_vector.new_empty(write_vector.shape),
        gate_logit.new_empty(gate_logit.shape),
    )


def _steps(keys: Tensor) -> int:
    return keys.shape[0] if keys.dim() == 4 else 1


def _anchors_shape(steps: int, memory: Tensor, heads: int, anchor_every: int) -> tuple[int, ...]:
    """[anchors, B, D + R, N padded to a multiple of 16]; the padding is slot_padding in csrc/include/arguments.h."""
    batch, num_slots, slot_size = memory.shape
    count = torch.sym_max(steps - 1, 0) // anchor_every
    return count, batch, slot_size + heads, (num_slots + 15) // 16 * 16


@_backend.fake("lrua_scan")
def _(
    memory,
    read_weights,
    usage,
    keys,
    write_vectors,
    gate_logits,
    sharpness,
    read_first,
    shared_target,
    usage_decay,
    eps,
    anchor_every,
):
    slots_shape, anchors_shape = (0,), (0,)
    if anchor_every > 0:
        slots_shape = keys.shape[:-1]
        anchors_shape = _anchors_shape(_steps(keys), memory, read_weights.shape[1], anchor_every)
    return (
        keys.new_empty(keys.shape),
        memory.new_empty(memory.shape),
        memory.new_empty(read_weights.shape),
        memory.new_empty(usage.shape),
        memory.new_empty(slots_shape, dtype=torch.int64),
        memory.new_empty(anchors_shape),
    )


@_backend.fake("lrua_scan_backward")
def _(
    grad_reads,
    grad_memory,
    grad_read_weights,
    memory,
    read_weights,
    keys,
    write_vectors,
    gate_logits,
    sharpness,
    slots,
    anchors,
    read_first,
    shared_target,
    eps,
    anchor_every,
):
    return (
        memory.new_empty(memory.shape),
        memory.new_empty(read_weights.shape),
        keys.new_empty(keys.shape),
        keys.new_empty(write_vectors.shape),
        keys.new_empty(gate_logits.shape),
        keys.new_empty((0,) if sharpness is None else sharpness.shape),
    )


REPLAY_NUMBERS = (
    227 * 1024 - 16 * 1024
) // 4  # in the shared memory of a multiprocessor, beside everything else


def anchor_interval(num_slots: int, slot_size: int, num_heads: int, backend: str = "cpp") -> int:
    """Every how many steps a scan keeps the memory for backward, which replays the steps between.

    Enough steps that what is kept, (D + R) N floats an anchor, stays below the R (N + D) floats a step that keeping all
    read weights and erased rows would take; few enough that the memories of one replay stay in a core's cache. The CUDA
    kernels keep them in shared memory, where a few steps less make them fit: then below R (N + 2 D) floats.
    """
    kept = (slot_size + num_heads) * num_slots
    interval = max(8, -(-kept // (num_heads * (num_slots + slot_size))))
    if backend == "cuda":
        memory, rows = num_slots * slot_size, (2 * num_heads + 1) * num_slots
        fitting = (REPLAY_NUMBERS - memory - 4 * num_heads * num_slots) // (memory + rows)
        if fitting > 0 and kept <= fitting * num_heads * (num_slots + 2 * slot_size):
            return min(interval, fitting)
    return interval


class _LRUAWrite(torch.autograd.Function):
    @staticmethod
    def forward(memory, read_weights, usage, write_vector, gate_logit, shared_target, backend):
        return _backend.raw(backend).lrua_write.default(
            memory, read_weights, usage, write_vector, gate_logit, shared_target
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, read_weights, _, write_vector, gate_logit, ctx.shared_target, ctx.backend = inputs
        slots = output[2]
        ctx.save_for_backward(read_weights, write_vector, gate_logit, slots)
        ctx.mark_non_differentiable(slots)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_memory, grad_write_weights, _):
        read_weights, write_vector, gate_logit, slots = ctx.saved_tensors
        if grad_memory is None and grad_write_weights is None:
            return (None,) * 7
        differentiable = (grad_memory, grad_write_weights, read_weights, write_vector, gate_logit)
        raw = _backend.raw(ctx.backend)
        grads = raw.lrua_write_backward.default(*differentiable, slots, ctx.shared_target)
        grads = _checks.refuse_second_derivative("lrua_write", grads, *differentiable)
        return grads[0], grads[1], None, grads[2], grads[3], None, None


class _LRUAScan(torch.autograd.Function):
    @staticmethod
    def forward(
        memory,
        read_weights,
        usage,
        keys,
        write_vectors,
        gate_logits,
        sharpness,
        read_first,
        shared_target,
        usage_decay,
        eps,
        anchor_every,
        backend,
    ):
        return _backend.raw(backend).lrua_scan.default(
            memory,
            read_weights,
            usage,
            keys,
            write_vectors,
            gate_logits,
            sharpness,
            read_first,
            shared_target,
            usage_decay,
            eps,
            anchor_every,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        memory, read_weights, _, keys, write_vectors, gate_logits, sharpness = inputs[:7]
        ctx.read_first, ctx.shared_target, _, ctx.eps, ctx.anchor_every, ctx.backend = inputs[7:]
        _, _, _, usage, slots, anchors = output
        ctx.save_for_backward(
            memory, read_weights, keys, write_vectors, gate_logits, sharpness, slots, anchors
        )
        ctx.mark_non_differentiable(usage, slots, anchors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_reads, grad_memory, grad_read_weights, *_):
        memory, read_weights, keys, write_vectors, gate_logits, sharpness, slots, anchors = ctx.saved_tensors
        if grad_reads is None and grad_memory is None and grad_read_weights is None:
            return (None,) * 13
        differentiable = (
            grad_reads,
            grad_memory,
            grad_read_weights,
            memory,
            read_weights,
            keys,
            write_vectors,
            gate_logits,
            sharpness,
        )
        grads = _backend.raw(ctx.backend).lrua_scan_backward.default(
            *differentiable, slots, anchors, ctx.read_first, ctx.shared_target, ctx.eps, ctx.anchor_every
        )
        grads = _checks.refuse_second_derivative("lrua_scan", grads, *differentiable)
        grad_sharpness = None if sharpness is None else grads[5]
        return grads[0], grads[1], None, grads[2], grads[3], grads[4], grad_sharpness, *(None,) * 6


def _check_state(memory: object, read_weights: object, usage: object, prefix: str = "") -> None:
    _checks.check_state(prefix + "memory", memory, "B N D")
    batch, num_slots, _ = memory.shape
    _checks.check_tensor(prefix + "read_weights", read_weights, "B R N")
    heads = read_weights.shape[1]
    _checks.check_like(
        prefix + "read_weights", read_weights, "B R N", (batch, heads, num_slots), prefix + "memory", memory
    )
    if not 1 <= heads <= num_slots:
        raise ValueError(
            f"{prefix}read_weights [B, R, N] must have 1 <= R <= N = {num_slots} heads, got {list(read_weights.shape)}"
        )
    _checks.check_like(prefix + "usage", usage, "B N", (batch, num_slots), prefix + "memory", memory)


def _check_options(order: object, write_target: object, usage_decay: object, eps: object) -> None:
    _checks.check_choice("order", order, ORDERS)
    _checks.check_choice("write_target", write_target, WRITE_TARGETS)
    _checks.check_number("usage_decay", usage_decay)
    if not 0 <= usage_decay <= 1:
        raise ValueError(f"usage_decay must be within [0, 1], got {usage_decay}")
    _checks.check_eps(eps)


def least_used(usage: Tensor, n: int) -> Tensor:
    """The n least used slots of every sample, ascending by usage (Santoro et al. 2016, eq. 6).

    The order is that of a stable ``torch.sort``: among equal usage the lower slot comes first, 0.0 equals -0.0, NaN is last.

    Args:
        usage: [B, N], float32 or float64.
        n: how many, 0 <= n <= N.

    Returns:
        int64 [B, n]; carries no gradient.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or n.
    """
    _checks.check_state("usage", usage, "B N")
    if isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)):
        raise TypeError(f"n must be an int, got {type(n).__name__}")
    if not 0 <= n <= usage.shape[1]:
        raise ValueError(f"n must be within [0, N = {usage.shape[1]}], got {n}")
    backend = _backend.serving(usage.device)
    if backend == "reference":
        return reference.least_used(usage, n)
    return _backend.raw(backend).least_used.default(usage.detach(), n)


def lrua_write(
    memory: Tensor,
    read_weights: Tensor,
    usage: Tensor,
    write_vector: Tensor,
    gate_logit: Tensor,
    *,
    write_target: str = "per_head",
) -> tuple[Tensor, Tensor]:
    """Write to where the heads read last and to the least used slots (Santoro et al. 2016, eqs. 6-8).

    ``write_weights[r] = sigmoid(gate_logit[r]) * read_weights[r] + sigmoid(-gate_logit[r]) * target[r]``; the least used
    slot of all is set to zero; then ``memory[i] += sum over r of write_weights[r, i] * write_vector[r]``.

    Args:
        memory: [B, N, D], float32 or float64; N, D >= 1.
        read_weights: [B, R, N], where each head read last; 1 <= R <= N.
        usage: [B, N]; gets no gradient.
        write_vector: [B, R, D], of the dtype of memory, or bfloat16 or float16 beside a float32 memory.
        gate_logit: [B, R], of write_vector's dtype.
        write_target: "per_head": target[r] is one-hot at the r-th least used slot; "shared": 1 at each of the R least used
            slots, for every head (the paper's).

    Returns:
        the new memory [B, N, D] and write_weights [B, R, N], of memory's dtype. Differentiable once.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or value; RuntimeError: tensors on different devices.
    """
    _check_state(memory, read_weights, usage)
    batch, heads, _ = read_weights.shape
    _checks.check_input("write_vector", write_vector, "B R D", (batch, heads, memory.shape[2]), memory)
    _checks.check_like("gate_logit", gate_logit, "B R", (batch, heads), "write_vector", write_vector)
    _checks.check_choice("write_target", write_target, WRITE_TARGETS)
    backend = _backend.serving(memory.device)
    if backend == "reference":
        return reference.lrua_write(
            memory, read_weights, usage, write_vector, gate_logit, write_target=write_target
        )
    arguments = (memory, read_weights, usage.detach(), write_vector, gate_logit, write_target == "shared")
    if _checks.records_gradient(memory, read_weights, write_vector, gate_logit):
        return _checks.apply(_LRUAWrite, *arguments, backend)[:2]
    return _backend.raw(backend).lrua_write.default(*arguments)[:2]


def _lrua(
    state: LRUAState,
    names: tuple[str, str, str],
    axes: str,
    keys: Tensor,
    write_vectors: Tensor,
    gate_logits: Tensor,
    sharpness: Tensor | None,
    order: str,
    write_target: str,
    usage_decay: float,
    eps: float,
) -> tuple[Tensor, LRUAState] | None:
    """Check and run a step or a scan, which differ in the leading T alone; None where the reference is to serve."""
    if not isinstance(state, tuple) or len(state) != 3:
        raise TypeError(
            f"state must be an LRUAState (memory, read_weights, usage), got {type(state).__name__}"
        )
    memory, read_weights, usage = state
    _check_state(memory, read_weights, usage, "state.")
    batch, heads, num_slots = read_weights.shape
    slot_size = memory.shape[2]
    key_name, write_name, gate_name = names
    _checks.check_tensor(key_name, keys, axes)
    sizes = (*keys.shape[:-3], batch, heads, slot_size)
    _checks.check_input(key_name, keys, axes, sizes, memory)
    _checks.check_like(write_name, write_vectors, axes, sizes, key_name, keys)
    _checks.check_like(gate_name, gate_logits, axes[:-2], sizes[:-1], key_name, keys)
    if sharpness is not None:
        _checks.check_like("sharpness", sharpness, axes[:-2], sizes[:-1], key_name, keys)
    _check_options(order, write_target, usage_decay, eps)
    backend = _backend.serving(memory.device)
    if backend == "reference":
        return None
    arguments = (
        memory,
        read_weights,
        usage.detach(),
        keys,
        write_vectors,
        gate_logits,
        sharpness,
        order == "read_first",
        write_target == "shared",
        float(usage_decay),
        float(eps),
    )
    if _checks.records_gradient(memory, read_weights, keys, write_vectors, gate_logits, sharpness):
        anchor_every = anchor_interval(num_slots, slot_size, heads, backend)
        outputs = _checks.apply(_LRUAScan, *arguments, anchor_every, backend)
    else:
        outputs = _backend.raw(backend).lrua_scan.default(*arguments, 0)
    return outputs[0], LRUAState(*outputs[1:4])


def lrua_step(
    state: LRUAState,
    key: Tensor,
    write_vector: Tensor,
    gate_logit: Tensor,
    sharpness: Tensor | None = None,
    *,
    order: str = "write_first",
    write_target: str = "per_head",
    usage_decay: float = 0.95,
    eps: float = 1e-6,
) -> tuple[Tensor, LRUAState]:
    """One step of a least-recently-used-access memory (Santoro et al. 2016, arXiv 1605.06065, eqs. 2-8).

    Writes as :func:`lrua_write` does, reads as :func:`content_read` does, and updates
    ``usage = usage_decay * usage + sum over heads of (read weights + write weights)``.

    Args:
        state: LRUAState of memory [B, N, D], read_weights [B, R, N] and usage [B, N], float32 or float64; R <= N.
        key: [B, R, D], what each head looks for; of the dtype of the state, or bfloat16 or float16 beside a float32 state
            (computed in float32).
        write_vector: [B, R, D], what each head writes; of key's dtype.
        gate_logit: [B, R]; sigmoid of it is the share written where the head read last; of key's dtype.
        sharpness: [B, R], factor on the similarity, of key's dtype; None for 1.
        order: "write_first" addresses the memory after the write; "read_first" addresses the memory before the write and
            reads the memory after it.
        write_target: "per_head" or "shared", see :func:`lrua_write`.
        usage_decay: within [0, 1].
        eps: see :func:`content_read`.

    Returns:
        read [B, R, D] of key's dtype, and the new LRUAState. Differentiable once in everything but usage.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or value; RuntimeError: tensors on different devices.
    """
    options = {"order": order, "write_target": write_target, "usage_decay": usage_decay, "eps": eps}
    names = ("key", "write_vector", "gate_logit")
    result = _lrua(state, names, "B R D", key, write_vector, gate_logit, sharpness, **options)
    if result is None:
        return reference.lrua_step(state, key, write_vector, gate_logit, sharpness, **options)
    return result


def lrua_scan(
    state: LRUAState,
    keys: Tensor,
    write_vectors: Tensor,
    gate_logits: Tensor,
    sharpness: Tensor | None = None,
    *,
    order: str = "write_first",
    write_target: str = "per_head",
    usage_decay: float = 0.95,
    eps: float = 1e-6,
) -> tuple[Tensor, LRUAState]:
    """T steps of :func:`lrua_step` in one call, the memory of a sample held in cache throughout.

    Backward keeps the memory every few steps and replays the steps between, bit for bit.

    Args:
        state: as in :func:`lrua_step`.
        keys, write_vectors: [T, B, R, D]; gate_logits, sharpness: [T, B, R]; the other arguments as in :func:`lrua_step`.

    Returns:
        reads [T, B, R, D] of keys' dtype, and the LRUAState after the last step. T = 0 gives a copy of the state.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or value; RuntimeError: tensors on different devices.
    """
    options = {"order": order, "write_target": write_target, "usage_decay": usage_decay, "eps": eps}
    names = ("keys", "write_vectors", "gate_logits")
    result = _lrua(state, names, "T B R D", keys, write_vectors, gate_logits, sharpness, **options)
    if result is None:
        return reference.lrua_scan(state, keys, write_vectors, gate_logits, sharpness, **options)
    return result
