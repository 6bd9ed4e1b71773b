"""Where warps go: jumps, calls, barriers of convergence and of blocks.

Each is a function of the lanes that stand at the instruction and of those that take part. It moves them on and tells which
jumped.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
from operands import Operands

CONTROLS: dict[str, Callable] = {}
LANE_BITS = np.uint32(1) << np.arange(32, dtype=np.uint32)


def control(*names: str):
    def add(function: Callable) -> Callable:
        CONTROLS.update(dict.fromkeys(names, function))
        return function

    return add


def stay(machine, group: np.ndarray, mask: np.ndarray, address: int) -> None:
    if mask is not group and (rest := group & ~mask).any():
        machine.move(rest, address + 16)


@control("BRA")
def branch(machine, o: Operands):
    how, ins = o.allow("DIV", "U", "ANY", "CONV"), o.ins
    texts = [text for text in o.texts if "`(" not in text]
    if ins.target is None:
        raise o.unsupported("where it goes")
    parts = machine.expression(o.u(texts[-1])) if how & {"DIV", "CONV"} else None
    condition = machine.expression(o.p(texts[0])) if texts and parts is None else None

    def run(group, mask):
        jumps = mask
        if condition is not None:
            jumps = mask & condition()
        elif parts is not None:  # whether lanes that the operand names are elsewhere
            apart = parts() & ~machine.ballot(group) & ~machine.ballot(machine.gone) != 0
            jumps = mask & (apart if "DIV" in how else ~apart)
        stay(machine, group, jumps, ins.address)
        if jumps.any():
            machine.move(jumps, ins.target)
        return jumps

    return run


@control("CALL")
def call(machine, o: Operands):
    ins = o.ins
    if "REL" not in ins.modifiers or ins.target is None:
        raise o.unsupported("where it goes")

    def run(group, mask):
        stay(machine, group, mask, ins.address)
        machine.move(mask, ins.target)
        return mask

    return run


@control("RET", "BRX")
def to_register(machine, o: Operands):
    ins = o.ins
    if ins.base == "RET" and "REL" not in ins.modifiers:
        raise o.unsupported("an absolute return")
    match = re.match(r"(U?R\d+)\s*\+?\s*(-?0x[0-9a-f]+)?", o.texts[0])
    row = machine.R[o.row(match[1])].view(np.int32)
    base = 0 if ins.base == "RET" else ins.address + 16 + int(match[2] or "0", 16)

    def run(group, mask):
        stay(machine, group, mask, ins.address)
        for target in set(row[mask].tolist()):
            machine.move(mask & (row == target), target + base)
        return mask

    return run


@control("EXIT")
def end(machine, o: Operands):
    def run(group, mask):
        machine.gone = machine.gone | mask
        stay(machine, group, mask, o.ins.address)
        for name in [
            name
            for name, lanes in machine.waiting.items()
            if name not in ("block", "cluster") and lanes.any()
        ]:
            machine.release(name)
        return None

    return run


@control("BSSY")
def expect(machine, o: Operands):
    name = o.texts[0]

    def run(group, mask):
        np.copyto(machine.meets[name], machine.ballot(mask), where=mask)
        machine.move(group, o.ins.address + 16)
        return None

    return run


def wait(machine, name: str, mask: np.ndarray, address: int) -> None:
    machine.waiting[name] = machine.waiting[name] | mask
    machine.resume[mask] = address + 16


@control("BSYNC")
def meet(machine, o: Operands):
    name = o.texts[0]

    def run(group, mask):
        stay(machine, group, mask, o.ins.address)
        wait(machine, name, mask, o.ins.address)
        machine.release(name)
        return None

    return run


@control("BREAK")
def leave(machine, o: Operands):
    name = o.texts[-1]
    condition = machine.expression(o.p(o.texts[0])) if len(o.texts) > 1 else None

    def run(group, mask):
        leaving = mask if condition is None else mask & condition()
        machine.meets[name] &= ~machine.ballot(leaving)
        machine.move(group, o.ins.address + 16)
        machine.release(name)
        return None

    return run


@control("BMOV")
def move_barrier(machine, o: Operands):
    how = o.allow("32", "CLEAR", "PQUAD")
    to, of = o.texts[:2]

    def run(group, mask):
        if re.fullmatch(r"B\d+", to):
            np.copyto(machine.meets[to], machine.R[o.row(of)], where=mask)
        else:
            np.copyto(machine.R[o.row(to)], machine.meets[of], where=mask)
            if "CLEAR" in how:
                machine.meets[of][mask] = 0
        machine.move(group, o.ins.address + 16)
        return None

    return run


@control("WARPSYNC")
def warp_sync(machine, o: Operands):
    how = o.allow("ALL", "EXCLUSIVE")
    names = o.machine.expression(o.u(o.texts[0])) if "ALL" not in how else None
    name = f"WARPSYNC 0x{o.ins.address:x}"

    def run(group, mask):
        stay(machine, group, mask, o.ins.address)
        np.copyto(machine.meets[name], names() if names else np.uint32(0xFFFFFFFF), where=mask)
        wait(machine, name, mask, o.ins.address)
        machine.release(name)
        return None

    return run


@control("BAR", "UCGABAR_WAIT")
def barrier(machine, o: Operands):
    ins = o.ins
    if ins.base == "BAR" and (o.texts != ["0x0"] or set(ins.modifiers) != {"SYNC", "DEFER_BLOCKING"}):
        raise o.unsupported("a barrier of some of the threads, or that does not wait")
    name = "block" if ins.base == "BAR" else "cluster"

    def run(group, mask):
        if (machine.warps(mask) & ~mask & ~machine.gone).any():
            raise o.unsupported("only some lanes of a warp come to it")
        stay(machine, group, mask, ins.address)
        wait(machine, name, mask, ins.address)
        return None

    return run
