"""Operands of instructions, as Python expressions over the rows of registers of all lanes.

R5, F5 and I5 name a register's row as unsigned integers, floats and signed integers, P3 a predicate's. Uniform registers
and predicates have rows of their own behind the others, and hold the same for all lanes of a warp.
"""

from __future__ import annotations

import re

import numpy as np
from machine_code import Instruction

RZ, UNIFORM, ROWS = 255, 256, 256 + 64  # the register that is 0, the first uniform one, and all
PT, UNIFORM_PREDICATE = 7, 8  # the same of predicates: the last of each eight is true
FLOATS = {"INF": np.inf, "QNAN": np.nan, "SNAN": np.nan}
CONSTANT = re.compile(r"c\[0x([0-9a-f]+)\]\s*\[(.*)\]")


class Unsupported(Exception):
    """Where the model cannot go on, in one line: what it does not know, or what a kernel may not do."""

    def __init__(self, ins: Instruction, why: str) -> None:
        super().__init__(f"the model cannot go through {ins.text!r} at 0x{ins.address:x}: {why}")


def register(text: str) -> int | None:
    match = re.fullmatch(r"(U?)R(Z|\d+)(\.64)?", text)
    if match is None:
        return None
    return RZ if match[2] == "Z" else int(match[2]) + (UNIFORM if match[1] else 0)


def predicate(text: str) -> int | None:
    match = re.fullmatch(r"!?(U?)P(T|\d)", text)
    if match is None:
        return None
    return (PT if match[2] == "T" else int(match[2])) + (UNIFORM_PREDICATE if match[1] else 0)


def number(text: str) -> int | float | None:
    if re.fullmatch(r"[+-]?0x[0-9a-f]+", text):
        return int(text, 16)
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if text.lstrip("+-") in FLOATS:
        return -FLOATS[text.lstrip("+-")] if text.startswith("-") else FLOATS[text.lstrip("+-")]
    try:
        return float(text)
    except ValueError:
        return None


class Operands:
    """Of one instruction: expressions for what it reads, statements for what it writes."""

    def __init__(self, machine, ins: Instruction) -> None:
        self.machine, self.ins = machine, ins
        self.texts = list(ins.operands)

    def unsupported(self, why: str) -> Unsupported:
        return Unsupported(self.ins, why)

    def allow(self, *modifiers: str) -> set[str]:
        """The modifiers, where all of them are among these."""
        found = set(self.ins.modifiers)
        if more := found - set(modifiers):
            raise self.unsupported(f"the modifier {', '.join(sorted(more))}")
        return found

    def fixed(self, value: int | float, kind: type) -> str:
        """The name of a row that holds this number everywhere."""
        row = np.broadcast_to(np.array([value]).astype(kind), (self.machine.lanes,))
        return self.machine.name(row)

    # ---- read -------------------------------------------------------------------------------------------------------

    def _signed(self, text: str, of) -> str:
        """What `of` makes of the text without its signs, with them."""
        plain, signs = text, ""
        while plain[0] in "-~|" and number(plain) is None:
            signs, plain = signs + plain[0], plain[1:]
        found = of(plain.rstrip("|"))
        for sign in reversed(signs):
            found = f"abs({found})" if sign == "|" else f"({sign}{found})"
        return found

    def _words(self, text: str, count: int) -> list[int]:
        """Of a constant at a place that is known."""
        match = CONSTANT.fullmatch(text)
        if match is None:
            raise self.unsupported(f"the operand {text}")
        inside = re.sub(r"^U?RZ\+", "", match[2].replace(" ", ""))
        if not re.fullmatch(r"-?0x[0-9a-f]+", inside):
            raise self.unsupported(f"the place of the constant {text}")
        bank, at = int(match[1], 16), int(inside, 16)
        return [self.machine.constant(bank, at + 4 * i, self.ins) for i in range(count)]

    def u(self, text: str, letter: str = "R", kind: type = np.uint32) -> str:
        def of(plain: str) -> str:
            if (row := register(plain)) is not None:
                return f"{letter}{row}"
            value = number(plain)
            if value is None:
                value = self._words(plain, 1)[0]
            if isinstance(value, float):
                value = int(np.float32(value).view(np.uint32))
            return self.machine.name(self.full(value & 0xFFFFFFFF, np.uint32).view(kind))

        return self._signed(text, of)

    def full(self, value: int, kind: type) -> np.ndarray:
        return np.broadcast_to(np.array([value], kind), (self.machine.lanes,))

    def i(self, text: str) -> str:
        return self.u(text, "I", np.int32)

    def f(self, text: str) -> str:
        value = number(text)
        if value is not None and "x" not in text:
            return self.fixed(float(value), np.float32)
        return self.u(text, "F", np.float32)

    def w(self, text: str) -> str:
        """64 bits, two registers, unsigned."""

        def of(plain: str) -> str:
            if (row := register(plain)) is not None:
                return f"wide(R{row}, R{row if row == RZ else row + 1})"
            value = number(plain)
            if value is None:
                low, high = self._words(plain, 2)
                value = low | high << 32
            return self.machine.name(self.full(int(value) & (1 << 64) - 1, np.uint64))

        return self._signed(text, of)

    def d(self, text: str) -> str:
        value = number(text)
        if value is not None:  # hexadecimal: the bits of the upper half
            bits = np.uint64(value << 32).view(np.float64) if "x" in text else value
            return self.fixed(bits, np.float64)
        return self._signed(text, lambda plain: f"{self.w(plain)}.view(f64)")

    def p(self, text: str) -> str:
        row = predicate(text)
        if row is None:
            raise self.unsupported(f"the predicate {text}")
        return f"(~P{row})" if text.startswith("!") else f"P{row}"

    def half(self, text: str) -> str:
        """One float16 of a register, as floats."""
        found = re.fullmatch(r"(-?)(U?R\d+)\.H([01])_H\3", text)
        if found is None:
            raise self.unsupported(f"the operand {text}")
        return f"{found[1]}half(R{register(found[2])}, {found[3]})"

    def take_predicate(self) -> str | None:
        """The first operand, where it is a predicate that is written."""
        return self.texts.pop(0) if predicate(self.texts[0]) is not None else None

    # ---- write ------------------------------------------------------------------------------------------------------

    def row(self, text: str) -> int:
        row = register(text)
        if row is None:
            raise self.unsupported(f"{text} as a register")
        return row

    def write(self, text: str, value: str, letter: str = "R", further: int = 0) -> str:
        """Into the register, or one of those after it; what the value is of is converted as C would."""
        row = self.row(text)
        if row == RZ:
            return value
        where = "warps(mask)" if row >= UNIFORM else "mask"
        return f"copyto({letter}{row + further}, {value}, 'unsafe', {where})"

    def write_pair(self, text: str, value: str) -> str:
        low, high = self.write(text, "v"), self.write(text, "v >> u64(32)", "R", 1)
        return f"(v := ({value}).view(u64), {low}, {high})"

    def write_predicate(self, text: str | None, value: str) -> str:
        row = PT if text is None else predicate(text)
        if row & 7 == PT:
            return "None"
        where = "warps(mask)" if row >= UNIFORM_PREDICATE else "mask"
        return f"copyto(P{row}, {value}, 'unsafe', {where})"
