"""A whole sequence of a network with a Differentiable Neural Computer's memory in one call: controller, heads and memory."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .. import reference
from ..reference.cell import dnc_head_sizes
from ..reference.dnc import DNCState
from . import _backend
from ._cell import Network, Public, declare_cell, fused, run_cell, run_steps
from ._checks import check_eps, check_flag, check_number
from ._declare import Option, Sizes, each_step
from ._sequences import raw_sequences
from .content import EPS
from .dnc import STATE, check_links, dnc_step, kept

# Links are there where they come in. clip: 0 where values are taken as they are.
DNC_CELL = declare_cell(
    "dnc_cell",
    STATE,
    (
        Option("masks", "bool", False),
        Option("mask_min", "float", 0.0),
        Option("deallocate", "bool", False),
        Option("link_sharpening", "bool", False),
        Option("clip", "float", 0.0),
        EPS,
    ),
    kept(lambda values: bool(values["link_sharpening"])),
    interval=each_step,
)
PUBLIC = Public(DNCState, STATE)


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
    options = (masks, mask_min, deallocate, link_sharpening, clip, eps)
    link = isinstance(memory, tuple) and len(memory) > 3 and memory[3] is not None
    sizes = PUBLIC.check(network, memory, (resets, lengths, start), (controller, link, *options), _head_sizes)
    check_links("memory", DNCState(*memory))
    sequences = raw_sequences(memory[0], gates.shape[0], resets, lengths, start, value=0.0)
    backend = _backend.serving(gates.device, DNC_CELL)
    if gates.shape[0] == 0 or not fused(
        DNC_CELL, backend, gates, sizes, controller, link, masks, link_sharpening
    ):
        named = {"controller": controller, "masks": masks, "mask_min": mask_min, "deallocate": deallocate}
        named |= {"link_sharpening": link_sharpening, "clip": clip, "eps": eps}
        return run_steps(reference.dnc_cell, network, DNCState(*memory), sequences, named, dnc_step)
    raw = (masks, float(mask_min), deallocate, link_sharpening, float(clip or 0), float(eps))
    output, last, after, reads = run_cell(DNC_CELL, backend, network, memory, sequences, controller, raw)
    there: list[Any] = [None if old is None else x for x, old in zip(after, memory, strict=True)]
    return output, last, DNCState(*there), reads


def check_options(
    link: bool, masks: Any, mask_min: Any, deallocate: Any, link_sharpening: Any, clip: Any, eps: Any
) -> None:
    """Those of :func:`dnc_cell`, and whether there are links."""
    for name, value in (("masks", masks), ("deallocate", deallocate), ("link_sharpening", link_sharpening)):
        check_flag(name, value)
    if link_sharpening and not link:
        raise ValueError("link_sharpening must be False without link, got True")
    check_number("mask_min", mask_min)
    if not 0 <= mask_min < 1:
        raise ValueError(f"mask_min must be within [0, 1), got {mask_min}")
    if mask_min and not masks:
        raise ValueError(f"mask_min must be 0 without masks, got {mask_min}")
    if clip is not None:
        check_number("clip", clip, "a number or None")
        if not 0 < clip < math.inf:
            raise ValueError(f"clip must be a positive number or None, got {clip}")
    check_eps(eps)


def _head_sizes(sizes: Sizes, link: bool, *options: Any) -> list[int]:
    check_options(link, *options)
    masks, _, _, link_sharpening, _, _ = options
    return dnc_head_sizes(sizes["R"], sizes["D"], link=link, masks=masks, link_sharpening=link_sharpening)
