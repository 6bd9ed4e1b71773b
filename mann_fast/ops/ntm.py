"""Neural Turing Machine addressing (Graves et al. 2014): ntm_address, ntm_step, ntm_scan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._anchors import ntm_interval
from ..reference.ntm import NTMHead, NTMState
from . import _backend, _checks
from ._declare import Argument, Op, Output, Sizes
from ._public import Scan, Tensors, checked
from ._register import call, declare
from ._sequences import NO_SEQUENCES, of_sequences
from .content import EPS, MEMORY
from .lrua import READ_FIRST


def _head(prefix: str, heads: str, like: str, half: bool = False) -> tuple[Argument, ...]:
    """The tensors of an NTMHead of ``heads`` heads."""
    key = f"{prefix}key"
    return (
        Argument(key, f"[T] B {heads} D", like=like, half=half),
        Argument(f"{prefix}sharpness", f"[T] B {heads}", like=key),
        Argument(f"{prefix}gate", f"[T] B {heads}", like=key, within="unit"),
        Argument(f"{prefix}shift", f"[T] B {heads} 2S+1", like=key, within="shares"),
        Argument(f"{prefix}sharpening", f"[T] B {heads}", like=key, within="from 1"),
    )


# The raw op takes the heads of both kinds together: R + W of them, those that read first.
NTM_SCAN = declare(
    Op(
        "ntm_scan",
        arguments=(
            MEMORY,
            Argument("weights", "B R+W N", like="memory", within="shares"),
            Argument("keys", "T B R+W D", like="memory", half=True),
            Argument("sharpness", "T B R+W", like="keys"),
            Argument("gates", "T B R+W", like="keys", within="unit"),
            Argument("shift", "T B R+W 2S+1", like="keys", within="shares"),
            Argument("sharpening", "T B R+W", like="keys", within="from 1"),
            Argument("erase", "T B W D", like="keys", within="unit"),
            Argument("add", "T B W D", like="keys"),
            *of_sequences("T B"),
        ),
        options=(READ_FIRST, EPS),
        outputs=(
            Output("reads", "T B R D", like="keys"),
            Output("memory", "B N D", like="memory"),
            Output("weights", "B R+W N", like="memory"),
            Output("history", "T B R+W N", like="memory", kept=True),
            Output("anchors", "A B D P", like="memory", kept=True),
        ),
        layout="int R, int W, int shifts",
        public=("ntm_address", "ntm_step", "ntm_scan"),
        interval=lambda values, backend: ntm_interval(
            values[0].shape[1], values[0].shape[2], values[1].shape[1]
        ),
        extents=lambda sizes: {"R": sizes["R+W"] - sizes["W"]},
    )
)

# What the public functions take, in the order in which it is checked.
ADDRESS = (MEMORY, Argument("previous", "B R N", like="memory"), *_head("head.", "R", "memory", half=True))
INPUTS = (
    Argument("erase", "[T] B W D", like="memory", half=True),
    Argument("add", "[T] B W D", like="erase"),
    *_head("read_head.", "R", "erase"),
    *_head("write_head.", "W", "erase"),
)
STATE = (
    MEMORY,
    Argument("read_weights", "B R N", like="memory"),
    Argument("write_weights", "B W N", like="memory"),
)


def _check_moves(name: str, sizes: Sizes) -> None:
    if sizes["2S+1"] % 2 == 0:
        raise ValueError(f"{name}.shift must have an odd number 2S + 1 of moves, got {sizes['2S+1']}")


class _NTM(Scan):
    """To the raw op the heads of both kinds are one tensor."""

    def agree(self, sizes: Sizes, tensors: Tensors) -> None:
        _check_moves("read_head", sizes)

    def raw_state(self, state: Any) -> Tensors:
        memory, *weights = state
        return memory, torch.cat(weights, dim=1)

    def raw_inputs(self, inputs: Any) -> Tensors:
        erase, add, *heads = inputs
        axis, half = erase.dim() - 2, len(heads) // 2
        return *(torch.cat(pair, axis) for pair in zip(heads[:half], heads[half:], strict=True)), erase, add

    def public_inputs(self, inputs: Any) -> Sequence[Any]:
        erase, add, *heads = inputs
        half = len(heads) // 2
        return NTMHead(*heads[:half]), NTMHead(*heads[half:]), erase, add

    def public_state(self, given: Any, state: Any, sizes: Sizes) -> NTMState:
        memory, weights = given
        # Copies: no two tensors of a state share their storage.
        return NTMState(memory, weights[:, : sizes["R"]].clone(), weights[:, sizes["R"] :].clone())


NTM = _NTM(
    NTM_SCAN,
    NTMState,
    reference.ntm_step,
    reference.ntm_scan,
    arguments=(*STATE, *INPUTS, *of_sequences("[T] B")),
)


def _inputs(read_head: NTMHead, write_head: NTMHead, erase: Tensor, add: Tensor) -> tuple[Tensor, ...]:
    for name, head in (("read_head", read_head), ("write_head", write_head)):
        _checks.check_tuple(name, head, NTMHead)
    return erase, add, *read_head, *write_head


def ntm_address(memory: Tensor, head: NTMHead, previous: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Where R heads of either kind attend to (Graves et al. 2014, arXiv 1410.5401, eqs. 5-9).

    ``w_c = softmax over slots of sharpness * cosine(key, slot)`` as in :func:`mann_fast.ops.content_read`;
    ``w_g = gate * w_c + (1 - gate) * previous``; ``w_s[i] = sum over j from -S to S of shift[j + S] * w_g[(i - j) mod N]``;
    ``w[i] = w_s[i] ** sharpening / sum of w_s ** sharpening``, computed so that no power underflows.

    Args:
        memory: [B, N, D], float32 or float64; N, D >= 1.
        head: :class:`NTMHead`: key [B, R, D]; sharpness, gate and sharpening [B, R]; shift [B, R, 2S + 1]. Of the dtype of
            memory, or all bfloat16 or float16 beside a float32 memory. gate in [0, 1], shifts that sum to 1 and
            sharpening >= 1 are the caller's to ensure. 2S + 1 may exceed N: the shift then goes round.
        previous: [B, R, N] of memory's dtype, the weights of the step before.
        eps: > 0, as in :func:`mann_fast.ops.content_read`.

    Returns:
        weights [B, R, N] of memory's dtype. Differentiable once in all tensors.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or value; RuntimeError: tensors on different devices.
    """
    _checks.check_tuple("head", head, NTMHead)
    tensors, options = (memory, previous, *head), {"order": "read_first", "eps": eps}
    sizes, raw = checked(
        NTM_SCAN, ADDRESS, None, tensors, options, lambda sizes, _: _check_moves("head", sizes), steps=False
    )
    backend = _backend.serving(memory.device, NTM_SCAN)
    if backend == "reference":
        with _backend.without_autocast(memory.device.type):
            return reference.ntm_address(memory, head, previous, eps=eps)
    nothing = head[0].new_empty(1, sizes["B"], 0, sizes["D"])
    inputs = (*(x.unsqueeze(0) for x in head), nothing, nothing)
    return call(NTM_SCAN, backend, memory, previous, *inputs, *NO_SEQUENCES, *raw)[2]


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
    """One step of a Neural Turing Machine's memory (Graves et al. 2014, arXiv 1410.5401, eqs. 2-9).

    Heads address as in :func:`ntm_address`. ``memory[i] = memory[i] * prod over write heads of (1 - w[i] * erase) + sum over
    write heads of w[i] * add``; ``read = sum over i of w[i] * memory[i]`` for each read head.

    Args:
        state: :class:`NTMState`: memory [B, N, D], read_weights [B, R, N], write_weights [B, W, N]; float32 or float64. R or W
            may be 0.
        read_head, write_head: :class:`NTMHead` of R and of W heads, as in :func:`ntm_address`.
        erase, add: [B, W, D], of the dtype of the heads; erase in [0, 1] is the caller's to ensure.
        order: "read_first" (all heads address, and the read heads read, the memory as it was before the step; Graves et al.) or
            "write_first" (the write heads address and write, then the read heads address and read what was written).
        eps: > 0, as in :func:`mann_fast.ops.content_read`.

    Returns:
        read [B, R, D] of the heads' dtype, and the new state. Differentiable once in all tensors.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or value; RuntimeError: tensors on different devices.
    """
    return NTM.step(state, *_inputs(read_head, write_head, erase, add), order=order, eps=eps)


def ntm_scan(
    state: NTMState,
    read_head: NTMHead,
    write_head: NTMHead,
    erase: Tensor,
    add: Tensor,
    *,
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    order: str = "read_first",
    eps: float = 1e-6,
) -> tuple[Tensor, NTMState]:
    """T steps of :func:`ntm_step` in one call: reads [T, B, R, D] and the last state.

    All of ``read_head``, ``write_head``, ``erase`` and ``add`` have a leading T, which may be 0; then the state is cloned.
    Other arguments, dtypes and errors as in :func:`ntm_step`; resets [T, B], lengths [B] and start [N, D] as in
    :func:`mann_fast.ops.lrua_scan`, where a reset takes weights to those of ``NTMState.initial``. Backward keeps the
    weights of every step and the memory of every few.
    """
    inputs, sequences = _inputs(read_head, write_head, erase, add), (resets, lengths, start)
    return NTM.scan(state, *inputs, sequences=sequences, order=order, eps=eps)
