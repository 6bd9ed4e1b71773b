"""What a scan keeps for backward: the memory as it was every few steps (an anchor), from which the steps between are replayed.

The one place in Python that knows how often and in which layout; csrc/include/arguments.h is the one in C++.
"""

from __future__ import annotations

import torch

SLOT_PADDING = 16  # slot_padding in csrc/include/arguments.h
REPLAY_NUMBERS = 2**25  # that the replay of a large memory may take, where 8 steps do not take more


def anchors_shape(steps: int, batch: int, rows: int, num_slots: int, every: int) -> tuple[int, ...]:
    """[anchors, B, rows, padded N]: slots in lanes, before steps ``every``, 2 ``every``, ... ``rows`` is D of a memory alone,
    D + R where read weights are kept beside it."""
    count = torch.sym_max(steps - 1, 0) // every
    return count, batch, rows, (num_slots + SLOT_PADDING - 1) // SLOT_PADDING * SLOT_PADDING


def lrua_interval(num_slots: int, slot_size: int, num_heads: int, cuda: torch.device | None = None) -> int:
    """Every how many steps an LRUA scan keeps an anchor.

    Enough steps that what is kept, (D + R) N floats an anchor, stays below the R (N + D) floats a step that keeping all
    read weights and erased rows would take; few enough that the memories of one replay stay in a core's cache. The CUDA
    kernels, on the device ``cuda``, keep them in shared memory, where a few steps less make them fit: then below
    R (N + 2 D) floats. A large memory is kept more often, but not within 8 steps, for a replay of no more than
    ``REPLAY_NUMBERS``.
    """
    kept = (slot_size + num_heads) * num_slots
    memory, rows = num_slots * slot_size, (2 * num_heads + 1) * num_slots
    interval = _with_room(-(-kept // (num_heads * (num_slots + slot_size))), memory + rows)
    if cuda is not None:
        fitting = (_replay_numbers(cuda) - memory - 4 * num_heads * num_slots) // (memory + rows)
        if fitting > 0 and kept <= fitting * num_heads * (num_slots + 2 * slot_size):
            return min(interval, fitting)
    return interval


def _replay_numbers(cuda: torch.device) -> int:
    """Floats that a block's shared memory has room for, beside 16 KiB for everything else. Emulated, as on sm_90."""
    shared = 227 * 1024
    if cuda.type == "cuda":
        shared = torch.cuda.get_device_properties(cuda).shared_memory_per_block_optin
    return (shared - 16 * 1024) // 4


def ntm_interval(num_slots: int, slot_size: int, heads: int) -> int:
    """Every how many steps an NTM scan keeps an anchor, N D floats: so many that it takes no more than the weights that every
    step keeps, heads N floats, and few enough for a core's cache; of a large memory as for LRUA."""
    return _with_room(-(-slot_size // max(heads, 1)), num_slots * slot_size)


def _with_room(interval: int, numbers: int) -> int:
    """Of so many steps, at least 8, those whose replay has room at so many numbers a step."""
    return max(8, min(interval, REPLAY_NUMBERS // max(numbers, 1)))
