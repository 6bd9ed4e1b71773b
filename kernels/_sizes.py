"""What a Triton program can hold of a memory."""

from __future__ import annotations

RESIDENT_NUMBERS = 16384  # of a memory, in the registers of one program


def power_of_two(number: int) -> int:
    """The least that is not below ``number`` >= 1."""
    return 1 << (number - 1).bit_length()


def pieces(slot_size: int) -> tuple[int, int]:
    """The width of a slot as two powers of two. Where one is enough the second is 1, all of it padding."""
    first = 1 << (slot_size.bit_length() - 1)
    return first, power_of_two(max(slot_size - first, 1))


def resident_numbers(num_slots: int, slot_size: int) -> int:
    """Numbers that one program holds of a memory."""
    first, second = pieces(slot_size)
    return power_of_two(num_slots) * (first if slot_size == first else first + second)


def fits_one_program(num_slots: int, slot_size: int) -> bool:
    """Whether a program holds a whole memory in registers; else a scan is a loop of steps."""
    return resident_numbers(num_slots, slot_size) <= RESIDENT_NUMBERS
