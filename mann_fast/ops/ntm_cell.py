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
from ._declare import Argument, Op, Option, Output, Sizes
from ._register import call, declare
from ._sequences import NAMES as SEQUENCE_NAMES
from ._sequences import raw_sequences
from .cell import CELL, NUMBERS, check_controller, gradients
from .content import EPS, MEMORY
from .lrua import ORDERS, READ_FIRST
from .ntm import ntm_step


def _gradients(ctx: Any, tensors: tuple[Any, ...], results: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    return gradients(NTM_CELL, ctx, tensors, results)


# Of the arguments and outputs of CELL, those before, between and after its memory's.
_GATES, _REST = CELL.arguments[:3], CELL.arguments[6:]
_BY_NAME = {x.name: x for x in (*CELL.outputs, *CELL.results)}

# As CELL; heads and weights are those that read, then as many that write. max_shift: -1 where heads go by content alone.
NTM_CELL = declare(
    Op(
        "ntm_cell",
        arguments=(*_GATES, MEMORY, Argument("weights", "B 2R N", like="memory", within="shares"), *_REST),
        options=(
            Option("controller", "int", NUMBERS["lstm"]),
            Option("max_shift", "int", 1),
            READ_FIRST,
            EPS,
            Option("bfloat16", "bool", False),
        ),
        outputs=(
            *(_BY_NAME[name] for name in ("output", "hidden", "cell", "reads", "memory")),
            Output("weights", "B 2R N", like="gates"),
            *(_BY_NAME[name] for name in ("kept_gates", "kept_states", "kept_heads")),
            Output("history", "T B 2R N", like="gates", kept=True),
            Output("anchors", "A B D P", like="gates", kept=True),
        ),
        saved=(
            *("hidden", "cell", "memory", "weights", "hidden_weight", "reads_weight", "head_weight"),
            *("kept_gates", "kept_states", "kept_heads", "history", "anchors", *SEQUENCE_NAMES),
        ),
        also_saved=CELL.also_saved,
        public=("ntm_cell",),
        interval=lambda values, backend: ntm_interval(values[3].shape[2], values[4].shape[1]),
        # Backward takes no reads, whose axis R is.
        extents=lambda sizes: {
            "R": sizes["2R"] // 2,
            "RD": sizes["2R"] // 2 * sizes["D"],
            "H+RD": sizes["H"] + sizes["2R"] // 2 * sizes["D"],
            "kept": sizes["G"] if sizes["controller"] == NUMBERS["feedforward"] else 4 * sizes["H"],
        },
        results=tuple(
            Output("grad_weights", "B 2R N", like="memory") if x.name == "grad_read_weights" else x
            for x in CELL.results
        ),
        gradients=_gradients,
    )
)

# What the public function takes, memory first, named as its callers know it.
STATE = (
    MEMORY,
    Argument("read_weights", "B R N", like="memory"),
    Argument("write_weights", "B R N", like="memory"),
)
TENSORS = (*STATE, *_GATES, *_REST)
NAMES = (
    "memory.memory",
    "memory.read_weights",
    "memory.write_weights",
    "gates",
    "state.hidden",
    "state.cell",
    *NTM_CELL.names[5 : 5 + len(_REST)],
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
    and add (R D, tanh). Then comes :func:`ntm_step`. One call per direction in C++ on the CPU, elsewhere a loop of steps.

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
    weights = (hidden_weight, hidden_bias, reads_weight, head_weight, head_bias)
    sequences = (resets, lengths, start)
    _check(gates, state, memory, reads, weights, sequences, (controller, max_shift, order, eps))
    sequences = raw_sequences(memory[0], gates.shape[0], *sequences)
    backend = _backend.serving(gates.device)
    if backend != "cpp" or gates.shape[0] == 0:
        with _backend.without_autocast(gates.device.type):
            return reference.ntm_cell(
                gates,
                state,
                NTMState(*memory),
                reads,
                *weights,
                controller=controller,
                max_shift=max_shift,
                order=order,
                eps=eps,
                **dict(zip(SEQUENCE_NAMES, sequences, strict=True)),  # type: ignore[arg-type]
                step=reference.ntm_step if backend == "reference" else ntm_step,
            )
    dtype = gates.dtype
    slots, read_weights, write_weights = memory
    of_heads = torch.cat([read_weights, write_weights], dim=1)
    tensors = [gates, *(*state, None, None)[:2], slots, of_heads, reads, *weights]
    if dtype in _checks.HALF_DTYPES:
        tensors = [x if x is None else x.float() for x in tensors]
    output, hidden, cell, reads, slots, of_heads = call(
        NTM_CELL,
        backend,
        *tensors,
        *sequences,
        NUMBERS[controller],
        -1 if max_shift is None else max_shift,
        order == "read_first",
        float(eps),
        dtype == torch.bfloat16,
        0,
    )[:6]
    last = (hidden, cell)[: len(state)]
    if dtype != output.dtype:
        output, reads, last = output.to(dtype), reads.to(dtype), tuple(x.to(dtype) for x in last)
    # Copies: no two tensors of a state share their storage.
    parts = (x.clone() for x in of_heads.chunk(2, dim=1))
    return output, last, NTMState(slots, *parts), reads


def check_max_shift(max_shift: Any) -> None:
    """An int of at least 0."""
    if isinstance(max_shift, bool) or not isinstance(max_shift, int):
        raise TypeError(f"max_shift must be an int, got {type(max_shift).__name__}")
    if max_shift < 0:
        raise ValueError(f"max_shift must be at least 0, got {max_shift}")


def _check(
    gates: Tensor,
    state: tuple[Tensor, ...],
    memory: NTMState,
    reads: Tensor,
    weights: tuple[Tensor | None, ...],
    sequences: tuple[Tensor | None, ...],
    options: tuple[Any, ...],
) -> None:
    _checks.check_tuple("memory", memory, NTMState)
    parts = state if isinstance(state, tuple) else ()

    def known() -> Sizes:
        controller, max_shift, order, eps = options
        if max_shift is not None:
            check_max_shift(max_shift)
        _checks.check_choice("order", order, ORDERS)
        _checks.check_eps(eps)
        of_memory = _checks.check_tensors(STATE, NAMES[:3], memory)
        heads = sum(ntm_head_sizes(of_memory["R"], of_memory["D"], max_shift))
        return check_controller(controller, state, weights) | {
            "RD": of_memory["R"] * of_memory["D"],
            "heads": heads,
        }

    tensors = (*memory, gates, *(*parts, None, None)[:2], reads, *weights, *sequences)
    choices = (type(state), len(parts), *options, *map(type, options))
    _checks.check_tensors(TENSORS, NAMES, tensors, choices=choices, known=known)
