"""A whole sequence of a network with a Neural Turing Machine's memory in one call: controller, heads and memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._anchors import ntm_interval
from ..reference.cell import ntm_head_sizes
from ..reference.ntm import NTMState
from . import _backend, _checks
from ._cell import Network, Public, declare_cell, fused, run_cell, run_steps
from ._declare import Argument, Option, Output, Sizes
from ._sequences import raw_sequences
from .content import EPS, MEMORY
from .lrua import ORDERS, READ_FIRST
from .ntm import ntm_step

# Weights are those of the heads that read, then of as many that write. max_shift: -1 where heads go by content alone.
NTM_CELL = declare_cell(
    "ntm_cell",
    (MEMORY, Argument("weights", "B 2R N", like="memory", within="shares")),
    (Option("max_shift", "int", 1), READ_FIRST, EPS),
    (
        Output("history", "T B 2R N", like="gates", kept=True),
        Output("anchors", "A B D P", like="gates", kept=True),
    ),
    interval=lambda values, backend: ntm_interval(values[3].shape[2], values[4].shape[1]),
    extents=lambda sizes: {"R": sizes["2R"] // 2},  # backward takes no reads, whose axis it is
)
PUBLIC = Public(
    NTMState,
    (
        MEMORY,
        Argument("read_weights", "B R N", like="memory"),
        Argument("write_weights", "B R N", like="memory"),
    ),
)


def ntm_cell(
    gates: Tensor,
    state: tuple[Tensor, ...],
    memory: NTMState,
    reads: Tensor,
    hidden_weight: Tensor | None,
    hidden_bias: Tensor | None,
    reads_weight: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    *,
    controller: str = "lstm",
    max_shift: int | None = 1,
    order: str = "read_first",
    eps: float = 1e-6,
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...], NTMState, Tensor]:
    """As :func:`cell`, with the memory of a Neural Turing Machine (Graves et al. 2014, arXiv 1410.5401): R heads that read and
    R that write.

    The heads' values are, of the read heads and then of the write heads, keys (R D, through tanh), sharpness (R, 1 +
    softplus), gates (R, sigmoid), shifts (R (2S + 1), softmax) and sharpening (R, 1 + softplus); then erase (R D, sigmoid)
    and add (R D, tanh). Then comes :func:`ntm_step`. One call per direction in C++ on the CPU, and one launch in CUDA C++ (see
    docs/gpu.md) where there is room; elsewhere a loop of steps.

    Args:
        gates, state, reads, hidden_weight, hidden_bias, reads_weight, head_weight, head_bias, controller: as of :func:`cell`.
        memory: NTMState of [B, N, D], [B, R, N] and [B, R, N].
        max_shift: S, at least 0; None for heads that go by content alone, without gates, shifts and sharpening.
        order, eps: see :func:`ntm_step`.
        resets, lengths, start: as of :func:`cell`.

    Returns:
        output [T, B, H + R D], the controller's state, the NTMState and the reads [B, R, D]. Differentiable once.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or value; RuntimeError: tensors on different devices.
    """
    network = Network(gates, state, reads, hidden_weight, hidden_bias, reads_weight, head_weight, head_bias)
    options = (controller, max_shift, order, eps)
    sizes = PUBLIC.check(network, memory, (resets, lengths, start), options, _head_sizes)
    sequences = raw_sequences(memory[0], gates.shape[0], resets, lengths, start)
    backend = _backend.serving(gates.device, NTM_CELL)
    shifts = 0 if max_shift is None else 2 * max_shift + 1
    if gates.shape[0] == 0 or not fused(NTM_CELL, backend, gates, sizes, controller, shifts):
        named = {"controller": controller, "max_shift": max_shift, "order": order, "eps": eps}
        return run_steps(reference.ntm_cell, network, NTMState(*memory), sequences, named, ntm_step)
    slots, read_weights, write_weights = memory
    of_heads = torch.cat([read_weights, write_weights], dim=1)
    raw = (-1 if max_shift is None else max_shift, order == "read_first", float(eps))
    output, last, (slots, of_heads), reads = run_cell(
        NTM_CELL, backend, network, (slots, of_heads), sequences, controller, raw
    )
    # Copies: no two tensors of a state share their storage.
    parts = (x.clone() for x in of_heads.chunk(2, dim=1))
    return output, last, NTMState(slots, *parts), reads


def check_max_shift(max_shift: Any) -> None:
    """An int of at least 0."""
    if isinstance(max_shift, bool) or not isinstance(max_shift, int):
        raise TypeError(f"max_shift must be an int, got {type(max_shift).__name__}")
    if max_shift < 0:
        raise ValueError(f"max_shift must be at least 0, got {max_shift}")


def _head_sizes(sizes: Sizes, max_shift: Any, order: Any, eps: Any) -> list[int]:
    if max_shift is not None:
        check_max_shift(max_shift)
    _checks.check_choice("order", order, ORDERS)
    _checks.check_eps(eps)
    return ntm_head_sizes(sizes["R"], sizes["D"], max_shift)
