"""Sparse access."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.functional import pad

from .. import ops
from .._state import SIZE_MAX
from ..ops import SparseState, _backend, _checks
from ..ops._public import checked
from ..ops._sequences import NO_SEQUENCES
from ..ops.sparse import (
    SPARSE,
    SPARSE_READ,
    SPARSE_SCAN,
    check_slots,
)
from ..reference import sparse as reference
from ._collectives import Gathered, Mesh, Shared, group_of

# A rank may have fewer slots than heads: what has to hold of all slots together is known after the collective.
ARGUMENTS = tuple(replace(x, heads_in=None if x.heads_in is None else "") for x in SPARSE.arguments)
NONE = -1  # in the place of a slot, where a rank has fewer than it may send
LATEST = 1 << 62  # later than any clock, and exact as the float that pad takes it for


def sparse_read(
    memory: Tensor,
    key: Tensor,
    sharpness: Tensor | None = None,
    *,
    num_reads: int,
    mesh: Mesh,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Read the slots of all ranks that are most like each key: :func:`mann_fast.ops.sparse_read`.

    Each rank searches its own slots with the kernel of one process, and sends the K rows of each head that it found.

    Args:
        memory: [B, n, D], this rank's slots, float32 or float64; n >= 1, and may be less than K.
        key, sharpness, num_reads, eps: as of :func:`mann_fast.ops.sparse_read`; the same on all ranks.
        mesh: a DeviceMesh of one dimension, or a process group.

    Returns:
        read [B, R, D] of key's dtype, slots int64 [B, R, K], numbered through the ranks, and weights [B, R, K] of memory's
        dtype; the same on all ranks. Differentiable once.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or value; RuntimeError: tensors on different devices.
    """
    group = group_of(mesh)
    _checks.check_tensors(SPARSE_READ.arguments, SPARSE_READ.names[:3], (memory, key, sharpness))
    options = {"num_reads": num_reads, "eps": eps}
    SPARSE_READ.raw_options(options, {"N": SIZE_MAX})  # for its checks
    wide_key, wide_sharpness = (None if x is None else x.to(memory.dtype) for x in (key, sharpness))
    assert wide_key is not None
    with _backend.without_autocast(memory.device.type):
        slots = _nearest(memory, wide_key, num_reads, eps, key.new_empty(len(key), 0, dtype=torch.int64))
        rows = reference.rows_of(memory, slots.clamp(min=0))
        (all_rows,), (all_slots, sizes) = _exchanged(
            group, [rows], [slots, slots.new_tensor([memory.shape[1]])]
        )
        SPARSE_READ.raw_options(options, {"N": int(sizes.sum())})
        first = sizes.cumsum(0) - sizes
        all_slots = _numbered(all_slots, first.view(-1, 1, 1, 1))
        read, slots, weights = _read(
            _merged(all_rows, 2), _merged(all_slots, 2), wide_key, wide_sharpness, num_reads, eps
        )
    return read.to(key.dtype), slots, weights


def sparse_step(
    state: SparseState,
    key: Tensor,
    write_vector: Tensor,
    gate_logit: Tensor,
    sharpness: Tensor | None = None,
    write_gate_logit: Tensor | None = None,
    *,
    first_slot: int,
    mesh: Mesh,
    threshold: float = 0.005,
    eps: float = 1e-6,
) -> tuple[Tensor, SparseState]:
    """One step of a memory with sparse access over the slots of all ranks: :func:`mann_fast.ops.sparse_step`.

    Which slots are the oldest is known after the collective alone. So each rank searches what cannot be among them, and sends
    the K rows of each head that it found along with its R oldest, which all ranks then write and read alike. Each rank searches
    with the kernel of one process, and does the rest in plain PyTorch.

    Args:
        state: SparseState: memory [B, n, D] and last_access [B, n] of this rank's slots; read_slots, numbered through the
            ranks, read_weights and clock the same on all ranks. n >= 1, and may be less than R or K.
        key, write_vector, gate_logit, sharpness, write_gate_logit, threshold, eps: as of :func:`mann_fast.ops.sparse_step`; the
            same on all ranks.
        first_slot: the number of this rank's first slot: how many slots the ranks before it have.
        mesh: a DeviceMesh of one dimension, or a process group.

    Returns:
        read [B, R, D] of key's dtype, the same on all ranks, and the new SparseState, of the same kind as the one given.
        Differentiable once in all but the integers.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or value; RuntimeError: tensors on different devices.
    """
    group = group_of(mesh)
    _checks.check_tuple("state", state, SparseState)
    tensors = (*state, key, write_vector, gate_logit, sharpness, write_gate_logit)
    options = {"threshold": threshold, "eps": eps}
    checked(SPARSE_SCAN, ARGUMENTS, SPARSE.step_names, (*tensors, *NO_SEQUENCES), options, steps=False)
    if isinstance(first_slot, bool) or not isinstance(first_slot, int):
        raise TypeError(f"first_slot must be an int, got {type(first_slot).__name__}")
    dtype = state[0].dtype
    wide: Any = [None if x is None else x.to(dtype) for x in tensors[5:]]
    with _backend.without_autocast(state[0].device.type):
        read, state = _step(
            SparseState(*state), *wide, group=group, first_slot=first_slot, threshold=threshold, eps=eps
        )
    return read.to(key.dtype), state


