"""Least recently used access (LRUA) of Santoro et al. 2016 (arXiv 1605.06065), eqs. 2-8."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._onnx import exporting
from .._state import START, State, check_initial
from .content import similarity
from .sequences import Steps


class LRUAState(
    NamedTuple("LRUAState", [("memory", Tensor), ("read_weights", Tensor), ("usage", Tensor)]), State
):
    """What an LRUA memory carries from one step to the next.

    memory: [B, N, D], the slots; read_weights: [B, R, N], where each head read last; usage: [B, N], the decayed count of
    reads and writes per slot, which carries no gradient. float32 or float64, all of one dtype.
    """

    __slots__ = ()

    @classmethod
    def initial(
        cls,
        batch: int,
        num_slots: int,
        slot_size: int,
        num_heads: int,
        *,
        value: float = START,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> LRUAState:
        """The state at the start of a sequence: every slot filled with ``value``, weights and usage one-hot at slot 0.

        Args:
            batch, num_slots, slot_size, num_heads: B, N, D and R; B may be 0, and R at most N.
            value: a number.
            dtype: float32 or float64; by default torch's.

        Raises:
            TypeError, ValueError: an argument of the wrong type or value.
        """
        dtype = torch.get_default_dtype() if dtype is None else dtype
        check_initial(
            "LRUA",
            value,
            dtype,
            batch=(batch, 0),
            num_slots=(num_slots, 1),
            slot_size=(slot_size, 1),
            num_heads=(num_heads, 1),
        )
        if num_heads > num_slots:
            raise ValueError(f"num_heads must be at most num_slots = {num_slots}, got {num_heads}")
        memory = torch.full((batch, num_slots, slot_size), value, dtype=dtype, device=device)
        read_weights = torch.zeros(batch, num_heads, num_slots, dtype=dtype, device=device)
        read_weights[:, :, 0] = 1
        usage = torch.zeros(batch, num_slots, dtype=dtype, device=device)
        usage[:, 0] = 1
        return cls(memory, read_weights, usage)

    def initial_like(self) -> LRUAState:
        """The start of a sequence of one sample, with the sizes, dtype and device of this state, which may lack the axis B."""
        heads, num_slots = self.read_weights.shape[-2:]
        memory = self.memory
        return self.initial(1, num_slots, memory.shape[-1], heads, dtype=memory.dtype, device=memory.device)


def least_used(usage: Tensor, n: int) -> Tensor:
    """See :func:`mann_fast.ops.least_used`."""
    if exporting():  # ONNX has no stable sort, but its TopK gives the lower of equal slots first
        return torch.topk(usage.detach(), n, largest=False).indices
    return torch.sort(usage.detach(), dim=-1, stable=True).indices[:, :n].contiguous()


def write_slots(
    memory: Tensor,
    read_weights: Tensor,
    slots: Tensor,
    write_vector: Tensor,
    gate_logit: Tensor,
    write_target: str,
) -> tuple[Tensor, Tensor]:
    """Write weights, erase of the least used slot, add (eqs. 6-8)."""
    heads, num_slots = read_weights.shape[1:]
    # By comparison, not by scattering in place: so torch.func's transforms can follow.
    chosen = slots.unsqueeze(2) == torch.arange(num_slots, device=slots.device)
    target = chosen
    if (
        write_target == "shared"
    ):  # every head gets all R least used slots (the paper's w_lu, eq. 6), not the r-th of them
        target = chosen.any(1, keepdim=True)
    gate = gate_logit.unsqueeze(2)
    write_weights = torch.sigmoid(gate) * read_weights + torch.sigmoid(-gate) * target  # eq. 7
    memory = torch.where(chosen[:, 0].unsqueeze(2), 0, memory)
    for head in range(heads):  # eq. 8; one head after the other, so that equal slots get equal bits
        memory = memory + write_weights[:, head, :, None] * write_vector[:, head, None, :]
    return memory, write_weights


def lrua_write(
    memory: Tensor,
    read_weights: Tensor,
    usage: Tensor,
    write_vector: Tensor,
    gate_logit: Tensor,
    *,
    write_target: str = "per_head",
) -> tuple[Tensor, Tensor]:
    """See :func:`mann_fast.ops.lrua_write`."""
    slots = least_used(usage, read_weights.shape[1])
    dtype = memory.dtype
    return write_slots(
        memory, read_weights, slots, write_vector.to(dtype), gate_logit.to(dtype), write_target
    )


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
    slots: Tensor | None = None,
) -> tuple[Tensor, LRUAState]:
    """See :func:`mann_fast.ops.lrua_step`. ``slots`` [B, R] replaces the choice of the least used slots."""
    memory, read_weights, usage = state
    dtype = memory.dtype
    wide_key, write_vector, gate_logit = key.to(dtype), write_vector.to(dtype), gate_logit.to(dtype)
    sharpness = None if sharpness is None else sharpness.to(dtype)
    if slots is None:
        slots = least_used(usage, key.shape[1])
    written, write_weights = write_slots(memory, read_weights, slots, write_vector, gate_logit, write_target)
    addressed = written if order == "write_first" else memory
    weights = torch.softmax(similarity(addressed, wide_key, sharpness, eps), dim=-1)  # eqs. 2-3
    read = (weights @ written).to(key.dtype)  # eq. 4
    touched = weights.detach() + write_weights.detach()
    usage = usage_decay * usage.detach()
    total = touched[:, 0]
    for head in range(1, key.shape[1]):  # heads in this order, so that every backend rounds alike
        total = total + touched[:, head]
    return read, LRUAState(written, weights, usage + total)  # eq. 5


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
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    slots: Tensor | None = None,
) -> tuple[Tensor, LRUAState]:
    """See :func:`mann_fast.ops.lrua_scan`. ``slots`` [T, B, R] replays given choices of the least used slots."""
    if keys.shape[0] == 0:
        memory, read_weights, usage = state
        return keys.clone(), LRUAState(memory.clone(), read_weights.clone(), usage.detach().clone())
    sequences = Steps(resets, lengths, start)
    reads: list[Tensor] = []
    for t in range(keys.shape[0]):
        inputs = (keys[t], write_vectors[t], gate_logits[t], None if sharpness is None else sharpness[t])
        before = state
        read, state = lrua_step(
            sequences.begin(t, before),
            *sequences.inputs(t, *inputs),
            order=order,
            write_target=write_target,
            usage_decay=usage_decay,
            eps=eps,
            slots=None if slots is None else slots[t],
        )
        state = LRUAState(*sequences.end(t, state, before))
        reads += sequences.outputs(t, read)
    return torch.stack(reads), state
