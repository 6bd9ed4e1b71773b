"""A whole MANN sequence in one call: controller, heads and memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .. import reference
from .._anchors import lrua_interval
from ..reference.cell import SHARPNESS_MIN, SHARPNESS_SCALE, head_sizes
from ..reference.lrua import LRUAState
from . import _checks
from ._cell import Cell, Network, declare_cell
from ._declare import Option, Output
from .content import EPS
from .lrua import LRUA, READ_FIRST, SHARED_TARGET, STATE, USAGE_DECAY, lrua_step

WRITE_VECTORS = ("separate", "key")


def _interval(values: tuple[Any, ...], backend: str) -> int:
    (_, num_slots, slot_size), heads = values[3].shape, values[4].shape[1]
    # In CUDA too: beside the weights there is no room for a replay in shared memory.
    return lrua_interval(num_slots, slot_size, heads)


def _sharpness(name: str, value: Any, known: Mapping[str, Any]) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (value is None or number or (isinstance(value, str) and value == "learned")):
        raise ValueError(f"{name} must be 'learned', a number or None, got {_checks.shown(value)}")
    if number and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value) if number else 1.0 if value is None else SHARPNESS_MIN


# Sharpness is learned where the heads have values for it: then the factor on the similarity is sharpness + sharpness_scale *
# softplus(value), else sharpness.
CELL = declare_cell(
    "cell",
    STATE,
    (
        Option("separate_vector", "bool", True, _checks.choice(WRITE_VECTORS, "separate"), "write_vector"),
        Option("learned_sharpness", "bool", True, lambda name, x, known: isinstance(x, str), "sharpness"),
        Option("sharpness", "float", SHARPNESS_MIN, _sharpness),
        Option("sharpness_scale", "float", SHARPNESS_SCALE),
        *(READ_FIRST, SHARED_TARGET, USAGE_DECAY, EPS),
    ),
    (
        Output("slots", "T B R", like="gates", kept=True, integer=True),
        Output("anchors", "A B D+R P", like="gates", kept=True),
    ),
    interval=_interval,
    extents=lambda sizes: {"D+R": sizes["D"] + sizes["R"]},
    constant=("usage",),
    choices="bool separate_vector, bool learned_sharpness",
)


NETWORK = Cell(
    CELL,
    LRUA,
    reference.cell,
    lrua_step,
    lambda sizes, of: head_sizes(sizes["R"], sizes["D"], of["write_vector"], of["sharpness"]),
    lambda options: (options["separate_vector"], options["learned_sharpness"]),
)


def cell(
    gates: Tensor,
    state: tuple[Tensor, ...],
    memory: LRUAState,
    reads: Tensor,
    hidden_weight: Tensor | None,
    hidden_bias: Tensor | None,
    reads_weight: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    *,
    controller: str = "lstm",
    write_vector: str = "separate",
    sharpness: str | float | None = "learned",
    order: str = "write_first",
    write_target: str = "per_head",
    usage_decay: float = 0.95,
    eps: float = 1e-6,
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...], LRUAState, Tensor]:
    """A whole memory-augmented network's sequence (Santoro et al. 2016, arXiv 1605.06065): controller, heads and memory.

    At every step the controller takes ``gates[t] + reads @ reads_weight.T``, and beside it ``hidden @ hidden_weight.T +
    hidden_bias``; one linear layer on its new hidden state gives key, write vector, gate and sharpness of each head, in this
    order; key and write vector go through tanh; then comes :func:`lrua_step`. In C++ on the CPU it is one call per
    direction for all steps, and in CUDA C++ (see docs/gpu.md) one launch where the weights fit the shared memory of a
    cluster of blocks; elsewhere a loop of steps. In half precision that call computes in float32 and rounds at its ends; in
    bfloat16 the CPU's also rounds what the products of each step take, which a processor with AVX512-BF16 has at twice the
    rate.

    The controller is an LSTM or a GRU as ``torch.nn.LSTMCell`` and ``torch.nn.GRUCell`` have them (G = 4 H or 3 H gates in
    their order), or feed-forward: one layer with tanh (G = H), which remembers by the memory alone.

    Args:
        gates: [T, B, G], the input's part, its bias included: one product for all steps. Any float dtype; everything else
            is of the same, but the memory's state is float32 beside half precision.
        state: the controller's: (hidden, cell) of an LSTM, (hidden,) of a GRU, each [B, H]; () where it is feed-forward.
        memory: LRUAState of [B, N, D], [B, R, N] and [B, N].
        reads: [B, R, D], what the heads read last.
        hidden_weight, hidden_bias: [G, H], [G]; None where the controller is feed-forward.
        reads_weight: [G, R D].
        head_weight, head_bias: [heads, H], [heads]; heads is R D, twice that where the write vector is separate, plus R,
            plus R more where sharpness is learned.
        controller: "lstm", "gru" or "feedforward".
        write_vector: "separate", or "key" where a head writes its key.
        sharpness: factor on the similarity: "learned" (1 + 10 softplus of its value), a number, or None for 1.
        order, write_target, usage_decay, eps: see :func:`lrua_step`.
        resets, lengths, start: [T, B], [B] and [N, D] as in :func:`lrua_scan`; a reset zeroes the controller's state and the
            reads, too, and output is 0 after a sample's length. start has the dtype of the memory's state.

    Returns:
        output [T, B, H + R D], the hidden states and reads of every step; the controller's state, the LRUAState and the reads
        [B, R, D] after the last. Differentiable once in everything but usage.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or value; RuntimeError: tensors on different devices.
    """
    network = Network(gates, state, reads, hidden_weight, hidden_bias, reads_weight, head_weight, head_bias)
    sequences = (resets, lengths, start)
    options = {
        "write_vector": write_vector,
        "sharpness": sharpness,
        "order": order,
        "write_target": write_target,
        "usage_decay": usage_decay,
        "eps": eps,
    }
    return NETWORK.run(network, memory, sequences, controller, options)
