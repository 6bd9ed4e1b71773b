"""Least recently used access (Santoro et al. 2016): least_used, lrua_write, lrua_step, lrua_scan."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import reference
from .._anchors import lrua_interval
from ..reference.lrua import LRUAState
from . import _checks
from ._declare import Argument, Op, Option, Output, after
from ._public import Scan, run
from ._register import declare
from ._sequences import of_sequences
from .content import EPS, MEMORY

READ_FIRST = Option(
    "read_first", "bool", False, _checks.choice(("write_first", "read_first"), "read_first"), "order"
)
SHARED_TARGET = Option(
    "shared_target", "bool", False, _checks.choice(("per_head", "shared"), "shared"), "write_target"
)
USAGE_DECAY = Option(
    "usage_decay", "float", 0.95, _checks.number(lambda x: 0 <= x <= 1, "within [0, 1]"), backward=False
)

STATE = (
    MEMORY,
    Argument("read_weights", "B R N", like="memory", within="shares", heads_in="N"),
    Argument("usage", "B N", like="memory", differentiable=False),
)


def _interval(values: tuple[Any, ...], backend: str) -> int:
    (_, num_slots, slot_size), heads = values[0].shape, values[1].shape[1]
    return lrua_interval(num_slots, slot_size, heads, values[0].device if backend == "cuda" else None)


LEAST_USED = declare(
    Op(
        "least_used",
        arguments=(Argument("usage", "B N", differentiable=False),),
        options=(Option("n", "SymInt", 1, _checks.count(0, "N")),),
        outputs=(Output("slots", "B n", like="usage", integer=True, differentiable=False),),
        public=("least_used",),
    )
)
LRUA_WRITE = declare(
    Op(
        "lrua_write",
        arguments=(
            *STATE,
            Argument("write_vector", "B R D", like="memory", half=True),
            Argument("gate_logit", "B R", like="write_vector"),
        ),
        options=(SHARED_TARGET,),
        outputs=(
            Output("memory", "B N D", like="memory"),
            Output("write_weights", "B R N", like="memory"),
            Output("slots", "B R", like="memory", integer=True, kept=True),
        ),
        unsaved=("memory", "usage"),
        public=("lrua_write",),
    )
)
LRUA_SCAN = declare(
    Op(
        "lrua_scan",
        arguments=(
            *STATE,
            Argument("keys", "[T] B R D", like="memory", half=True),
            Argument("write_vectors", "[T] B R D", like="keys"),
            Argument("gate_logits", "[T] B R", like="keys"),
            Argument("sharpness", "[T] B R", like="keys", optional=True),
            *of_sequences("[T] B"),
        ),
        options=(READ_FIRST, SHARED_TARGET, USAGE_DECAY, EPS),
        outputs=(
            Output("reads", "[T] B R D", like="keys"),
            *after(STATE, constant=("usage",)),
            Output("slots", "[T] B R", like="memory", integer=True, kept=True),
            Output("anchors", "A B D+R P", like="memory", kept=True),
        ),
        unsaved=("usage",),
        layout="int R",
        public=("lrua_step", "lrua_scan"),
        interval=_interval,
        extents=lambda sizes: {"D+R": sizes["D"] + sizes["R"]},
    )
)

LRUA = Scan(
    LRUA_SCAN,
    LRUAState,
    reference.lrua_step,
    reference.lrua_scan,
    ("key", "write_vector", "gate_logit", "sharpness"),
)


def least_used(usage: Tensor, n: int) -> Tensor:
    """The n least used slots of every sample, ascending by usage (Santoro et al. 2016, eq. 6).

    The order is that of a stable ``torch.sort``: among equal usage the lower slot comes first, 0.0 equals -0.0, NaN is last.

    Args:
        usage: [B, N], float32 or float64.
        n: how many, 0 <= n <= N.

    Returns:
        int64 [B, n]; carries no gradient.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or n.
    """
    return run(LEAST_USED, reference.least_used, (usage,), {"n": n})


def lrua_write(
    memory: Tensor,
    read_weights: Tensor,
    usage: Tensor,
    write_vector: Tensor,
    gate_logit: Tensor,
    *,
    write_target: str = "per_head",
) -> tuple[Tensor, Tensor]:
    """Write to where the heads read last and to the least used slots (Santoro et al. 2016, eqs. 6-8).

    ``write_weights[r] = sigmoid(gate_logit[r]) * read_weights[r] + sigmoid(-gate_logit[r]) * target[r]``; the least used
    slot of all is set to zero; then ``memory[i] += sum over r of write_weights[r, i] * write_vector[r]``.

    Args:
        memory: [B, N, D], float32 or float64; N, D >= 1.
        read_weights: [B, R, N], where each head read last; 1 <= R <= N.
        usage: [B, N]; gets no gradient.
        write_vector: [B, R, D], of the dtype of memory, or bfloat16 or float16 beside a float32 memory.
        gate_logit: [B, R], of write_vector's dtype.
        write_target: "per_head": target[r] is one-hot at the r-th least used slot; "shared": 1 at each of the R least used
            slots, for every head (the paper's).

    Returns:
        the new memory [B, N, D] and write_weights [B, R, N], of memory's dtype. Differentiable once.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or value; RuntimeError: tensors on different devices.
    """
    tensors = memory, read_weights, usage, write_vector, gate_logit
    return run(LRUA_WRITE, reference.lrua_write, tensors, {"write_target": write_target})


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
) -> tuple[Tensor, LRUAState]:
    """One step of a least-recently-used-access memory (Santoro et al. 2016, arXiv 1605.06065, eqs. 2-8).

    Writes as :func:`lrua_write` does, reads as :func:`content_read` does, and updates
    ``usage = usage_decay * usage + sum over heads of (read weights + write weights)``.

    Args:
        state: LRUAState of memory [B, N, D], read_weights [B, R, N] and usage [B, N], float32 or float64; R <= N.
        key: [B, R, D], what each head looks for; of the dtype of the state, or bfloat16 or float16 beside a float32 state
            (computed in float32).
        write_vector: [B, R, D], what each head writes; of key's dtype.
        gate_logit: [B, R]; sigmoid of it is the share written where the head read last; of key's dtype.
        sharpness: [B, R], factor on the similarity, of key's dtype; None for 1.
        order: "write_first" addresses the memory after the write; "read_first" addresses the memory before the write and
            reads the memory after it.
        write_target: "per_head" or "shared", see :func:`lrua_write`.
        usage_decay: within [0, 1].
        eps: see :func:`content_read`.

    Returns:
        read [B, R, D] of key's dtype, and the new LRUAState. Differentiable once in everything but usage.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or value; RuntimeError: tensors on different devices.
    """
    return LRUA.step(
        *(state, key, write_vector, gate_logit, sharpness),
        order=order,
        write_target=write_target,
        usage_decay=usage_decay,
        eps=eps,
    )


def lrua_scan(
    state: LRUAState,
    keys: Tensor,
    write_vectors: Tensor,
    gate_logits: Tensor,
    sharpness: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    order: str = "write_first",
    write_target: str = "per_head",
    usage_decay: float = 0.95,
    eps: float = 1e-6,
) -> tuple[Tensor, LRUAState]:
    """T steps of :func:`lrua_step` in one call, the memory of a sample held in cache throughout.

    Backward keeps the memory every few steps and replays the steps between, bit for bit.

    Args:
        state: as in :func:`lrua_step`.
        keys, write_vectors: [T, B, R, D]; gate_logits, sharpness: [T, B, R]; the other arguments as in :func:`lrua_step`.
        resets: bool [T, B]: where True the sample begins anew before that step, with weights and usage as in
            ``LRUAState.initial`` and the memory ``start``. Nothing of the steps before, and no gradient, passes.
        lengths: int64 [B], each within [0, T]: a sample has so many steps. Its reads are 0 after them, what its inputs hold
            there reaches nothing and gets a gradient of 0, and its state is that after the last of them.
        start: [N, D], of the state's dtype, with the resets only; the gradients of all resets are summed in it. None for the
            constant that ``LRUAState.initial`` fills a memory with.

    Returns:
        reads [T, B, R, D] of keys' dtype, and the LRUAState after the last step. T = 0 gives a copy of the state.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or value; RuntimeError: tensors on different devices.
    """
    return LRUA.scan(
        *(state, keys, write_vectors, gate_logits, sharpness),
        sequences=(resets, lengths, start),
        order=order,
        write_target=write_target,
        usage_decay=usage_decay,
        eps=eps,
    )
