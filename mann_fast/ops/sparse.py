"""Sparse access to a memory of many slots (Rae et al. 2016, arXiv 1610.09027): sparse_read, sparse_step, sparse_scan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..reference.sparse import SparseState
from . import _checks
from ._declare import Argument, Op, Option, Output, Sizes, after, each_step
from ._public import Scan, Tensors, run
from ._register import LIBRARIES, declare, define_in_place
from ._sequences import may_look, of_sequences
from .content import CONTENT_READ, EPS, MEMORY

# N, which backward cannot see from what is kept: nothing of the memory's size is.
NUM_SLOTS = Option("num_slots", "SymInt", 0, lambda name, value, known: known["N"])

SPARSE_READ = declare(
    Op(
        "sparse_read",
        arguments=(MEMORY, *CONTENT_READ.arguments[1:]),  # key and sharpness
        options=(NUM_SLOTS, Option("num_reads", "SymInt", 1, _checks.count(1, "N")), EPS),
        outputs=(
            Output("read", "B R D", like="key"),
            Output("slots", "B R num_reads", like="memory", integer=True, differentiable=False),
            Output("weights", "B R num_reads", like="memory"),
            Output("rows", "B R num_reads D", like="memory", kept=True),
        ),
        saved=("key", "sharpness", "weights", "slots", "rows"),
        public=("sparse_read",),
        extents=lambda sizes: {"N": sizes["num_slots"]},
    )
)

STATE = (
    MEMORY,
    Argument("read_slots", "B R K", dtype=torch.int64, differentiable=False, within="slots"),
    Argument("read_weights", "B R K", like="memory", within="shares", heads_in="N"),
    Argument("last_access", "B N", dtype=torch.int64, differentiable=False, within="times"),
    Argument("clock", "B", dtype=torch.int64, differentiable=False, within="now"),
)


INPUTS = (
    Argument("keys", "T B R D", like="memory", half=True),
    Argument("write_vectors", "T B R D", like="keys"),
    Argument("gate_logits", "T B R", like="keys"),
    Argument("sharpness", "T B R", like="keys", optional=True),
    Argument("write_gate_logits", "T B R", like="keys", optional=True),
)


THRESHOLD = Option("threshold", "float", 0.005, _checks.fraction, backward=False)

# Of every step backward keeps the rows that were read, their slots and weights, and the slots that were erased; of the state
# that came in it does not take all.
HISTORY = (
    Output("oldest", "T B R", like="read_weights", kept=True, integer=True),
    Output("slot_history", "T B R K", like="read_weights", kept=True, integer=True),
    Output("weight_history", "T B R K", like="read_weights", kept=True),
    Output("rows", "T B R K D", like="read_weights", kept=True),
)
UNSAVED = ("memory", "last_access", "clock")

SPARSE_SCAN = declare(
    Op(
        "sparse_scan",
        arguments=(*STATE, *INPUTS, *of_sequences("T B")),
        options=(NUM_SLOTS, THRESHOLD, EPS),
        outputs=(
            Output("reads", "T B R D", like="keys"),
            *after(STATE),
            *HISTORY,
        ),
        unsaved=UNSAVED,
        public=("sparse_step", "sparse_scan"),
        interval=each_step,
        extents=lambda sizes: {"N": sizes["num_slots"]},
    )
)

# Blocks of the current device that share the search in each of B sparse memories.
LIBRARIES["cuda"].define("sparse_blocks(int B, int N, int D) -> int")
# For mann_fast/layers/sparse_steps.py: they change a memory, a gradient and times that nobody else sees, and lists of slots
# that steps hand on.
LIBRARIES["cpp"].define("sparse_lists(Tensor memory) -> Tensor")
define_in_place(
    "sparse_step_(Tensor(a!) memory, Tensor read_slots, Tensor read_weights, Tensor(b!) last_access, Tensor clock, Tensor key, "
    "Tensor write_vector, Tensor gate_logit, Tensor sharpness, Tensor write_gate_logit, Tensor? resets, Tensor? lengths, "
    "Tensor? start, Tensor(c!)? lists, Tensor? candidates, float threshold, float eps) -> (Tensor read, Tensor read_slots, "
    "Tensor read_weights, Tensor clock, Tensor oldest, Tensor rows)"
)
define_in_place(
    "sparse_step_backward_(Tensor? grad_read, Tensor(a!) grad_memory, Tensor? grad_weights, Tensor slots_before, "
    "Tensor weights_before, Tensor key, Tensor write_vector, Tensor gate_logit, Tensor sharpness, Tensor write_gate_logit, "
    "Tensor? resets, Tensor? lengths, Tensor? start, Tensor oldest, Tensor slots, Tensor weights, Tensor rows, float eps, "
    "bool of_start) -> (Tensor grad_weights, Tensor grad_key, Tensor grad_write_vector, Tensor grad_gate_logit, "
    "Tensor grad_sharpness, Tensor grad_write_gate_logit, Tensor grad_start)"
)


def sparse_read(
    memory: Tensor, key: Tensor, sharpness: Tensor | None = None, *, num_reads: int, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """Read the ``num_reads`` slots that are most like each key (Rae et al. 2016, section 3.1).

    Of every head the K slots of greatest cosine ``dot(key, slot) / sqrt(|key|^2 |slot|^2 + eps)``, greatest first, equal ones
    by number, NaN before all; ``weights = softmax over these of sharpness * cosine``; ``read = sum of weights * slots``.

    Args:
        memory: [B, N, D], float32 or float64; N, D >= 1.
        key: [B, R, D], of the dtype of memory, or bfloat16 or float16 beside a float32 memory (computed in float32).
        sharpness: [B, R] of key's dtype, or None for 1. It does not change which slots are read.
        num_reads: K, 1 <= K <= N.
        eps: added to the product of the squared norms; > 0.

    Returns:
        read [B, R, D] of key's dtype, slots int64 [B, R, K], weights [B, R, K] of memory's dtype. Differentiable once, with the
        slots a constant: slots that are not read get a gradient of 0.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or value; RuntimeError: tensors on different devices.
    """
    options = {"num_reads": num_reads, "eps": eps}
    return run(SPARSE_READ, reference.sparse_read, (memory, key, sharpness), options)


def check_slots(slots: Tensor, num_slots: int, prefix: str = "state") -> None:
    """Within [0, N), where the values can be asked for: kernels take others for the nearest that there is."""
    if may_look(slots) and slots.numel():
        least, most = (int(x) for x in slots.aminmax())
        if least < 0 or most >= num_slots:
            raise ValueError(
                f"{prefix}.read_slots must be within [0, N = {num_slots}), got {least if least < 0 else most}"
            )


def check_times(last_access: Tensor, clock: Tensor, prefix: str = "state") -> None:
    """None after now, where the values can be asked for: kernels keep the slots in the order of their last access, and what is
    accessed comes last in it."""
    if may_look(last_access) and last_access.numel():
        latest = last_access.amax(1)
        late = (latest > clock).nonzero()
        if len(late):
            b = int(late[0])
            raise ValueError(
                f"{prefix}.last_access must be at most {prefix}.clock, {int(clock[b])} of sample {b}, got {int(latest[b])}"
            )


def check_num_reads(prefix: str, sizes: Mapping[str, Any]) -> None:
    if not 1 <= sizes["K"] <= sizes["N"]:
        shape = [sizes[axis] for axis in "BRK"]
        raise ValueError(
            f"{prefix}.read_slots [B, R, K] must have 1 <= K <= N = {sizes['N']} slots, got {shape}"
        )


class _Sparse(Scan):
    def agree(self, sizes: Sizes, tensors: Tensors) -> None:
        check_num_reads("state", sizes)

    def look(self, state: Any, prefix: str = "state") -> None:
        memory, slots, _, last_access, clock = state
        check_slots(slots, memory.shape[1], prefix)
        check_times(last_access, clock, prefix)


SPARSE = _Sparse(
    SPARSE_SCAN,
    SparseState,
    reference.sparse_step,
    reference.sparse_scan,
    ("key", "write_vector", "gate_logit", "sharpness", "write_gate_logit"),
)


def sparse_step(
    state: SparseState,
    key: Tensor,
    write_vector: Tensor,
    gate_logit: Tensor,
    sharpness: Tensor | None = None,
    write_gate_logit: Tensor | None = None,
    *,
    threshold: float = 0.005,
    eps: float = 1e-6,
) -> tuple[Tensor, SparseState]:
    """One step of a memory with sparse access (Rae et al. 2016, arXiv 1610.09027, "SAM", eqs. 5-6).

    Each of R heads reads K of the N slots, and writes to the K that it read at the step before and to one old one:

    - ``oldest[r]``, r = 1..R: the R slots of least ``last_access``, equal ones by number;
    - head r writes with weights ``sigmoid(write_gate_logit[r]) sigmoid(gate_logit[r]) read_weights[r]`` to its last slots and
      ``sigmoid(write_gate_logit[r]) sigmoid(-gate_logit[r])`` to ``oldest[r]``; where that is one of those, with both;
    - all of ``oldest`` are set to zero, then each head adds its weights times ``write_vector[r]``;
    - it reads the new memory as :func:`sparse_read` does;
    - ``clock += 1``, and ``last_access = clock`` of the slots whose read and write weights, summed over the heads, exceed
      ``threshold``.

    Args:
        state: :class:`SparseState`: memory [B, N, D], float32 or float64; read_slots int64 [B, R, K], K different ones of each
            head; read_weights [B, R, K]; last_access int64 [B, N], none above the clock; clock int64 [B]; R and K at most N.
        key, write_vector: [B, R, D], what each head looks for and writes; of the dtype of the memory, or bfloat16 or float16
            beside a float32 memory (computed in float32).
        gate_logit: [B, R], of key's dtype; sigmoid of it is the share written where the head read last.
        sharpness: [B, R] of key's dtype, factor on the cosine; None for 1.
        write_gate_logit: [B, R] of key's dtype; sigmoid of it is the factor on all of the write; None for 1.
        threshold: within [0, 1).
        eps: see :func:`sparse_read`.

    Returns:
        read [B, R, D] of key's dtype, and the new SparseState. Differentiable once in all but the integers; which slots are
        written and read is a constant.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or value; RuntimeError: tensors on different devices.
    """
    inputs = (key, write_vector, gate_logit, sharpness, write_gate_logit)
    return SPARSE.step(state, *inputs, threshold=threshold, eps=eps)


def sparse_scan(
    state: SparseState,
    keys: Tensor,
    write_vectors: Tensor,
    gate_logits: Tensor,
    sharpness: Tensor | None = None,
    write_gate_logits: Tensor | None = None,
    *,
    threshold: float = 0.005,
    eps: float = 1e-6,
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, SparseState]:
    """T steps of :func:`sparse_step` in one call: the memory is copied once, and so is its gradient.

    Backward keeps of every step the R K rows that were read, and nothing whose size depends on N.

    Args:
        state: as in :func:`sparse_step`.
        keys, write_vectors: [T, B, R, D]; gate_logits, sharpness, write_gate_logits: [T, B, R]; T may be 0.
        resets, lengths, start: as in :func:`lrua_scan`; a reset takes everything to ``SparseState.initial``, in time that
            grows with N.

    Returns:
        reads [T, B, R, D] of keys' dtype, and the SparseState after the last step. T = 0 gives a copy of the state.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or value; RuntimeError: tensors on different devices.
    """
    inputs = (keys, write_vectors, gate_logits, sharpness, write_gate_logits)
    sequences = (resets, lengths, start)
    return SPARSE.scan(state, *inputs, sequences=sequences, threshold=threshold, eps=eps)
