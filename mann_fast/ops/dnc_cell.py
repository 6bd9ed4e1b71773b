"""A whole sequence of a network with a Differentiable Neural Computer's memory in one call: controller, heads and memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .. import reference
from ..reference.cell import dnc_head_sizes
from ..reference.dnc import DNCState
from . import _checks
from ._cell import Cell, Network, declare_cell
from ._declare import Option, Sizes, each_step
from .content import EPS
from .dnc import DEALLOCATE, DNC, STATE, check_links, dnc_step, kept


def _link_sharpening(name: str, value: Any, known: Mapping[str, Any]) -> bool:
    if _checks.flag(name, value, known) and not known["link"]:
        raise ValueError(f"{name} must be False without link, got True")
    return bool(value)


_clip = _checks.number(lambda x: 0 < x < math.inf, "a positive number or None", "a number or None")


def _mask_min(name: str, value: Any, known: Mapping[str, Any]) -> float:
    raw: float = _checks.fraction(name, value, known)
    if raw and not known["masks"]:
        raise ValueError(f"{name} must be 0 without masks, got {value}")
    return raw


# Links are there where they come in. clip: 0 where values are taken as they are.
DNC_CELL = declare_cell(
    "dnc_cell",
    STATE,
    (
        Option("masks", "bool", False, _checks.flag),
        Option("mask_min", "float", 0.0, _mask_min),
        DEALLOCATE,
        Option("link_sharpening", "bool", False, _link_sharpening),
        Option("clip", "float", 0.0, lambda name, x, known: 0.0 if x is None else _clip(name, x, known)),
        EPS,
    ),
    kept(lambda values: bool(values["link_sharpening"])),
    interval=each_step,
    choices="bool link, bool masks, bool link_sharpening",
)


class _DNCCell(Cell):
    def known(self, memory: Any) -> dict[str, Any]:
        _, _, precedence, links, *_ = memory
        check_links("memory", precedence, links)
        return {"link": links is not None}


def _head_sizes(sizes: Sizes, options: Mapping[str, Any]) -> list[int]:
    parts: Any = {"link": sizes["link"], **{name: options[name] for name in ("masks", "link_sharpening")}}
    return dnc_head_sizes(sizes["R"], sizes["D"], **parts)


NETWORK = _DNCCell(
    DNC_CELL,
    DNC,
    reference.dnc_cell,
    dnc_step,
    _head_sizes,
    lambda options: (options["link"], options["masks"], options["link_sharpening"]),
)


def dnc_cell(
    gates: Tensor,
    state: tuple[Tensor, ...],
    memory: DNCState,
    reads: Tensor,
    hidden_weight: Tensor | None,
    hidden_bias: Tensor | None,
    reads_weight: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    *,
    controller: str = "lstm",
    masks: bool = False,
    mask_min: float = 0.0,
    deallocate: bool = False,
    link_sharpening: bool = False,
    clip: float | None = None,
    eps: float = 1e-6,
    resets: Tensor | None = None,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...], DNCState, Tensor]:
    """As :func:`cell`, with the memory of a Differentiable Neural Computer (Graves et al. 2016, Nature 538, 471) and, as
    options, the repairs of Csordas and Schmidhuber 2019 (arXiv 1904.10278): R heads that read and one that writes.

    The heads' values are, in this order, read keys (R D), read sharpness (R), write key (D), write sharpness (1), erase (D),
    write vector (D), free gates (R), allocation gate (1), write gate (1), with links read modes (3R, head by head: backward,
    content, forward), with masks read masks (R D) and write mask (D), and where links are sharpened their exponents (2R, head
    by head: backward, forward). Sharpness and exponents go through 1 + softplus, the read modes of a head through a softmax,
    keys and the write vector are taken as they are, all else goes through a sigmoid. Then comes :func:`dnc_step`. One call per
    direction in C++ on the CPU, and one launch in CUDA C++ (see docs/gpu.md) where there is room; elsewhere a loop of steps.

    Args:
        gates, state, reads, hidden_weight, hidden_bias, reads_weight, head_weight, head_bias, controller: as of :func:`cell`.
        memory: DNCState as of :func:`dnc_step`; precedence and links None where there are no links.
        masks: whether the heads have masks, each number of which is mask_min + (1 - mask_min) sigmoid; mask_min within [0, 1),
            0 without masks.
        deallocate: see :func:`dnc_step`.
        link_sharpening: whether the heads have exponents for the directions; False without links.
        clip: a positive number, beyond which and its negative the heads' values are taken to be these; None for no bound.
        eps: see :func:`dnc_step`.
        resets, lengths, start: as of :func:`cell`; a reset takes the memory's state to ``DNCState.initial``, or to ``start``.

    Returns:
        output [T, B, H + R D], the controller's state, the DNCState and the reads [B, R, D]. Differentiable once in everything
        but ``memory.write_weights``.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or value; RuntimeError: tensors on different devices.
    """
    network = Network(gates, state, reads, hidden_weight, hidden_bias, reads_weight, head_weight, head_bias)
    sequences = (resets, lengths, start)
    options = {
        "masks": masks,
        "mask_min": mask_min,
        "deallocate": deallocate,
        "link_sharpening": link_sharpening,
        "clip": clip,
        "eps": eps,
    }
    return NETWORK.run(network, memory, sequences, controller, options)
