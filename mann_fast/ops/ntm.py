"""Neural Turing Machine addressing (Graves et al. 2014): ntm_address, ntm_step, ntm_scan."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..reference.ntm import NTMHead, NTMState
from . import _backend, _checks
from .lrua import ORDERS

# H = R + W heads, those that read first. Where anchor_every is 0 nothing is kept for backward, and history and anchors come
# out empty.
_backend.define(
    "ntm_scan(Tensor memory, Tensor weights, Tensor keys, Tensor sharpness, Tensor gates, Tensor shift, Tensor sharpening, "
    "Tensor erase, Tensor add, bool read_first, float eps, SymInt anchor_every) -> "
    "(Tensor reads, Tensor memory, Tensor weights, Tensor history, Tensor anchors)"
)
_backend.define(
    "ntm_scan_backward(Tensor? grad_reads, Tensor? grad_memory, Tensor? grad_weights, Tensor memory, Tensor weights, "
    "Tensor keys, Tensor sharpness, Tensor gates, Tensor shift, Tensor sharpening, Tensor erase, Tensor add, Tensor history, "
    "Tensor anchors, bool read_first, float eps, SymInt anchor_every) -> (Tensor grad_memory, Tensor grad_weights, "
    "Tensor grad_keys, Tensor grad_sharpness, Tensor grad_gates, Tensor grad_shift, Tensor grad_sharpening, "
    "Tensor grad_erase, Tensor grad_add)"
)


@_backend.fake("ntm_scan")
def _(memory, weights, keys, sharpness, gates, shift, sharpening, erase, add, read_first, eps, anchor_every):
    steps, batch, heads, slot_size = keys.shape
    num_slots = memory.shape[1]
    history, anchors = (0,), (0,)
    if anchor_every > 0:
        history = (steps, *weights.shape)
        count = torch.sym_max(steps - 1, 0) // anchor_every
        anchors = (count, batch, slot_size, (num_slots + 15) // 16 * 16)
    return (
        keys.new_empty((steps, batch, heads - erase.shape[2], slot_size)),
        memory.new_empty(memory.shape),
        memory.new_empty(weights.shape),
        memory.new_empty(history),
        memory.new_empty(anchors),
    )


@_backend.fake("ntm_scan_backward")
def _(grad_reads, grad_memory, grad_weights, memory, weights, *rest):
    inputs = rest[:7]
    return (
        memory.new_empty(memory.shape),
        memory.new_empty(weights.shape),
        *(x.new_empty(x.shape) for x in inputs),
    )


def anchor_interval(num_slots: int, slot_size: int, heads: int) -> int:
    """Every how many steps a scan keeps the memory, N D floats, for backward: so many that it takes no more than the
    weights that every step keeps, H N floats, and few enough for a core's cache."""
    return max(8, -(-slot_size // max(heads, 1)))


class _NTMScan(torch.autograd.Function):
    @staticmethod
    def forward(serving, *inputs_and_options):
        return _backend.raw(serving).ntm_scan.default(*inputs_and_options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.serving, ctx.options = inputs[0], inputs[10:]
        history, anchors = output[3:]
        ctx.save_for_backward(*inputs[1:10], history, anchors)
        ctx.mark_non_differentiable(history, anchors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_reads, grad_memory, grad_weights, *_):
        if grad_reads is None and grad_memory is None and grad_weights is None:
            return (None,) * 13
        saved = ctx.saved_tensors
        outer = (grad_reads, grad_memory, grad_weights)
        grads = _backend.raw(ctx.serving).ntm_scan_backward.default(*outer, *saved, *ctx.options)
        grads = _checks.refuse_second_derivative("ntm_scan", grads, *outer, *saved[:9])
        return None, *grads, None, None, None


def _check_head(name: str, head: object, axes: str, sizes: tuple[int, ...], memory: Tensor) -> None:
    """``axes`` and ``sizes`` of the key, for instance "T B R D"."""
    if not isinstance(head, tuple) or len(head) != 5:
        raise TypeError(
            f"{name} must be an NTMHead (key, sharpness, gate, shift, sharpening), got {type(head).__name__}"
        )
    key, sharpness, gate, shift, sharpening = head
    _checks.check_input(f"{name}.key", key, axes, sizes, memory)
    for field, value in (("sharpness", sharpness), ("gate", gate), ("sharpening", sharpening)):
        _checks.check_like(f"{name}.{field}", value, axes[:-2], sizes[:-1], f"{name}.key", key)
    shift_axes = f"{axes[:-2]} 2S+1"
    _checks.check_tensor(f"{name}.shift", shift, shift_axes)
    if shift.shape[-1] % 2 == 0:
        raise ValueError(f"{name}.shift must have an odd number 2S + 1 of moves, got {shift.shape[-1]}")
    _checks.check_like(f"{name}.shift", shift, shift_axes, (*sizes[:-1], shift.shape[-1]), f"{name}.key", key)


def _check_weights(name: str, weights: object, axes: str, memory: Tensor) -> int:
    """[B, heads, N] of the memory's dtype; the number of heads."""
    _checks.check_tensor(name, weights, axes)
    batch, num_slots, _ = memory.shape
    _checks.check_like(name, weights, axes, (batch, weights.shape[1], num_slots), "memory", memory)
    return weights.shape[1]


def _fused(
    serving: str, memory: Tensor, weights: Tensor, inputs: tuple[Tensor, ...], read_first: bool, eps: float
):
    """reads, memory and weights of a scan with the inputs of all heads, by the kernel."""
    arguments = (memory, weights, *inputs, read_first, float(eps))
    if _checks.records_gradient(memory, weights, *inputs):
        every = anchor_interval(*memory.shape[1:], weights.shape[1])
        return _checks.apply(_NTMScan, serving, *arguments, every)[:3]
    return _backend.raw(serving).ntm_scan.default(*arguments, 0)[:3]


def ntm_address(memory: Tensor, head: NTMHead, previous: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Where H heads attend to (Graves et al. 2014, arXiv 1410.5401, eqs. 5-9).

    ``w_c = softmax over slots of sharpness * cosine(key, slot)`` as in :func:`mann_fast.ops.content_read`;
    ``w_g = gate * w_c + (1 - gate) * previous``; ``w_s[i] = sum over j from -S to S of shift[j + S] * w_g[(i - j) mod N]``;
    ``w[i] = w_s[i] ** sharpening / sum of w_s ** sharpening``, computed so that no power underflows.

    Args:
        memory: [B, N, D], float32 or float64; N, D >= 1.
        head: :class:`NTMHead`: key [B, H, D]; sharpness, gate and sharpening [B, H]; shift [B, H, 2S + 1]. Of the dtype of
            memory, or all bfloat16 or float16 beside a float32 memory. gate in [0, 1], shifts that sum to 1 and
            sharpening >= 1 are the caller's to ensure. 2S + 1 may exceed N: the shift then goes round.
        previous: [B, H, N] of memory's dtype, the weights of the step before.
        eps: > 0, as in :func:`mann_fast.ops.content_read`.

    Returns:
        weights [B, H, N] of memory's dtype. Differentiable once in all tensors.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or value; RuntimeError: tensors on different devices.
    """
    _checks.check_state("memory", memory, "B N D")
    heads = _check_weights("previous", previous, "B H N", memory)
    batch, _, slot_size = memory.shape
    _check_head("head", head, "B H D", (batch, heads, slot_size), memory)
    _checks.check_eps(eps)
    serving = _backend.serving(memory.device)
    if serving == "reference":
        return reference.ntm_address(memory, head, previous, eps=eps)
    nothing = head[0].new_empty(1, batch, 0, slot_size)
    inputs = (*(x.unsqueeze(0) for x in head), nothing, nothing)
    return _fused(serving, memory, previous, inputs, True, eps)[2]


def _ntm(state, read_head, write_head, erase, add, leading: str, order: str, eps: float):
    """Check a step (``leading`` "") or a scan ("T "), and run it."""
    if not isinstance(state, tuple) or len(state) != 3:
        raise TypeError(
            f"state must be an NTMState (memory, read_weights, write_weights), got {type(state).__name__}"
        )
    memory, read_weights, write_weights = state
    _checks.check_state("state.memory", memory, "B N D")
    batch, _, slot_size = memory.shape
    read_heads = _check_weights("state.read_weights", read_weights, "B R N", memory)
    write_heads = _check_weights("state.write_weights", write_weights, "B W N", memory)
    _checks.check_tensor("erase", erase, f"{leading}B W D")
    steps = tuple(erase.shape[:1]) if leading else ()
    sizes = (*steps, batch, write_heads, slot_size)
    _checks.check_input("erase", erase, f"{leading}B W D", sizes, memory)
    _checks.check_like("add", add, f"{leading}B W D", sizes, "erase", erase)
    _check_head("read_head", read_head, f"{leading}B R D", (*steps, batch, read_heads, slot_size), memory)
    _check_head("write_head", write_head, f"{leading}B W D", sizes, memory)
    for name, head in (("read_head", read_head), ("write_head", write_head)):
        if head[0].dtype != erase.dtype:
            raise TypeError(f"{name}.key must have the dtype of erase, {erase.dtype}, got {head[0].dtype}")
    if read_head[3].shape[-1] != write_head[3].shape[-1]:
        raise ValueError(
            f"write_head.shift must have as many moves as read_head.shift, {read_head[3].shape[-1]}, "
            f"got {write_head[3].shape[-1]}"
        )
    _checks.check_choice("order", order, ORDERS)
    _checks.check_eps(eps)
    serving = _backend.serving(memory.device)
    if serving == "reference":
        function = reference.ntm_scan if leading else reference.ntm_step
        return function(state, read_head, write_head, erase, add, order=order, eps=eps)
    heads_axis = len(steps) + 1
    inputs = [torch.cat(pair, dim=heads_axis) for pair in zip(read_head, write_head, strict=True)] + [
        erase,
        add,
    ]
    if not leading:
        inputs = [x.unsqueeze(0) for x in inputs]
    weights = torch.cat([read_weights, write_weights], dim=1)
    reads, memory, weights = _fused(serving, memory, weights, tuple(inputs), order == "read_first", eps)
    # Copies: no two tensors of a state share their storage.
    parts = (x.clone() for x in weights.split([read_heads, write_heads], dim=1))
    return reads if leading else reads.squeeze(0), NTMState(memory, *parts)


def ntm_step(
    state: NTMState,
    read_head: NTMHead,
    write_head: NTMHead,
    erase: Tensor,
    add: Tensor,
    *,
    order: str = "read_first",
    eps: float = 1e-6,
) -> tuple[Tensor, NTMState]:
    """One step of a Neural Turing Machine's memory (Graves et al. 2014, arXiv 1410.5401, eqs. 2-9).

    Heads address as in :func:`ntm_address`. ``memory[i] = memory[i] * prod over write heads of (1 - w[i] * erase) + sum over
    write heads of w[i] * add``; ``read = sum over i of w[i] * memory[i]`` for each read head.

    Args:
        state: :class:`NTMState`: memory [B, N, D], read_weights [B, R, N], write_weights [B, W, N]; float32 or float64. R or W
            may be 0.
        read_head, write_head: :class:`NTMHead` of R and of W heads, as in :func:`ntm_address`.
        erase, add: [B, W, D], of the dtype of the heads; erase in [0, 1] is the caller's to ensure.
        order: "read_first" (all heads address, and the read heads read, the memory as it was before the step; Graves et al.) or
            "write_first" (the write heads address and write, then the read heads address and read what was written).
        eps: > 0, as in :func:`mann_fast.ops.content_read`.

    Returns:
        read [B, R, D] of the heads' dtype, and the new state. Differentiable once in all tensors.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or value; RuntimeError: tensors on different devices.
    """
    return _ntm(state, read_head, write_head, erase, add, "", order, eps)


def ntm_scan(
    state: NTMState,
    read_head: NTMHead,
    write_head: NTMHead,
    erase: Tensor,
    add: Tensor,
    *,
    order: str = "read_first",
    eps: float = 1e-6,
) -> tuple[Tensor, NTMState]:
    """T steps of :func:`ntm_step` in one call: reads [T, B, R, D] and the last state.

    All of ``read_head``, ``write_head``, ``erase`` and ``add`` have a leading T, which may be 0; then the state is cloned.
    Other arguments, dtypes and errors as in :func:`ntm_step`. Backward keeps the weights of every step and the memory of
    every few.
    """
    return _ntm(state, read_head, write_head, erase, add, "T ", order, eps)