def _step(
    state: SparseState,
    key: Tensor,
    vector: Tensor,
    gate: Tensor,
    sharpness: Tensor | None,
    write_gate: Tensor | None,
    *,
    group: distributed.ProcessGroup,
    first_slot: int,
    threshold: float,
    eps: float,
) -> tuple[Tensor, SparseState]:
    """The step itself, with everything in the memory's dtype."""
    memory, last_slots, last_weights, last_access, clock = state
    (_, size, width), (batch, heads, num_reads) = memory.shape, last_slots.shape
    own_vector, own_gate, own_write_gate, own_weights = Shared.apply(
        group, vector, gate, write_gate, last_weights
    )
    own_state = state._replace(read_weights=own_weights)

    # What is not among the R oldest slots of this rank is written to where it was read alone: the oldest are nowhere here.
    old = ops.least_used(last_access.double(), min(heads, size))
    of_rows = old.unsqueeze(2).expand(-1, -1, width)
    nowhere = torch.full((batch, heads), NONE, device=memory.device)
    write_slots, own_write_weights = reference.sparse_writes(own_state, own_gate, own_write_gate, nowhere)
    others = _written(memory, _own(write_slots, first_slot, size), own_write_weights, own_vector)
    near = _nearest(others, key, num_reads, eps, old)
    old_rows, missing = memory.gather(1, of_rows), heads - old.shape[1]
    (near_rows, all_old_rows), (all_near, all_old, times, of_rank) = _exchanged(
        group,
        [reference.rows_of(others, near.clamp(min=0)), pad(old_rows, (0, 0, 0, missing))],
        [
            near,
            pad(old, (0, missing), value=NONE),
            pad(last_access.gather(1, old), (0, missing), value=LATEST),
            old.new_tensor([first_slot, size]),
        ],
    )
    given, sizes = of_rank.unbind(1)
    _check_all(given, sizes, last_slots, heads)
    all_near = _numbered(all_near, given.view(-1, 1, 1, 1))
    all_old = _merged(_numbered(all_old, given.view(-1, 1, 1)), 1)

    # The R oldest slots of all, written and read by every rank alike. Rank after rank, each by age and number: a stable sort.
    oldest = torch.sort(_merged(times, 1), dim=1, stable=True).indices[:, :heads]
    write_slots, write_weights = reference.sparse_writes(state, gate, write_gate, all_old.gather(1, oldest))
    all_old_rows = _merged(all_old_rows, 1)
    all_old_rows = _written(all_old_rows, _places(write_slots, all_old), write_weights, vector)
    rows = torch.cat([all_old_rows.unsqueeze(1).expand(-1, heads, -1, -1), _merged(near_rows, 2)], 2)
    slots = torch.cat([all_old.unsqueeze(1).expand(-1, heads, -1), _merged(all_near, 2)], 2)
    read, read_slots, read_weights = _read(rows, slots, key, sharpness, num_reads, eps)

    # This rank's own, by its own copy of its rows: so that gradients need no other way back.
    places = _places(write_slots, old + first_slot)
    memory = others.scatter(1, of_rows, _written(old_rows, places, own_write_weights, own_vector))
    total = reference.accessed(
        pad(last_access, (0, 1)),
        _own(write_slots, first_slot, size),
        write_weights,
        _own(read_slots, first_slot, size),
        read_weights,
    )
    clock = clock + 1
    last_access = torch.where(total[:, :size] > threshold, clock.unsqueeze(1), last_access)
    return read, SparseState(memory, read_slots, read_weights, last_access, clock)


