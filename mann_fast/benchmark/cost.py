"""Counted floating-point operations of the ops: a multiply-add is two. Softmax, norms of keys and usage are not counted:
they are of order R N where everything here is of order R N D."""

from __future__ import annotations


def lrua_scan_flop(
    steps: int, batch: int, slots: int, size: int, heads: int, *, backward: bool = False
) -> int:
    """Forward, per slot element and step: add (R), dot (R), norm (1) and read (R) multiply-adds.

    With ``backward`` the sum of both: back through read (R for the weights, R for the memory), similarity (R for the key,
    R for the memory, 1 for the norm) and write (R for the weights, R for the vector), and once more add, dot and norm,
    which some form of recomputation (or reading back what was kept) takes on every implementation.
    """
    elements = steps * batch * slots * size
    forward = 2 * (3 * heads + 1)
    if not backward:
        return elements * forward
    return elements * (forward + 2 * (6 * heads + 1) + 2 * (2 * heads + 1))
