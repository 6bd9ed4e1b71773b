"""What a Triton program holds of a memory, the whole in registers or a tile of slots at a time, and what follows for a launch:
constants, programs, warps. Launchers and the sentences of ``mann-fast doctor --explain`` ask the same functions."""

from __future__ import annotations

import torch
import triton

from . import _tuning

RESIDENT_NUMBERS = 16384  # of a memory, in the registers of one program
TILE_NUMBERS = 8192  # that a program may hold in registers at once as one block [heads, slots, width]


def power_of_two(number: int) -> int:
    """The least that is not below ``number`` >= 1."""
    return 1 << (number - 1).bit_length()


# ---- a program that holds a whole memory -------------------------------------------------------------------------------


def pieces(slot_size: int) -> tuple[int, int]:
    """The width of a slot as two powers of two. Where one is enough the second is 1, all of it padding."""
    first = 1 << (slot_size.bit_length() - 1)
    return first, power_of_two(max(slot_size - first, 1))


def resident_numbers(num_slots: int, slot_size: int) -> int:
    """Numbers that one program holds of a memory."""
    first, second = pieces(slot_size)
    return power_of_two(num_slots) * (first if slot_size == first else first + second)


def held_numbers(num_slots: int, slot_size: int, per_slot: int = 1) -> int:
    """Numbers that one program holds at once: a memory or, where that is more, ``per_slot`` numbers for each slot."""
    return max(resident_numbers(num_slots, slot_size), power_of_two(num_slots) * per_slot)


def fits_one_program(num_slots: int, slot_size: int, per_slot: int = 1) -> bool:
    """Whether a program holds them in registers; else a scan is a loop of steps."""
    return held_numbers(num_slots, slot_size, per_slot) <= RESIDENT_NUMBERS


def resident(
    kernel: str, device: torch.device, num_slots: int, slot_size: int, heads: int, per_slot: int = 1
) -> dict[str, int]:
    """Constants and warps of a kernel that holds a whole memory. The rule for warps leaves about 20 numbers of it to a
    thread, of whose registers there are 255."""
    first, second = pieces(slot_size)
    rule = min(power_of_two(max(held_numbers(num_slots, slot_size, per_slot) // (32 * 24), 1)), 16)
    warps = _tuning.num_warps(kernel, device, num_slots, slot_size, heads, rule)
    return {
        "N": num_slots, "D": slot_size, "R": heads, "NP": power_of_two(num_slots), "P1": first, "P2": second,
        "num_warps": warps,
    }  # fmt: skip


def scan_sentence(
    kernel: str, steps: str, loop: str, num_slots: int, slot_size: int, heads: int, per_slot: int = 1
) -> str:
    """How ``kernel`` takes ``steps``, or else the ``loop``."""
    numbers = resident_numbers(num_slots, slot_size)
    if not fits_one_program(num_slots, slot_size):
        return (
            f"{loop}: the memory is {numbers} numbers with padding, more than the {RESIDENT_NUMBERS} that a program can "
            f"hold in registers; {_tiles_sentence(num_slots, slot_size, heads)}"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernels = (kernel, kernel + "_backward")
    forward, backward = (
        resident(x, device, num_slots, slot_size, heads, per_slot)["num_warps"] for x in kernels
    )
    return (
        f"one launch per direction for {steps}, a program per sample: its memory is {numbers} numbers with padding, of "
        f"{RESIDENT_NUMBERS} that a program can hold in registers; {forward} warps forward, {backward} backward"
    )


# ---- programs that go over a memory once, in tiles -----------------------------------------------------------------------


def tile_slots(num_slots: int, slot_size: int, heads: int) -> int:
    """Slots of a tile."""
    most = TILE_NUMBERS // (power_of_two(slot_size) * power_of_two(heads))
    return max(1, min(power_of_two(num_slots), power_of_two(most) if most else 1, 128))


def split(
    batch: int, num_slots: int, slot_size: int, heads: int, device: torch.device, each: int = 1
) -> tuple[dict[str, int], int, int]:
    """Constants of the kernel, programs per sample, and slots of each. One program, unless the samples alone would be fewer
    than ``each`` to a multiprocessor."""
    tile = tile_slots(num_slots, slot_size, heads)
    tiles = triton.cdiv(num_slots, tile)
    programs = 8  # in the interpreter: as many as a GPU might take, so that tests see them combined
    if device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        programs = max(1, each * multiprocessors // max(batch, 1))
    span = triton.cdiv(tiles, min(tiles, programs)) * tile
    padded = {"DP": power_of_two(slot_size), "RP": power_of_two(heads), "TILE": tile}
    return {"D": slot_size, "R": heads, **padded}, triton.cdiv(num_slots, span), span


def pass_sentence(num_slots: int, slot_size: int, heads: int) -> str:
    return f"one pass over the memory in {_tiles_sentence(num_slots, slot_size, heads)}"


def _tiles_sentence(num_slots: int, slot_size: int, heads: int) -> str:
    tile = tile_slots(num_slots, slot_size, heads)
    return f"tiles of {tile} slots, split over programs where there are few samples, whose results are then combined"