def _check_all(given: Tensor, sizes: Tensor, last_slots: Tensor, heads: int) -> None:
    """What ranks have to agree on; each sees what all have sent, so that all raise."""
    first, total = sizes.cumsum(0) - sizes, int(sizes.sum())
    if not torch.equal(given, first):
        raise ValueError(
            f"first_slot must be {first.tolist()} by rank, for {sizes.tolist()} slots, got {given.tolist()}"
        )
    for axis, size in (("R", heads), ("K", last_slots.shape[2])):
        if not 1 <= size <= total:
            raise ValueError(
                f"state.read_slots [B, R, K] must have 1 <= {axis} <= {total}, the slots of all ranks, got {size}"
            )
    check_slots(last_slots, total)


def _nearest(memory: Tensor, key: Tensor, num_reads: int, eps: float, without: Tensor) -> Tensor:
    """The K slots [B, R, K] of this rank that are most like each key, but for ``without`` [B, M]; NONE where it has fewer."""
    enough = min(num_reads + without.shape[1], memory.shape[1])
    slots = ops.sparse_read(memory.detach(), key.detach(), num_reads=enough, eps=eps)[1]
    out = (slots.unsqueeze(3) == without[:, None, None, :]).any(3)
    kept = torch.sort(out.int(), dim=2, stable=True).indices
    slots = slots.masked_fill(out, NONE).gather(2, kept)[:, :, :num_reads]
    return pad(slots, (0, num_reads - slots.shape[2]), value=NONE)


def _read(
    rows: Tensor, slots: Tensor, key: Tensor, sharpness: Tensor | None, num_reads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Read, slots and weights from what all ranks have sent, rows [B, R, M, D] of slots [B, R, M]."""
    cosine = reference.cosine_of(rows.detach(), key.detach(), eps).masked_fill(slots == NONE, -torch.inf)
    by_number = torch.sort(slots, dim=2).indices
    order = torch.sort(cosine.gather(2, by_number), dim=2, descending=True, stable=True).indices
    best = by_number.gather(2, order[:, :, :num_reads])
    found = rows.gather(2, best.unsqueeze(3).expand(-1, -1, -1, rows.shape[3]))
    read, weights = reference.read_rows(found, key, sharpness, eps)
    return read, slots.gather(2, best), weights


def _written(rows: Tensor, places: Tensor, weights: Tensor, vector: Tensor) -> Tensor:
    """Rows [B, M, D] after a write at places [B, R, K + 1] among them; M is none of them."""
    return reference.written(pad(rows, (0, 0, 0, 1)), places, weights, vector)[:, :-1]


def _own(slots: Tensor, first_slot: int, size: int) -> Tensor:
    """Slots numbered through the ranks as those of this rank; its size where they are not."""
    slots = slots - first_slot
    return torch.where((slots >= 0) & (slots < size), slots, size)


def _places(slots: Tensor, among: Tensor) -> Tensor:
    """Where slots [B, R, K + 1] stand in ``among`` [B, M]; M where they do not."""
    same = slots.unsqueeze(3) == among[:, None, None, :]
    return torch.where(same.any(3), same.int().argmax(3), among.shape[1])


def _numbered(slots: Tensor, first: Tensor) -> Tensor:
    """Slots of each rank, numbered through the ranks."""
    return torch.where(slots == NONE, NONE, slots + first)


def _merged(x: Tensor, axis: int) -> Tensor:
    """What all ranks have sent, x [ranks, B, ...], rank after rank along an axis of what each has sent."""
    return x.movedim(0, axis).flatten(axis, axis + 1)


def _exchanged(
    group: distributed.ProcessGroup, numbers: list[Tensor], integers: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Those of all ranks, each with a leading axis of ranks, in one collective: integers go as bits of the numbers' dtype."""
    bits = torch.cat([x.flatten() for x in integers]).view(numbers[0].dtype)
    found = Gathered.apply(group, torch.cat([bits, *(x.flatten() for x in numbers)]))
    found_bits, rest = found.split([len(bits), found.shape[1] - len(bits)], 1)

    def parted(x: Tensor, like: list[Tensor]) -> list[Tensor]:
        parts = x.split([y.numel() for y in like], 1)
        return [part.reshape(-1, *y.shape) for part, y in zip(parts, like, strict=True)]

    return parted(rest, numbers), parted(found_bits.detach().clone().view(torch.int64), integers)
