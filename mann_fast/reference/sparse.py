"""Sparse access to a memory of many slots (Rae et al. 2016, arXiv 1610.09027, "SAM"), eqs. 5-6 and section 3."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._state import START, State, check_initial
from .sequences import Steps


class SparseState(
    NamedTuple(
        "SparseState",
        [
            ("memory", Tensor),
            ("read_slots", Tensor),
            ("read_weights", Tensor),
            ("last_access", Tensor),
            ("clock", Tensor),
        ],
    ),
    State,
):
    """What a sparse memory carries from one step to the next.

    memory: [B, N, D], the slots, float32 or float64; read_slots: int64 [B, R, K], the K different slots that each head read
    last, the most similar first; read_weights: [B, R, K], of memory's dtype, with what weights; last_access: int64 [B, N], the
    clock when each slot was last accessed, -1 for never; clock: int64 [B], the number of steps taken. The integers carry no
    gradient.
    """

    __slots__ = ()

    @classmethod
    def initial(
        cls,
        batch: int,
        num_slots: int,
        slot_size: int,
        num_heads: int,
        num_reads: int,
        *,
        value: float = START,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> SparseState:
        """The state at the start of a sequence: every slot filled with ``value``, slot 0 alone read and accessed, at time 0.

        Args:
            batch, num_slots, slot_size, num_heads, num_reads: B, N, D, R and K; B may be 0, R and K at most N.
            value: a number.
            dtype: float32 or float64; by default torch's.

        Raises:
            TypeError, ValueError: an argument of the wrong type or value.
        """
        dtype = torch.get_default_dtype() if dtype is None else dtype
        check_initial(
            "sparse",
            value,
            dtype,
            batch=(batch, 0),
            num_slots=(num_slots, 1),
            slot_size=(slot_size, 1),
            num_heads=(num_heads, 1),
            num_reads=(num_reads, 1),
        )
        for name, size in (("num_heads", num_heads), ("num_reads", num_reads)):
            if size > num_slots:
                raise ValueError(f"{name} must be at most num_slots = {num_slots}, got {size}")
        memory = torch.full((batch, num_slots, slot_size), value, dtype=dtype, device=device)
        read_slots = torch.arange(num_reads, device=device).repeat(batch, num_heads, 1)
        read_weights = torch.zeros(batch, num_heads, num_reads, dtype=dtype, device=device)
        read_weights[:, :, 0] = 1
        last_access = torch.full((batch, num_slots), -1, dtype=torch.int64, device=device)
        last_access[:, 0] = 0
        return cls(memory, read_slots, read_weights, last_access, last_access.new_zeros(batch))

    def initial_like(self) -> SparseState:
        """The start of a sequence of one sample, with the sizes, dtype and device of this state, which may lack the axis B."""
        (slots, size), (heads, reads), memory = (
            self.memory.shape[-2:],
            self.read_slots.shape[-2:],
            self.memory,
        )
        return self.initial(1, slots, size, heads, reads, dtype=memory.dtype, device=memory.device)


def rows_of(memory: Tensor, slots: Tensor) -> Tensor:
    """The rows [B, R, K, D] of slots [B, R, K]."""
    places = slots.flatten(1).unsqueeze(2).expand(-1, -1, memory.shape[2])
    return memory.gather(1, places).unflatten(1, slots.shape[1:])


def cosine_of(rows: Tensor, key: Tensor, eps: float) -> Tensor:
    """Of rows [B, R or 1, K, D] with keys [B, R, D]: [B, R, K]. Summed over D in one order, as content.similarity is."""
    dot = (key.unsqueeze(2) * rows).sum(-1)
    norms = (key * key).sum(-1).unsqueeze(2) * (rows * rows).sum(-1)
    return dot / torch.sqrt(norms + eps)


def _read(
    memory: Tensor, key: Tensor, sharpness: Tensor | None, num_reads: int, eps: float, slots: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Read, slots and weights, in memory's dtype."""
    if slots is None:  # a constant: nothing is kept of the slots that are not read
        every = cosine_of(memory.detach().unsqueeze(1), key.detach(), eps)
        slots = torch.sort(every, dim=2, descending=True, stable=True).indices[:, :, :num_reads].contiguous()
    read, weights = read_rows(rows_of(memory, slots), key, sharpness, eps)
    return read, slots, weights


