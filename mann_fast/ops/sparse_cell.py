"""A whole sequence of a network with a sparse memory in one call: controller, heads and memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .. import reference
from ..reference.cell import SHARPNESS_MIN, SHARPNESS_SCALE, sparse_head_sizes
from ..reference.sparse import SparseState
from ._cell import Cell, Network, declare_cell
from ._declare import Option, each_step
from .content import EPS
from .sparse import HISTORY, SPARSE, STATE, THRESHOLD, UNSAVED, check_num_reads, sparse_step


def _num_slots(name: str, value: Any, known: Mapping[str, Any]) -> Any:
    check_num_reads("memory", known)
    return known["N"]


# sharpness, sharpness_scale: of what the heads' values become.
SPARSE_CELL = declare_cell(
    "sparse_cell",
    STATE,
    (
        Option("num_slots", "SymInt", 0, _num_slots),
        THRESHOLD,
        EPS,
        Option("sharpness", "float", SHARPNESS_MIN),
        Option("sharpness_scale", "float", SHARPNESS_SCALE),
    ),
    HISTORY,
    interval=each_step,
    extents=lambda sizes: {"N": sizes["num_slots"]},
    unsaved=UNSAVED,
)

NETWORK = Cell(
    SPARSE_CELL,
    SPARSE,
    reference.sparse_cell,
    sparse_step,
    lambda sizes, options: sparse_head_sizes(sizes["R"], sizes["D"]),
)


def sparse_cell(
    gates: Tensor,
    state: tuple[Tensor, ...],
    memory: SparseState,
    reads: Tensor,
    hidden_weight: Tensor | None,
    hidden_bias: Tensor | None,
    reads_weight: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    *,
    controller: str = "lstm",
    threshold: float = 0.005,
    eps: float = 1e-6,
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...], SparseState, Tensor]:
    """As :func:`cell`, with sparse access to a memory of many slots (Rae et al. 2016, arXiv 1610.09027, "SAM").

    The heads' values are, in this order, keys and write vectors (R D each, through tanh), gate logits (R), sharpness (R, 1 + 10
    softplus) and write gate logits (R). Then comes :func:`sparse_step`. In C++ on the CPU it is one call per direction, which
    copies the memory once, and keeps of a step nothing that grows with N; elsewhere a loop of steps, each of which copies it.
    (A layer's call changes it in place with the CUDA kernels, too.)

    Args:
        gates, state, reads, hidden_weight, hidden_bias, reads_weight, head_weight, head_bias, controller: as of :func:`cell`.
        memory: SparseState as of :func:`sparse_step`.
        threshold, eps: see :func:`sparse_step`.
        resets, lengths, start: as of :func:`cell`; a reset takes the memory's state to ``SparseState.initial``, or to
            ``start``, in time that grows with N.

    Returns:
        output [T, B, H + R D], the controller's state, the SparseState and the reads [B, R, D]. Differentiable once in
        everything but the integers; which slots are written and read is a constant.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or value; RuntimeError: tensors on different devices.
    """
    network = Network(gates, state, reads, hidden_weight, hidden_bias, reads_weight, head_weight, head_bias)
    options = {"threshold": threshold, "eps": eps}
    return NETWORK.run(network, memory, (resets, lengths, start), controller, options)
