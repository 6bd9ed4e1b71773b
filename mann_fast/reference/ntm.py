"""Neural Turing Machine addressing, and its erase-and-add write (Graves et al. 2014, arXiv 1410.5401, eqs. 2-9)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._state import START, State, check_initial
from .content import similarity
from .sequences import Steps


class NTMHead(NamedTuple):
    """What R heads, or W that write, address a memory with, squashed already; for a scan each with a leading T.

    key [B, R, D]; sharpness [B, R], the factor on the similarity; gate [B, R] in [0, 1], the share of content addressing;
    shift [B, R, 2S + 1], a distribution over moves by -S to S slots; sharpening [B, R], at least 1.
    """

    key: Tensor
    sharpness: Tensor
    gate: Tensor
    shift: Tensor
    sharpening: Tensor


class NTMState(
    NamedTuple("NTMState", [("memory", Tensor), ("read_weights", Tensor), ("write_weights", Tensor)]), State
):
    """memory [B, N, D], read_weights [B, R, N], write_weights [B, W, N]: where each head was last."""

    __slots__ = ()

    @classmethod
    def initial(
        cls,
        batch: int,
        num_slots: int,
        slot_size: int,
        read_heads: int,
        write_heads: int,
        *,
        value: float = START,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> NTMState:
        """The start of a sequence: every number of the memory is ``value``, every head is at slot 0.

        Args:
            batch, num_slots, slot_size, read_heads, write_heads: B, N, D, R and W; B, R and W may be 0.
            value: a number.
            dtype: float32 or float64; by default torch's.

        Raises:
            TypeError, ValueError: an argument of the wrong type or value.
        """
        dtype = torch.get_default_dtype() if dtype is None else dtype
        check_initial(
            "NTM",
            value,
            dtype,
            batch=(batch, 0),
            num_slots=(num_slots, 1),
            slot_size=(slot_size, 1),
            read_heads=(read_heads, 0),
            write_heads=(write_heads, 0),
        )
        memory = torch.full((batch, num_slots, slot_size), value, dtype=dtype, device=device)
        weights = [memory.new_zeros(batch, heads, num_slots) for heads in (read_heads, write_heads)]
        for rows in weights:
            rows[..., 0] = 1
        return cls(memory, *weights)

    def initial_like(self) -> NTMState:
        """The start of a sequence of one sample, with the sizes, dtype and device of this state, which may lack the axis B."""
        memory, (slots, size) = self.memory, self.memory.shape[-2:]
        heads = self.read_weights.shape[-2], self.write_weights.shape[-2]
        return self.initial(1, slots, size, *heads, dtype=memory.dtype, device=memory.device)


def ntm_address(memory: Tensor, head: NTMHead, previous: Tensor, *, eps: float = 1e-6) -> Tensor:
    """See :func:`mann_fast.ops.ntm_address`."""
    key, sharpness, gate, shift, sharpening = (x.to(memory.dtype) for x in head)
    by_content = torch.softmax(similarity(memory, key, sharpness, eps), dim=-1)  # eq. 5
    gate = gate.unsqueeze(2)
    gated = gate * by_content + (1 - gate) * previous  # eq. 7
    reach = shift.shape[2] // 2
    shifted = torch.zeros_like(gated)
    for j in range(-reach, reach + 1):
        shifted = shifted + shift[:, :, j + reach, None] * gated.roll(j, dims=2)  # eq. 8
    # The greatest is taken out, which changes nothing but that no power of it underflows.
    relative = shifted / shifted.detach().amax(2, keepdim=True)
    powers = relative ** sharpening.unsqueeze(2)  # eq. 9
    return powers / powers.sum(2, keepdim=True)


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
    """See :func:`mann_fast.ops.ntm_step`."""
    memory, read_weights, write_weights = state
    write_weights = ntm_address(memory, write_head, write_weights, eps=eps)
    wide_erase, wide_add = erase.to(memory.dtype), add.to(memory.dtype)
    remaining = (1 - write_weights.unsqueeze(3) * wide_erase.unsqueeze(2)).prod(1)  # eq. 3
    written = memory * remaining + (write_weights.unsqueeze(3) * wide_add.unsqueeze(2)).sum(1)  # eq. 4
    addressed = memory if order == "read_first" else written
    read_weights = ntm_address(addressed, read_head, read_weights, eps=eps)
    read = (read_weights @ addressed).to(erase.dtype)  # eq. 2
    return read, NTMState(written, read_weights, write_weights)


def ntm_scan(
    state: NTMState,
    read_head: NTMHead,
    write_head: NTMHead,
    erase: Tensor,
    add: Tensor,
    *,
    order: str = "read_first",
    eps: float = 1e-6,
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, NTMState]:
    """See :func:`mann_fast.ops.ntm_scan`."""
    if erase.shape[0] == 0:
        return read_head[0].clone(), NTMState(*(x.clone() for x in state))
    sequences = Steps(resets, lengths, start)
    reads: list[Tensor] = []
    for t in range(erase.shape[0]):
        reading, writing = (
            NTMHead(*sequences.inputs(t, *(x[t] for x in head))) for head in (read_head, write_head)
        )
        before = state
        written = sequences.inputs(t, erase[t], add[t])
        read, state = ntm_step(sequences.begin(t, before), reading, writing, *written, order=order, eps=eps)
        state = NTMState(*sequences.end(t, state, before))
        reads += sequences.outputs(t, read)
    return torch.stack(reads), state
