"""Least recently used access."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from .. import ops
from ..ops import LRUAState, _backend, _checks
from ..ops._public import checked
from ..ops._sequences import NO_SEQUENCES
from ..ops.lrua import LRUA, LRUA_SCAN
from ..reference import lrua as reference
from ..reference.content import similarity
from ._collectives import Gathered, Mesh, Shared, gather, group_of


def least_used(usage: Tensor, n: int, *, mesh: Mesh) -> Tensor:
    """The n least used slots of all ranks: :func:`mann_fast.ops.least_used`.

    Args:
        usage: [B, slots of this rank], float32 or float64.
        n: how many; at most as many as each rank has slots.
        mesh: a DeviceMesh of one dimension, or a process group.

    Returns:
        int64 [B, n], numbered through the ranks, the same on all of them; carries no gradient.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or n.
    """
    group = group_of(mesh)
    slots = ops.least_used(usage, n)
    # Bits of a float64, which holds every usage, so that one tensor has all: usage, slots, and how many slots there are.
    bits = usage.detach().gather(1, slots).double().view(torch.int64)
    sent = torch.cat([bits.flatten(), slots.flatten(), slots.new_tensor([usage.shape[1]])])
    found = gather(group, sent)
    bits, slots = found[:, :-1].view(len(found), 2, *slots.shape).unbind(1)
    first = found[:, -1].cumsum(0) - found[:, -1]
    # Rank after rank, each in the order of its own: a stable sort leaves equal usage in the order of slots.
    candidates = (slots + first.view(-1, 1, 1)).transpose(0, 1).flatten(1)
    return candidates.gather(1, reference.least_used(bits.view(torch.float64).transpose(0, 1).flatten(1), n))


def lrua_step(
    state: LRUAState,
    key: Tensor,
    write_vector: Tensor,
    gate_logit: Tensor,
    sharpness: Tensor | None = None,
    *,
    mesh: Mesh,
    order: str = "write_first",
    write_target: str = "per_head",
    usage_decay: float = 0.95,
    eps: float = 1e-6,
) -> tuple[Tensor, LRUAState]:
    """One step of a least-recently-used-access memory over the slots of all ranks: :func:`mann_fast.ops.lrua_step`.

    Which slots are the least used is known after the collective alone. So each rank reads what cannot be among them, and
    sends that along with its R least used slots, which all ranks then write and read alike. Equal slots get equal bits,
    whichever ranks hold them. Each rank computes in plain PyTorch.

    Args:
        state: LRUAState of this rank's slots: memory [B, n, D], read_weights [B, R, n] and usage [B, n]; R <= n.
        key, write_vector, gate_logit, sharpness, and options: as of :func:`mann_fast.ops.lrua_step`; the same on all ranks.
        mesh: a DeviceMesh of one dimension, or a process group.

    Returns:
        read [B, R, D] of key's dtype, the same on all ranks, and the new LRUAState of this rank's slots. Differentiable once
        in everything but usage.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or value; RuntimeError: tensors on different devices.
    """
    group = group_of(mesh)
    _checks.check_tuple("state", state, LRUAState)
    tensors = (*state, key, write_vector, gate_logit, sharpness, *NO_SEQUENCES)
    options = {"order": order, "write_target": write_target, "usage_decay": usage_decay, "eps": eps}
    _, (read_first, *_) = checked(
        LRUA_SCAN, LRUA_SCAN.arguments, LRUA.step_names, tensors, options, steps=False
    )
    dtype = state[0].dtype
    wide = key.to(dtype), write_vector.to(dtype), gate_logit.to(dtype)
    wide_sharpness = None if sharpness is None else sharpness.to(dtype)
    with _backend.without_autocast(state[0].device.type):
        read, state = _step(
            LRUAState(*state), *wide, wide_sharpness, group, read_first, write_target, usage_decay, eps
        )
    return read.to(key.dtype), state


def _step(
    state: LRUAState,
    key: Tensor,
    vector: Tensor,
    gate: Tensor,
    sharpness: Tensor | None,
    group: distributed.ProcessGroup,
    read_first: bool,
    write_target: str,
    usage_decay: float,
    eps: float,
) -> tuple[Tensor, LRUAState]:
    """The step itself, with everything in the memory's dtype."""
    memory, read_weights, usage = state
    batch, heads, width = key.shape
    own_key, own_vector, own_gate, own_sharpness = Shared.apply(group, key, vector, gate, sharpness)

    # What is not among the R least used slots of this rank is written to by the read weights alone.
    slots = ops.least_used(usage, heads)
    of_rows = slots.unsqueeze(2).expand(-1, -1, width)
    of_weights = slots.unsqueeze(1).expand(-1, heads, -1)
    rows, row_weights = memory.gather(1, of_rows), read_weights.gather(2, of_weights)
    others = memory.scatter(1, of_rows, 0)
    nowhere = torch.full_like(slots, -1)
    written, write_weights = reference.write_slots(
        others, read_weights, nowhere, own_vector, own_gate, write_target
    )
    scores = similarity(others if read_first else written, own_key, own_sharpness, eps)
    masked = scores.scatter(2, of_weights, -torch.inf)
    largest = masked.detach().amax(2).clamp(min=torch.finfo(memory.dtype).min)  # where there are no others
    shares = (masked - largest.unsqueeze(2)).exp()
    of_others = torch.cat([shares @ written, shares.sum(2, keepdim=True), largest.unsqueeze(2)], 2)

    candidates = torch.cat([rows, row_weights.mT, usage.detach().gather(1, slots).unsqueeze(2)], 2)
    sent = torch.cat([candidates, of_others], 2)  # R of each
    found = Gathered.apply(group, sent).split([width, heads, 1, width, 1, 1], 3)

    # The R least used slots of all, written and read by every rank alike.
    all_rows, all_weights, all_usage = (x.transpose(0, 1).reshape(batch, -1, x.shape[3]) for x in found[:3])
    chosen = reference.least_used(all_usage.squeeze(2), heads)
    all_written, _ = reference.write_slots(all_rows, all_weights.mT, chosen, vector, gate, write_target)
    all_scores = similarity(all_rows if read_first else all_written, key, sharpness, eps)
    reads, sums, maxima = found[3:]
    maximum = torch.maximum(maxima.detach().amax(0), all_scores.detach().amax(2, keepdim=True))
    factors = (maxima.detach() - maximum).exp()
    all_shares = (all_scores - maximum).exp()
    total = (factors * sums).sum(0) + all_shares.sum(2, keepdim=True)
    read = ((factors * reads).sum(0) + all_shares @ all_written) / total

    # This rank's own, by its own copy of its rows: so that gradients need no other way back than that of `total`.
    chosen = chosen - group.rank() * heads  # of another rank: outside [0, R)
    rows_written, row_write_weights = reference.write_slots(
        rows, row_weights, chosen, own_vector, own_gate, write_target
    )
    row_scores = similarity(rows if read_first else rows_written, own_key, own_sharpness, eps)
    scores = scores.scatter(2, of_weights, row_scores)
    (own_total,) = Shared.apply(group, total)
    weights = (scores - maximum).exp() / own_total
    memory = written.scatter(1, of_rows, rows_written)
    touched = weights.detach() + write_weights.detach().scatter(2, of_weights, row_write_weights.detach())
    usage = usage_decay * usage.detach() + sum(touched.unbind(1)[1:], start=touched[:, 0])
    return read, LRUAState(memory, weights, usage)
