"""Reading by content."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..ops import _checks
from ..ops.content import CONTENT_READ
from ._collectives import Gathered, Mesh, Shared, group_of


def content_read(
    memory: Tensor, key: Tensor, sharpness: Tensor | None = None, *, mesh: Mesh, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Read a memory by content: :func:`mann_fast.ops.content_read` over the slots of all ranks.

    Each rank reads its own slots with the kernel of one process, and what they read is weighed by the sums of their
    exponentials. So equal slots of two ranks may differ in the last bit of their weights.

    Args:
        memory: [B, n, D], this rank's slots, float32 or float64; n >= 1.
        key, sharpness, eps: as of :func:`mann_fast.ops.content_read`; the same on all ranks.
        mesh: a DeviceMesh of one dimension, or a process group.

    Returns:
        read [B, R, D] of key's dtype, the same on all ranks, and weights [B, R, n] of this rank's slots, of memory's dtype;
        over all ranks they sum to 1. Differentiable once.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or value; RuntimeError: tensors on different devices.
    """
    group = group_of(mesh)
    _checks.check_tensors(CONTENT_READ.arguments, CONTENT_READ.names[:3], (memory, key, sharpness))
    wide_sharpness = None if sharpness is None else sharpness.to(memory.dtype)
    own_key, own_sharpness = Shared.apply(group, key.to(memory.dtype), wide_sharpness)
    read, weights = ops.content_read(memory, own_key, own_sharpness, eps=eps)
    # The logarithm of the sum of this rank's exponentials, from the similarity of the slot with the largest weight.
    largest, slot = weights.max(2)
    nearest = memory.gather(1, slot.unsqueeze(2).expand(-1, -1, memory.shape[2]))
    norms = (own_key * own_key).sum(2) * (nearest * nearest).sum(2)
    cosine = (own_key * nearest).sum(2) / torch.sqrt(norms + eps)
    log_sum = (cosine if own_sharpness is None else own_sharpness * cosine) - largest.log()

    reads, log_sums = Gathered.apply(group, torch.cat([read, log_sum.unsqueeze(2)], 2)).split(
        [memory.shape[2], 1], 3
    )
    read = (torch.softmax(log_sums, 0) * reads).sum(0)
    (log_total,) = Shared.apply(group, torch.logsumexp(log_sums, 0).squeeze(2))
    return read.to(key.dtype), weights * (log_sum - log_total).exp().unsqueeze(2)
