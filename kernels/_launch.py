"""What the launchers of all kernels share: sizes, tiles, and how a kernel is launched."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ._sizes import power_of_two

# Forward must give equal slots equal bits. Which products a compiler fuses with sums is its own affair, and it might fuse
# for one slot and not for another; so it fuses none, and what is worth it is written out (tl.fma). Backward promises no
# such thing. One stage: a step reads what the step before stored, so nothing may be fetched ahead.
FORWARD = {"enable_fp_fusion": False, "num_stages": 1}
BACKWARD = {"enable_fp_fusion": True, "num_stages": 1}

TILE_NUMBERS = 8192  # that a program may hold in registers at once as one block [heads, slots, width]


def tile_slots(num_slots: int, slot_size: int, num_heads: int) -> int:
    """Slots of a tile for the ops that go over a memory once."""
    most = TILE_NUMBERS // (power_of_two(slot_size) * power_of_two(num_heads))
    return max(1, min(power_of_two(num_slots), power_of_two(most) if most else 1, 128))


def split(
    batch: int, num_slots: int, slot_size: int, num_heads: int, device: torch.device
) -> tuple[dict[str, int], int, int]:
    """For an op that goes over a memory once: constants of its kernel, programs per sample, and slots of each. One program,
    unless the samples alone leave multiprocessors idle."""
    tile = tile_slots(num_slots, slot_size, num_heads)
    tiles = triton.cdiv(num_slots, tile)
    programs = 8  # in the interpreter: as many as a GPU might take, so that tests see them combined
    if device.type == "cuda":
        programs = max(1, torch.cuda.get_device_properties(device).multi_processor_count // max(batch, 1))
    span = triton.cdiv(tiles, min(tiles, programs)) * tile
    constants = {"D": slot_size, "R": num_heads, "DP": power_of_two(slot_size), "RP": power_of_two(num_heads), "TILE": tile}
    return constants, triton.cdiv(num_slots, span), span


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    options: dict[str, Any],
    num_warps: int = 4,
    **constants: Any,
) -> None:
    """Launch on the device of the first tensor, with ``options`` for the compiler; nothing where the grid is empty."""
    if 0 in grid:
        return
    device = next(x for x in arguments if isinstance(x, Tensor)).device
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](*arguments, **constants, num_warps=num_warps, **options)
    else:
        kernel[grid](*arguments, **constants)


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]
