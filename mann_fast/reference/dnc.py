"""The Differentiable Neural Computer's memory (Graves et al. 2016, Nature 538, 471; "G"), with the three repairs of Csordas and
Schmidhuber 2019 (arXiv 1904.10278; "C"): masks, de-allocation, sharpened links."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._state import State, check_initial
from .sequences import Steps

LINK_FLOOR = 1e-6  # C adds it to a direction before it is sharpened


class DNCInterface(NamedTuple):
    """What one step is told, squashed already; for a scan each with a leading T.

    read_keys [B, R, D], write_key [B, D]: what is looked for; read_sharpness [B, R], write_sharpness [B]: factors on the
    similarity, at least 1. erase [B, D] in [0, 1] and write_vector [B, D]. free_gates [B, R] in [0, 1]: how much of what each
    head read last is given free. allocation_gate [B] in [0, 1]: the share of allocation in the write, the rest goes by content;
    write_gate [B] in [0, 1]. read_modes [B, R, 3], each sums to 1: backward, content, forward; None without links.
    read_masks [B, R, D], write_mask [B, D] in [0, 1]: which numbers of a slot are compared (C); both or neither.
    link_sharpening [B, R, 2], at least 1: exponent of backward and of forward (C); None without links or to leave them.
    """

    read_keys: Tensor
    read_sharpness: Tensor
    write_key: Tensor
    write_sharpness: Tensor
    erase: Tensor
    write_vector: Tensor
    free_gates: Tensor
    allocation_gate: Tensor
    write_gate: Tensor
    read_modes: Tensor | None = None
    read_masks: Tensor | None = None
    write_mask: Tensor | None = None
    link_sharpening: Tensor | None = None


class DNCState(
    NamedTuple(
        "DNCState",
        [
            ("memory", Tensor),
            ("usage", Tensor),
            ("precedence", Tensor | None),
            ("links", Tensor | None),
            ("read_weights", Tensor),
            ("write_weights", Tensor),
        ],
    ),
    State,
):
    """memory [B, N, D]; usage [B, N], how much of each slot is taken; precedence [B, N], how much it was the last one written;
    links [B, N, N], near 1 at [i, j] where j was written and i next, both None without links; read_weights [B, R, N] and
    write_weights [B, N]: where the heads were last."""

    __slots__ = ()

    @classmethod
    def initial(
        cls,
        batch: int,
        num_slots: int,
        slot_size: int,
        read_heads: int,
        *,
        link: bool = True,
        value: float = 0.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> DNCState:
        """The start of a sequence: every number of the memory is ``value``, everything else is 0.

        Args:
            batch, num_slots, slot_size, read_heads: B, N, D and R; B may be 0.
            link: whether there are links and precedence, N^2 + N numbers a sample.
            value: a number.
            dtype: float32 or float64; by default torch's.

        Raises:
            TypeError, ValueError: an argument of the wrong type or value.
        """
        dtype = torch.get_default_dtype() if dtype is None else dtype
        sizes = {"num_slots": num_slots, "slot_size": slot_size, "read_heads": read_heads}
        least = {name: (size, 1) for name, size in sizes.items()}
        check_initial("DNC", value, dtype, batch=(batch, 0), **least)
        if not isinstance(link, bool):
            raise TypeError(f"link must be a bool, got {type(link).__name__}")
        memory = torch.full((batch, num_slots, slot_size), value, dtype=dtype, device=device)
        rows = memory.new_zeros(batch, num_slots)
        links = memory.new_zeros(batch, num_slots, num_slots) if link else None
        precedence = rows.clone() if link else None
        read_weights = memory.new_zeros(batch, read_heads, num_slots)
        return cls(memory, rows, precedence, links, read_weights, rows.clone())

    def initial_like(self) -> DNCState:
        """The start of a sequence of one sample, with the sizes, dtype and device of this state, which may lack the axis B."""
        memory, (slots, size), heads = self.memory, self.memory.shape[-2:], self.read_weights.shape[-2]
        link = self.links is not None
        return self.initial(1, slots, size, heads, link=link, dtype=memory.dtype, device=memory.device)


def allocation(usage: Tensor, order: Tensor) -> Tensor:
    """G: ``a[order[n]] = (1 - usage[order[n]]) * prod over m < n of usage[order[m]]``; usage [B, N], order int64 [B, N]."""
    ordered = usage.gather(1, order)
    before = torch.cat([torch.ones_like(ordered[:, :1]), ordered[:, :-1].cumprod(1)], 1)
    return ((1 - ordered) * before).gather(1, order.argsort(1))


def _by_content(memory: Tensor, keys: Tensor, sharpness: Tensor, masks: Tensor | None, eps: float) -> Tensor:
    """Weights [B, R, N]; with masks q the cosine is of key * q and slot * q (C)."""
    slots, keys = memory.unsqueeze(1), keys.unsqueeze(2)
    if masks is not None:
        slots, keys = slots * masks.unsqueeze(2), keys * masks.unsqueeze(2)
    dot, norms = (keys * slots).sum(-1), (keys * keys).sum(-1) * (slots * slots).sum(-1)
    return torch.softmax(sharpness.unsqueeze(2) * (dot / torch.sqrt(norms + eps)), -1)


def _sharpened(direction: Tensor, exponent: Tensor) -> Tensor:
    """C: a direction [B, R, N] to the power exponent [B, R], in shares. In logarithms: so no power underflows to nothing."""
    logs = torch.log(direction + LINK_FLOOR)
    logs = logs - logs.detach().amax(2, keepdim=True)
    powers = torch.exp(exponent.unsqueeze(2) * logs)
    return powers / powers.sum(2, keepdim=True)


def dnc_step(
    state: DNCState,
    interface: DNCInterface,
    *,
    deallocate: bool = False,
    eps: float = 1e-6,
    orders: Tensor | None = None,
) -> tuple[Tensor, DNCState]:
    """See :func:`mann_fast.ops.dnc_step`. orders: int64 [B, N], the slots by usage, to replay another's order."""
    memory, usage, precedence, links, read_weights, written = state
    wide: list[Any] = [x if x is None else x.to(memory.dtype) for x in interface]
    told = DNCInterface(*wide)
    retained = (1 - told.free_gates.unsqueeze(2) * read_weights).prod(1)
    usage = (usage + (1 - usage) * written.detach()) * retained
    if orders is None:
        orders = torch.sort(usage.detach(), dim=1, stable=True)[1]
    write_mask = None if told.write_mask is None else told.write_mask.unsqueeze(1)
    key, sharpness = told.write_key.unsqueeze(1), told.write_sharpness.unsqueeze(1)
    by_content = _by_content(memory, key, sharpness, write_mask, eps).squeeze(1)
    gate = told.allocation_gate.unsqueeze(1)
    mixed = gate * allocation(usage, orders) + (1 - gate) * by_content
    write_weights = told.write_gate.unsqueeze(1) * mixed
    rows = write_weights.unsqueeze(2)
    kept = memory * (1 - rows * told.erase.unsqueeze(1))
    if deallocate:
        kept = kept * retained.unsqueeze(2)
    memory = kept + rows * told.write_vector.unsqueeze(1)
    content = _by_content(memory, told.read_keys, told.read_sharpness, told.read_masks, eps)
    if links is None or precedence is None or told.read_modes is None:
        read_weights = content
    else:
        columns = write_weights.unsqueeze(1)
        links = (1 - rows - columns) * links + rows * precedence.unsqueeze(1)
        diagonal = torch.eye(links.shape[1], dtype=torch.bool, device=links.device)
        links = links.masked_fill(diagonal, 0)
        precedence = (1 - write_weights.sum(1, keepdim=True)) * precedence + write_weights
        forward, backward = read_weights @ links.transpose(1, 2), read_weights @ links
        if told.link_sharpening is not None:
            backward = _sharpened(backward, told.link_sharpening[:, :, 0])
            forward = _sharpened(forward, told.link_sharpening[:, :, 1])
        modes = told.read_modes.unsqueeze(3)
        read_weights = modes[:, :, 0] * backward + modes[:, :, 1] * content + modes[:, :, 2] * forward
    reads = (read_weights @ memory).to(interface.read_keys.dtype)
    return reads, DNCState(memory, usage, precedence, links, read_weights, write_weights)


def dnc_scan(
    state: DNCState,
    interface: DNCInterface,
    *,
    deallocate: bool = False,
    eps: float = 1e-6,
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    orders: Tensor | None = None,
) -> tuple[Tensor, DNCState]:
    """See :func:`mann_fast.ops.dnc_scan`. orders: int64 [T, B, N], the order of each step, to replay another's."""
    steps = interface.read_keys.shape[0]
    if steps == 0:
        return interface.read_keys.clone(), state.clone()
    sequences = Steps(resets, lengths, start)
    reads: list[Tensor] = []
    for t in range(steps):
        now: list[Any] = [x if x is None else x[t] for x in interface]
        told = DNCInterface(*sequences.inputs(t, *now))
        before, order = state, None if orders is None else orders[t]
        begun = sequences.begin(t, before)
        read, state = dnc_step(begun, told, deallocate=deallocate, eps=eps, orders=order)
        state = DNCState(*sequences.end(t, state, before))
        reads += sequences.outputs(t, read)
    return torch.stack(reads), state
