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


def mann_step_flop(
    steps: int, batch: int, inputs: int, hidden: int, outputs: int, slots: int, size: int, heads: int
) -> int:
    """Forward and backward of a MANN with its defaults, without the gradient of its input.

    A product counts three times (itself, the gradient of either factor), the input's twice; the memory as in
    :func:`lrua_scan_flop`.
    """
    reads = heads * size
    products = 3 * ((hidden + reads) * (4 * hidden + outputs) + hidden * (2 * reads + 2 * heads))
    products += 2 * inputs * 4 * hidden
    return 2 * steps * batch * products + lrua_scan_flop(steps, batch, slots, size, heads, backward=True)