def read_rows(rows: Tensor, key: Tensor, sharpness: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """What each head reads of rows [B, R, K, D], and with what weights [B, R, K]."""
    cosine = cosine_of(rows, key, eps)
    weights = torch.softmax(cosine if sharpness is None else sharpness.unsqueeze(2) * cosine, dim=2)
    return (weights.unsqueeze(3) * rows).sum(2), weights


def sparse_read(
    memory: Tensor,
    key: Tensor,
    sharpness: Tensor | None = None,
    *,
    num_reads: int,
    eps: float = 1e-6,
    slots: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`mann_fast.ops.sparse_read`. ``slots`` [B, R, K]: those to read, in place of the choice."""
    wide = [None if x is None else x.to(memory.dtype) for x in (key, sharpness)]
    read, slots, weights = _read(memory, wide[0], wide[1], num_reads, eps, slots)  # type: ignore[arg-type]
    return read.to(key.dtype), slots, weights


def sparse_writes(
    state: SparseState,
    gate_logit: Tensor,
    write_gate_logit: Tensor | None,
    oldest: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Where each head writes, [B, R, K + 1], and with what weights (eq. 5): the K slots that it read at the step before, and
    last its oldest, which may be one of them; then both weights count. Gates are of the memory's dtype."""
    if oldest is None:
        oldest = torch.sort(state.last_access, dim=1, stable=True).indices[:, : gate_logit.shape[1]]
    gate = gate_logit.unsqueeze(2)
    weights = torch.cat([torch.sigmoid(gate) * state.read_weights, torch.sigmoid(-gate)], 2)
    if write_gate_logit is not None:
        weights = torch.sigmoid(write_gate_logit).unsqueeze(2) * weights
    return torch.cat([state.read_slots, oldest.unsqueeze(2)], 2), weights


def written(memory: Tensor, write_slots: Tensor, write_weights: Tensor, vector: Tensor) -> Tensor:
    """The memory after the write of :func:`sparse_writes`, each head's last slot erased before."""
    # By scattering rows, not weights over all slots, which a vector that is not finite would reach; and not in place.
    oldest = write_slots[:, :, -1]
    memory = memory.scatter(1, oldest.unsqueeze(2).expand(-1, -1, memory.shape[2]), 0.0)
    for head in range(vector.shape[1]):
        rows = write_weights[:, head, :, None] * vector[:, head, None, :]
        memory = memory.scatter_add(1, write_slots[:, head, :, None].expand_as(rows), rows)
    return memory


def accessed(
    last_access: Tensor, write_slots: Tensor, write_weights: Tensor, read_slots: Tensor, read_weights: Tensor
) -> Tensor:
    """Write and read weights of every slot, summed over the heads in this order, so that every backend rounds alike. Slots are
    those of last_access [B, N]."""
    none = torch.zeros_like(last_access, dtype=read_weights.dtype)
    total = none
    for head in range(read_slots.shape[1]):
        write = none.scatter_add(1, write_slots[:, head], write_weights[:, head].detach())
        total = total + write.scatter_add(1, read_slots[:, head], read_weights[:, head].detach())
    return total


def sparse_step(
    state: SparseState,
    key: Tensor,
    write_vector: Tensor,
    gate_logit: Tensor,
    sharpness: Tensor | None = None,
    write_gate_logit: Tensor | None = None,
    *,
    threshold: float = 0.005,
    eps: float = 1e-6,
    slots: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, SparseState]:
    """See :func:`mann_fast.ops.sparse_step`. ``slots``: oldest [B, R] and read slots [B, R, K], in place of the choices."""
    memory, last_slots, _, last_access, clock = state
    dtype = memory.dtype
    vector, gate = write_vector.to(dtype), gate_logit.to(dtype)
    write_gate = None if write_gate_logit is None else write_gate_logit.to(dtype)
    oldest, read_slots = slots or (None, None)
    write_slots, write_weights = sparse_writes(state, gate, write_gate, oldest)
    memory = written(memory, write_slots, write_weights, vector)
    beta = None if sharpness is None else sharpness.to(dtype)
    read, read_slots, weights = _read(memory, key.to(dtype), beta, last_slots.shape[2], eps, read_slots)

    total = accessed(last_access, write_slots, write_weights, read_slots, weights)
    clock = clock + 1
    last_access = torch.where(total > threshold, clock.unsqueeze(1), last_access)
    return read.to(key.dtype), SparseState(memory, read_slots, weights, last_access, clock)


def sparse_scan(
    state: SparseState,
    keys: Tensor,
    write_vectors: Tensor,
    gate_logits: Tensor,
    sharpness: Tensor | None = None,
    write_gate_logits: Tensor | None = None,
    *,
    threshold: float = 0.005,
    eps: float = 1e-6,
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    slots: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, SparseState]:
    """See :func:`mann_fast.ops.sparse_scan`. ``slots``: oldest [T, B, R] and read slots [T, B, R, K] to replay."""
    if keys.shape[0] == 0:
        return keys.clone(), state.clone()
    sequences = Steps(resets, lengths, start)
    reads: list[Tensor] = []
    for t in range(keys.shape[0]):
        given = (keys, write_vectors, gate_logits, sharpness, write_gate_logits)
        before = state
        read, state = sparse_step(
            sequences.begin(t, before),
            *sequences.inputs(t, *(None if x is None else x[t] for x in given)),
            threshold=threshold,
            eps=eps,
            slots=None if slots is None else (slots[0][t], slots[1][t]),
        )
        state = SparseState(*sequences.end(t, state, before))
        reads += sequences.outputs(t, read)
    return torch.stack(reads), state
