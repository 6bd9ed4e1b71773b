"""What the launchers of all kernels share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._anchors import anchors_shape

# Forward must give equal slots equal bits. Which products a compiler fuses with sums is its own affair, and it might fuse
# for one slot and not for another; so it fuses none, and what is worth it is written out (tl.fma). Backward promises no
# such thing. One stage: a step reads what the step before stored, so nothing may be fetched ahead.
FORWARD = {"enable_fp_fusion": False, "num_stages": 1}
BACKWARD = {"enable_fp_fusion": True, "num_stages": 1}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    options: dict[str, Any],
    num_warps: int = 4,
    **constants: Any,
) -> None:
    """Launch on the device of the first tensor, with ``options`` for the compiler; nothing where the grid is empty.

    Raises RuntimeError for a tensor that is not contiguous: kernels go by sizes, not by strides.
    """
    if 0 in grid:
        return
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    if not all(x.is_contiguous() for x in tensors):
        raise RuntimeError(f"{kernel.fn.__name__} takes contiguous tensors only")
    if tensors[0].device.type == "cuda":
        with torch.cuda.device(tensors[0].device):
            kernel[grid](*arguments, **constants, num_warps=num_warps, **options)
    else:
        kernel[grid](*arguments, **constants)


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def sum_programs(shares: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of what the programs of a sample found, [programs, ...]; that of one program has the dtype already."""
    return shares[0] if shares.shape[0] == 1 else shares.sum(0).to(dtype)


def new_steps(
    like: Tensor, shape: Sequence[int], lengths: Tensor | None, dtype: torch.dtype | None = None
) -> Tensor:
    """Room for what a scan has per step, of the dtype of ``like`` or another. All 0 at first where samples have ``lengths``:
    kernels take no step beyond them."""
    return (like.new_empty if lengths is None else like.new_zeros)(shape, dtype=dtype)


def new_anchors(memory: Tensor, rows: int, steps: int, every: int, lengths: Tensor | None) -> Tensor:
    """Room for the anchors of a scan, in their shape. Kernels use as many numbers of each as they need, slot by slot; where
    the shape has padding, too, all are 0 at first, so that equal calls give equal results."""
    batch, num_slots, _ = memory.shape
    if every == 0:
        return memory.new_empty(0)
    shape = anchors_shape(steps, batch, rows, num_slots, every)
    return new_steps(memory, shape, lengths) if shape[-1] == num_slots else memory.new_zeros(shape)


def new_gradient_of_start(start: Tensor | None, memory: Tensor) -> Tensor:
    """Room for a gradient of the start per sample, [B, N, D], to which resets add; of shape [0] without one."""
    return memory.new_empty(0) if start is None else memory.new_zeros(memory.shape)
