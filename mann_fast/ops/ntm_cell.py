"""A whole sequence of a network with a Neural Turing Machine's memory in one call: controller, heads and memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .. import reference
from .._anchors import ntm_interval
from .._state import check_size
from ..reference.cell import ntm_head_sizes
from ..reference.ntm import NTMState
from ._cell import Cell, Network, declare_cell
from ._declare import Argument, Option, Output
from .content import EPS, MEMORY
from .lrua import READ_FIRST
from .ntm import NTM, ntm_step


def _max_shift(name: str, value: Any, known: Mapping[str, Any]) -> int:
    if value is None:
        return -1
    check_size(name, value, 0)
    return int(value)


# Weights are those of the heads that read, then of as many that write. max_shift: -1 where heads go by content alone.
NTM_CELL = declare_cell(
    "ntm_cell",
    (MEMORY, Argument("weights", "B 2R N", like="memory", within="shares")),
    (Option("max_shift", "int", 1, _max_shift), READ_FIRST, EPS),
    (
        Output("history", "T B 2R N", like="gates", kept=True),
        Output("anchors", "A B D P", like="gates", kept=True),
    ),
    interval=lambda values, backend: ntm_interval(values[3].shape[1], values[3].shape[2], values[4].shape[1]),
    extents=lambda sizes: {"R": sizes["2R"] // 2},  # backward takes no reads, whose axis it is
    choices="int shifts",  # 0 of heads that go by content alone
)


NETWORK = Cell(
    NTM_CELL,
    NTM,
    reference.ntm_cell,
    ntm_step,
    lambda sizes, of: ntm_head_sizes(sizes["R"], sizes["D"], of["max_shift"]),
    lambda options: (max(0, 2 * options["max_shift"] + 1),),
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
    sequences = (resets, lengths, start)
    options = {"max_shift": max_shift, "order": order, "eps": eps}
    return NETWORK.run(network, memory, sequences, controller, options)
