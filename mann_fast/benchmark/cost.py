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


def lrua_scan_bytes(
    steps: int, batch: int, slots: int, size: int, heads: int, *, backward: bool = False, item: int = 4
) -> int:
    """What must pass the memory of a device where a sample's memory stays on the chip through all steps: inputs and reads
    of every step, the state in and out. With ``backward`` also the inputs again, their gradients, the gradients of reads
    and state, and what is kept for it: the memory and read weights every few steps, written and read."""
    per_step = batch * (2 * heads * size + 2 * heads)
    state = batch * (slots * size + heads * slots + slots)
    numbers = steps * (per_step + batch * heads * size) + 2 * state
    if backward:
        kept = steps * batch * heads * (slots + size)  # at most: see mann_fast._anchors
        numbers += steps * (2 * per_step + batch * heads * size) + 3 * state + 2 * kept
    return item * numbers


def lrua_write_flop(batch: int, slots: int, size: int, heads: int, *, backward: bool = False) -> int:
    """Per slot element R multiply-adds; back R for the weights' gradient and R for the vectors'."""
    return 2 * batch * slots * size * heads * (3 if backward else 1)


def lrua_write_bytes(
    batch: int, slots: int, size: int, heads: int, *, backward: bool = False, item: int = 4
) -> int:
    """Memory and read weights in and out, usage in; back the gradients of both in and out, and the read weights."""
    memory, weights = batch * slots * size, batch * heads * slots
    return item * (2 * (memory + weights) + batch * slots + (2 * memory + 3 * weights if backward else 0))


def content_read_flop(batch: int, slots: int, size: int, heads: int, *, backward: bool = False) -> int:
    """Per slot element dot (R), norm (1) and read (R) multiply-adds; back dot and norm again, dL/dw (R), and the gradients
    of key (R) and memory (2 R + 1)."""
    forward = 2 * (2 * heads + 1)
    return batch * slots * size * (forward + (2 * (5 * heads + 2) if backward else 0))


def content_read_bytes(
    batch: int, slots: int, size: int, heads: int, *, backward: bool = False, item: int = 4
) -> int:
    """The memory once and the weights out; back the memory and the weights again and the memory's gradient."""
    memory, weights = batch * slots * size, batch * heads * slots
    return item * (memory + weights + (2 * memory + weights if backward else 0))


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


def ntm_scan_flop(
    steps: int,
    batch: int,
    slots: int,
    size: int,
    read_heads: int,
    write_heads: int,
    *,
    backward: bool = False,
) -> int:
    """Forward, per slot element and step: dot (R + W), norm (1), read (R) and per write head two for what is kept and one for
    what is added. With ``backward`` also: the write again (3 W), dot and norm again, the gradients of read (2 R), similarity
    (2 (R + W) + 1) and write (6 W). What goes over one row of slots (softmax, shift, power) is not counted."""
    heads = read_heads + write_heads
    forward = 2 * (heads + 1 + read_heads + 3 * write_heads)
    back = 2 * (3 * write_heads + heads + 1 + 2 * read_heads + 2 * heads + 1 + 6 * write_heads)
    return steps * batch * slots * size * (forward + (back if backward else 0))


def ntm_scan_bytes(
    steps: int,
    batch: int,
    slots: int,
    size: int,
    read_heads: int,
    write_heads: int,
    *,
    backward: bool = False,
    item: int = 4,
) -> int:
    """What must pass where a sample's memory stays on the chip: inputs and reads of every step, the state in and out; with
    ``backward`` the inputs again with their gradients, and the weights of every step written and read."""
    heads = read_heads + write_heads
    per_step = batch * (heads * (size + 6) + 2 * write_heads * size)
    state = batch * (slots * size + heads * slots)
    numbers = steps * (per_step + batch * read_heads * size) + 2 * state
    if backward:
        numbers += steps * (2 * per_step + batch * read_heads * size + 2 * batch * heads * slots) + 3 * state
    return item * numbers


def dnc_scan_flop(
    steps: int, batch: int, slots: int, size: int, heads: int, *, backward: bool = False
) -> int:
    """Forward, per step: of the links 3 for what they become and 2 R for both directions, per pair of slots; of the memory,
    per number, R + 1 dots, 2 norms, 2 for the write and R for the read.

    With ``backward`` also: of the links two replays (6), R for each of two products, two outer products (4 R) and 8 for what
    goes through the update; of the memory two replays (4), dots and norms again (R + 3), the gradients of read (2 R),
    similarity (2 (R + 1) + 2) and write (4). What goes over one row of slots is not counted. With links, without masks."""
    links = 3 + 2 * heads + (6 + 4 * heads + 8 if backward else 0)
    memory = 2 * heads + 5 + (4 + heads + 3 + 2 * heads + 2 * heads + 4 + 4 if backward else 0)
    return 2 * steps * batch * (links * slots * slots + memory * slots * size)


def sparse_scan_flop(
    steps: int, batch: int, slots: int, size: int, heads: int, reads: int, *, backward: bool = False
) -> int:
    """Forward, per step: dot (R) and norm (1) of every slot; of each head, K + 1 rows written and K read. With ``backward``
    also, of each head, six times K rows for the read and twice K + 1 for the write."""
    rows = heads * (2 * reads + 1 + (6 * reads + 2 * (reads + 1) if backward else 0))
    return 2 * steps * batch * size * (slots * (heads + 1) + rows)


def sparse_read_flop(
    batch: int, slots: int, size: int, heads: int, reads: int, *, backward: bool = False
) -> int:
    """What a step of :func:`sparse_scan_flop` has without its write."""
    rows = heads * reads * (7 if backward else 1)
    return 2 * batch * size * (slots * (heads + 1) + rows)


def sparse_scan_bytes(
    steps: int,
    batch: int,
    slots: int,
    size: int,
    heads: int,
    reads: int,
    *,
    backward: bool = False,
    item: int = 4,
) -> int:
    """The memory read at every step, and once in and out; with ``backward`` its gradient out, and the rows of every step
    written and read."""
    memory = batch * slots * size
    numbers = (steps + 2) * memory + (memory + 2 * steps * batch * heads * reads * size if backward else 0)
    return item * numbers


def dnc_scan_bytes(
    steps: int, batch: int, slots: int, size: int, heads: int, *, backward: bool = False, item: int = 4
) -> int:
    """What must pass where a sample's memory and links stay on the chip: interface and reads of every step, the state in and
    out; with ``backward`` the interface again with its gradients, and weights and order (int64) of every step written and
    read."""
    per_step = batch * (heads * size + 3 * size + 5 * heads + 3)
    state = batch * (slots * slots + slots * size + (heads + 3) * slots)
    numbers = steps * (per_step + batch * heads * size) + 2 * state
    if not backward:
        return item * numbers
    numbers += steps * (2 * per_step + batch * heads * size + 2 * batch * (heads + 1) * slots) + 3 * state
    return item * numbers + 8 * 2 * steps * batch * slots
