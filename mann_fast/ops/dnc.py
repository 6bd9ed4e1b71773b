"""The Differentiable Neural Computer's memory (Graves et al. 2016; Csordas and Schmidhuber 2019): dnc_step, dnc_scan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .. import reference
from ..reference.dnc import DNCInterface, DNCState
from . import _checks
from ._declare import Argument, Op, Option, Output, Sizes, after, came, each_step
from ._public import Scan
from ._register import declare
from ._sequences import NAMES, of_sequences
from .content import EPS, MEMORY

STATE = (
    MEMORY,
    Argument("usage", "B N", like="memory", within="unit"),
    Argument("precedence", "B N", like="memory", optional=True, within="shares"),
    Argument("links", "B N N", like="memory", optional=True, within="shares"),
    Argument("read_weights", "B R N", like="memory", within="shares", heads_in=""),
    Argument("write_weights", "B N", like="memory", differentiable=False, within="shares"),
)


INTERFACE = (
    Argument("read_keys", "T B R D", like="memory", half=True),
    Argument("read_sharpness", "T B R", like="read_keys", within="from 1"),
    Argument("write_key", "T B D", like="read_keys"),
    Argument("write_sharpness", "T B", like="read_keys", within="from 1"),
    Argument("erase", "T B D", like="read_keys", within="unit"),
    Argument("write_vector", "T B D", like="read_keys"),
    Argument("free_gates", "T B R", like="read_keys", within="unit"),
    Argument("allocation_gate", "T B", like="read_keys", within="unit"),
    Argument("write_gate", "T B", like="read_keys", within="unit"),
    Argument("read_modes", "T B R 3", like="read_keys", optional=True, within="shares"),
    Argument("read_masks", "T B R D", like="read_keys", optional=True, within="unit"),
    Argument("write_mask", "T B D", like="read_keys", optional=True, within="unit"),
    Argument("link_sharpening", "T B R 2", like="read_keys", optional=True, within="from 1"),
)


def kept(sharpened: Callable[[Mapping[str, Any]], bool]) -> tuple[Output, ...]:
    """What is kept of every step for backward: the weights, the order of allocation and, where they are ``sharpened``, the
    directions before that, [backward, forward]. Memory and links are not: backward makes them again from what came in."""
    return (
        Output("read_history", "T B R N", like="memory", kept=True),
        Output("write_history", "T B N", like="memory", kept=True),
        Output("orders", "T B N", like="memory", kept=True, integer=True),
        Output("directions", "T B R 2 N", like="memory", kept=True, when=sharpened),
    )


DEALLOCATE = Option("deallocate", "bool", False, _checks.flag)

# precedence, links and read_modes come together, and so do the masks; link_sharpening comes with links alone.
DNC_SCAN = declare(
    Op(
        "dnc_scan",
        arguments=(*STATE, *INTERFACE, *of_sequences("T B")),
        options=(DEALLOCATE, EPS),
        outputs=(
            Output("reads", "T B R D", like="read_keys"),
            *after(STATE),
            *kept(came("link_sharpening")),
        ),
        layout="int R, bool link",
        public=("dnc_step", "dnc_scan"),
        interval=each_step,
    )
)


def check_links(name: str, precedence: Tensor | None, links: Tensor | None) -> None:
    """precedence and links of the state of that name come together."""
    _together(f"{name}.precedence", precedence, f"{name}.links", links)


def _together(name: str, value: Any, other_name: str, other: Any) -> None:
    if value is None and other is not None:
        raise TypeError(f"{name} must be a tensor where {other_name} is, got None")
    if value is not None and other is None:
        raise TypeError(f"{name} must be None where {other_name} is, got {type(value).__name__}")


class _DNC(Scan):
    def agree(self, sizes: Sizes, tensors: Any) -> None:
        """What comes together, or not without another."""
        _, _, precedence, links, _, _, *told = tensors[: -len(NAMES)]
        interface = DNCInterface(*told)
        check_links("state", precedence, links)
        _together("interface.read_modes", interface.read_modes, "state.links", links)
        _together("interface.write_mask", interface.write_mask, "interface.read_masks", interface.read_masks)
        if interface.link_sharpening is not None and links is None:
            came = type(interface.link_sharpening).__name__
            raise TypeError(f"interface.link_sharpening must be None where state.links is, got {came}")

    def public_inputs(self, inputs: Any) -> tuple[DNCInterface]:
        return (DNCInterface(*inputs),)

    def public_state(self, given: Any, state: Any, sizes: Sizes) -> DNCState:
        there: Any = [None if old is None else x for x, old in zip(given, state, strict=True)]
        return DNCState(*there)


DNC = _DNC(
    DNC_SCAN,
    DNCState,
    reference.dnc_step,
    reference.dnc_scan,
    prefix="interface.",
    start=0.0,
)


def dnc_step(
    state: DNCState, interface: DNCInterface, *, deallocate: bool = False, eps: float = 1e-6
) -> tuple[Tensor, DNCState]:
    """One step of a Differentiable Neural Computer's memory (Graves et al. 2016, Nature 538, 471, Methods), with the repairs of
    Csordas and Schmidhuber 2019 (arXiv 1904.10278) where their tensors are given.

    One write head writes where nothing is needed any more (allocation) or where the content is like its key; R read heads read
    by content, or what was written before or after what they read last (links). In this order, slots i and j, heads r:

    - ``retained[i] = prod over r of (1 - free_gates[r] read_weights[r, i])``;
      ``usage[i] = (usage[i] + (1 - usage[i]) write_weights[i]) retained[i]``;
    - allocation: with the slots sorted by usage, equal ones by number, ``a[i] = (1 - usage[i]) * product of usages before i``;
    - ``write_weights = write_gate (allocation_gate a + (1 - allocation_gate) c)``, c the softmax over slots of
      ``write_sharpness cos(write_key, memory[i])``;
    - ``memory[i] = memory[i] (1 - write_weights[i] erase) + write_weights[i] write_vector``; with ``deallocate`` the first
      term times retained[i];
    - ``links[i, j] = (1 - write_weights[i] - write_weights[j]) links[i, j] + write_weights[i] precedence[j]``, 0 where i = j;
      ``precedence = (1 - sum of write_weights) precedence + write_weights``;
    - ``forward[r] = links read_weights[r]``, ``backward[r] = links^T read_weights[r]``; with link_sharpening each becomes
      ``d^s / sum of d^s``, d the direction + 1e-6;
    - ``read_weights[r] = modes[r, 0] backward[r] + modes[r, 1] c[r] + modes[r, 2] forward[r]``, c by content as above but on
      the memory written; without links ``c[r]``; ``reads[r] = sum over i of read_weights[r, i] memory[i]``.

    The cosine is that of :func:`mann_fast.ops.content_read`; with masks, of key and slot times the mask. The order of
    allocation, and the write weights that come in, are constants to the gradient.

    Args:
        state: :class:`DNCState`: memory [B, N, D], usage [B, N], precedence [B, N] and links [B, N, N] or both None,
            read_weights [B, R, N], write_weights [B, N]; float32 or float64; N, D, R >= 1.
        interface: :class:`DNCInterface`, of the dtype of the state, or all bfloat16 or float16 beside float32. The ranges that
            it states are the caller's to ensure, and so are those of a state of his own.
        deallocate: whether what is given free is erased, too (Csordas and Schmidhuber 2019).
        eps: > 0, under the cosine's root.

    Returns:
        reads [B, R, D] of the interface's dtype, and the new state. Differentiable once in all tensors but
        ``state.write_weights``.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or value, or a tensor without those that it comes with; RuntimeError:
            tensors on different devices.
    """
    _checks.check_tuple("interface", interface, DNCInterface)
    return DNC.step(state, *interface, deallocate=deallocate, eps=eps)


def dnc_scan(
    state: DNCState,
    interface: DNCInterface,
    *,
    deallocate: bool = False,
    eps: float = 1e-6,
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, DNCState]:
    """T steps of :func:`dnc_step` in one call: reads [T, B, R, D] and the last state.

    All of ``interface`` has a leading T, which may be 0; then the state is cloned. Other arguments, dtypes and errors as in
    :func:`dnc_step`; resets [T, B], lengths [B] and start [N, D] as in :func:`mann_fast.ops.lrua_scan`, where a reset takes
    everything to ``DNCState.initial``. Backward keeps the weights and the order of every step, no links.
    """
    _checks.check_tuple("interface", interface, DNCInterface)
    sequences = (resets, lengths, start)
    return DNC.scan(state, *interface, sequences=sequences, deallocate=deallocate, eps=eps)
