"""Instructions that look at other lanes or at where a lane is: shuffles, votes, minima over a warp, special registers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from memory import SHARED_WINDOW
from operands import Operands, number, predicate

ACROSS: dict[str, Callable] = {}


def across(*names: str):
    def add(function: Callable) -> Callable:
        ACROSS.update(dict.fromkeys(names, function))
        return function

    return add


@across(
    "NOP", "YIELD", "ERRBAR", "CGAERRBAR", "CCTL", "MEMBAR", "FENCE", "UCGABAR_ARV", "DEPBAR", "ENDCOLLECTIVE"
)
def nothing(machine, o: Operands):
    """Warps go through their instructions in order, and all that they store is seen at once."""
    return lambda mask: None


@across("S2R", "S2UR", "CS2R")
def special_register(machine, o: Operands):
    lanes = np.arange(machine.lanes)
    block, thread, cluster = (
        lanes // machine.launch.threads,
        lanes % machine.launch.threads,
        machine.launch.cluster,
    )
    known = {
        "SR_TID.X": lambda: thread,
        "SR_TID.Y": lambda: thread * 0,
        "SR_TID.Z": lambda: thread * 0,
        "SR_CTAID.X": lambda: block + machine.first_block,
        "SR_CTAID.Y": lambda: thread * 0,
        "SR_CTAID.Z": lambda: thread * 0,
        "SR_LANEID": lambda: thread & 31,
        "SR_SWINHI": lambda: np.full(machine.lanes, SHARED_WINDOW),
        "SR_CgaCtaId": lambda: block % cluster,
        "SRZ": lambda: thread * 0,
    }
    to, name = o.texts
    if name not in known or (o.ins.base == "CS2R" and name != "SRZ"):
        raise o.unsupported(f"the register {name}")
    value = machine.name(known[name])
    if o.ins.base == "CS2R" and "32" not in o.ins.modifiers:
        return machine.expression(o.write_pair(to, f"{value}()"), "mask")
    return machine.expression(o.write(to, f"{value}()"), "mask")


def first_lane(machine, mask: np.ndarray) -> np.ndarray:
    """For each lane, the first of its warp that takes part."""
    first = mask.reshape(-1, 32).argmax(1) + np.arange(machine.warp_count) * 32
    return np.repeat(first, 32)


@across("R2UR")
def to_uniform(machine, o: Operands):
    o.allow()
    texts = [text for text in o.texts if predicate(text) is None]
    get = machine.expression(o.u(texts[1]))
    put = machine.expression(o.write(texts[0], "value"), "value, mask")
    return lambda mask: put(get()[first_lane(machine, mask)], mask)


@across("VOTE", "VOTEU")
def vote(machine, o: Operands):
    any_of = "ANY" in o.allow("ANY", "ALL")
    *to, of = o.texts
    get = machine.expression(o.p(of))
    puts = [
        machine.expression(
            o.write_predicate(text, "answer") if predicate(text) is not None else o.write(text, "bits"),
            "bits, answer, mask",
        )
        for text in to
    ]

    def run(mask):
        bits = machine.ballot(mask & get())
        answer = bits != 0 if any_of else bits == machine.ballot(mask)
        for put in puts:
            put(bits, answer, mask)

    return run


@across("REDUX")
def reduce(machine, o: Operands):
    how = o.allow("MIN", "MAX", "SUM", "OR", "AND", "XOR", "S32")
    signed = "S32" in how
    name = next((name for name in ("MIN", "MAX", "OR", "AND", "XOR") if name in how), "SUM")
    function, neutral = {
        "MIN": (np.minimum, 0x7FFFFFFF if signed else 0xFFFFFFFF),
        "MAX": (np.maximum, -0x80000000 if signed else 0),
        "SUM": (np.add, 0),
        "OR": (np.bitwise_or, 0),
        "AND": (np.bitwise_and, -1 if signed else 0xFFFFFFFF),
        "XOR": (np.bitwise_xor, 0),
    }[name]
    get = machine.expression((o.i if signed else o.u)(o.texts[1]))
    put = machine.expression(o.write(o.texts[0], "value"), "value, mask")

    def run(mask):
        value = get()
        result = function.reduce(np.where(mask, value, value.dtype.type(neutral)).reshape(-1, 32), axis=1)
        put(np.repeat(result.astype(value.dtype), 32), mask)

    return run


@across("SHFL")
def shuffle(machine, o: Operands):
    (way,) = o.allow("BFLY", "IDX", "UP", "DOWN")
    there, to, of, by_text, range_text = o.texts
    get, get_by, get_range = (machine.expression(o.u(text)) for text in (of, by_text, range_text))
    put = machine.expression(
        f"({o.write(to, 'value')}, {o.write_predicate(there, 'there')})", "value, there, mask"
    )
    lane = np.arange(machine.lanes) & 31
    base = np.arange(machine.lanes) - lane

    def source():
        by, limits = get_by().astype(np.int64) & 31, get_range().astype(np.int64)
        segment, clamp = limits >> 8 & 31, limits & 31
        last = lane & segment | clamp & ~segment
        meant = {
            "BFLY": lane ^ by,
            "IDX": lane & segment | by & ~segment,
            "UP": lane - by,
            "DOWN": lane + by,
        }[way]
        there = meant >= last if way == "UP" else meant <= last
        return base + np.where(there, meant, lane), there

    fixed = source() if number(by_text) is not None and number(range_text) is not None else None

    def run(mask):
        lanes, there = fixed or source()
        if not mask[lanes[mask]].all():
            raise o.unsupported("it takes a value from a lane that does not take part")
        put(get()[lanes], there, mask)

    return run
