"""What the loops of steps share, which take a memory too large for one program. A step is launched for all samples, so one that
has ended takes part all the same, as reference.sequences.Steps has it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.ntm import NTMState
from ..reference.sequences import Steps, where


def product(a: Tensor, b: Tensor) -> Tensor:
    """A batched product in the dtype of its factors, whatever autocast the caller is in."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.bmm(a, b)


def anchored_memory(anchor: Tensor, memory: Tensor) -> Tensor:
    """The part of an anchor [B, rows, padded N] that holds the memory, a view of the shape of ``memory`` [B, N, D]."""
    return anchor.flatten(1)[:, : memory[0].numel()].unflatten(1, memory.shape[1:])


def begin(sequences: Steps, t: int, memory: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The memory and the weights that step t takes. Heads of all kinds begin alike, so that they may come as of one."""
    memory, weights, _ = sequences.begin(t, NTMState(memory, weights, weights[:, :0]))
    return memory, weights


def begin_backward(
    sequences: Steps,
    t: int,
    memory: Tensor,
    weights: Tensor,
    after: tuple[Tensor, Tensor],
    grad_start: Tensor,
) -> tuple[Tensor, Tensor]:
    """From the gradients of the memory and the weights that step t took, and of those ``after`` it, to those of what came to
    it. Adds the memory's to ``grad_start`` where a sample began anew."""
    if sequences.resets is not None:
        reset = sequences.resets[t]
        grad_start += sequences.outputs(t, where(reset, memory, 0))[0]
        memory, weights = where(~reset, memory, 0), where(~reset, weights, 0)
    memory, weights = sequences.end(t, (memory, weights), after)
    return memory, weights
