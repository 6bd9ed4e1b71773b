"""content_read: cosine similarity, softmax and weighted read in one pass over the memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from . import _backend, _checks

_backend.define(
    "content_read(Tensor memory, Tensor key, Tensor? sharpness, float eps) -> (Tensor read, Tensor weights)"
)
_backend.define(
    "content_read_backward(Tensor? grad_read, Tensor? grad_weights, Tensor memory, Tensor key, Tensor? sharpness, "
    "Tensor read, Tensor weights, float eps) -> (Tensor grad_memory, Tensor grad_key, Tensor grad_sharpness)"
)


@_backend.fake("content_read")
def _(memory, key, sharpness, eps):
    return key.new_empty(key.shape), memory.new_empty((*key.shape[:2], memory.shape[1]))


@_backend.fake("content_read_backward")
def _(grad_read, grad_weights, memory, key, sharpness, read, weights, eps):
    grad_sharpness = key.new_empty((0,) if sharpness is None else sharpness.shape)
    return memory.new_empty(memory.shape), key.new_empty(key.shape), grad_sharpness


class _ContentRead(torch.autograd.Function):
    @staticmethod
    def forward(memory, key, sharpness, eps, backend):
        return _backend.raw(backend).content_read.default(memory, key, sharpness, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        memory, key, sharpness, ctx.eps, ctx.backend = inputs
        ctx.save_for_backward(memory, key, sharpness, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_read, grad_weights):
        memory, key, sharpness, read, weights = ctx.saved_tensors
        if grad_read is None and grad_weights is None:
            return None, None, None, None, None
        gradients = _backend.raw(ctx.backend).content_read_backward.default(
            grad_read, grad_weights, memory, key, sharpness, read, weights, ctx.eps
        )
        grad_memory, grad_key, grad_sharpness = _checks.refuse_second_derivative(
            "content_read", gradients, grad_read, grad_weights, memory, key, sharpness
        )
        return grad_memory, grad_key, None if sharpness is None else grad_sharpness, None, None


def content_read(
    memory: Tensor, key: Tensor, sharpness: Tensor | None = None, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Read a memory by content (Graves et al. 2014, arXiv 1410.5401, eqs. 2, 5, 6).

    ``weights = softmax over slots of sharpness * dot(key, slot) / sqrt(|key|^2 |slot|^2 + eps)`` and ``read = weights @
    memory``, for every sample and head. With zero keys or zero slots values and gradients are finite.

    Args:
        memory: [B, N, D], float32 or float64; N, D >= 1.
        key: [B, R, D], of the dtype of memory, or bfloat16 or float16 beside a float32 memory (computed in float32).
        sharpness: [B, R] of key's dtype, or None for 1. Any real number.
        eps: added to the product of the squared norms; > 0.

    Returns:
        read [B, R, D] of key's dtype, weights [B, R, N] of memory's dtype. Differentiable once in all tensors.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or value; RuntimeError: tensors on different devices.
    """
    _checks.check_state("memory", memory, "B N D")
    _checks.check_tensor("key", key, "B R D")
    batch, heads, slot_size = memory.shape[0], key.shape[1], memory.shape[2]
    _checks.check_input("key", key, "B R D", (batch, heads, slot_size), memory)
    if heads < 1:
        raise ValueError(f"key [B, R, D] must have at least one head, got {list(key.shape)}")
    if sharpness is not None:
        _checks.check_like("sharpness", sharpness, "B R", (batch, heads), "key", key)
    _checks.check_eps(eps)
    backend = _backend.serving(memory.device)
    if backend == "reference":
        return reference.content_read(memory, key, sharpness, eps=eps)
    if _checks.records_gradient(memory, key, sharpness):
        return _checks.apply(_ContentRead, memory, key, sharpness, float(eps), backend)
    return _backend.raw(backend).content_read.default(memory, key, sharpness, float(eps))
