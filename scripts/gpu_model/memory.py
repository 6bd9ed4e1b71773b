"""What kernels load and store: this process's own memory, and the shared and local memory of the blocks that run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from machine_code import RESERVED
from operands import RZ, UNIFORM, Operands, Unsupported, predicate, register

SHARED_WINDOW = 0x7F000000  # upper half of a generic address of shared memory; no process has such
RANK = 24  # bit of a shared address at which the block's rank in its cluster begins
SPACES = {"LDS": "shared", "STS": "shared", "LD": "generic", "ST": "generic", "LDG": "global", "STG": "global",
          "LDL": "local", "STL": "local"}  # fmt: skip
ORIGIN, END = 1 << 16, 1 << 48  # of the addresses that a process may have


class _Everything:
    """All of this process's memory as an array: what is touched is looked up in its map before."""

    __array_interface__ = {"data": (ORIGIN, False), "shape": (END - ORIGIN,), "typestr": "|u1", "version": 3}


class Memory:
    """For `blocks` blocks of `threads` threads: `size` bytes of shared memory for a block, `stack` bytes for a lane."""

    def __init__(self, blocks: int, threads: int, size: int, stack: int, cluster: int) -> None:
        self.size, self.stride, self.stack = size, -(-size // 16) * 16, stack
        shared = np.empty(blocks * self.stride, np.uint8)
        local = np.empty(blocks * threads * stack, np.uint8)
        everything = np.asarray(_Everything())
        arrays = {"shared": shared, "cluster": shared, "local": local, "global": everything}
        kinds = {1: np.uint8, 2: np.uint16, 4: np.uint32}
        self.views = {
            (name, n): array.view(kind) for name, array in arrays.items() for n, kind in kinds.items()
        }
        lanes = np.arange(blocks * threads)
        self.local_base = lanes * stack
        self.rank = lanes // threads % cluster  # of the lane's block in its cluster,
        self.first_block = lanes // threads - self.rank  # and that cluster's first block
        self.cluster = cluster
        self.waves: dict[tuple, list[int]] = {}
        self._know_process()

    def _know_process(self) -> None:
        rows = re.findall(r"(?m)^(\w+)-(\w+) r", Path("/proc/self/maps").read_text())
        self.places = np.array([(int(a, 16), int(b, 16)) for a, b in rows if int(b, 16) < END], np.int64)

    def clear(self) -> None:
        """As memory is before a block runs: NaN in every format."""
        self.views["shared", 1].fill(0xFF)
        self.views["local", 1].fill(0xFF)
        self._know_process()

    def locate(self, o: Operands, declared: str, address: np.ndarray, mask: np.ndarray, size: int):
        """Which memory these addresses of the lanes that take part mean, and where in its array."""
        asked, space = address[mask], declared
        if space == "generic":
            shared = asked >> 32 == SHARED_WINDOW
            space = "shared" if shared.all() else "global"
            if shared.any() and space == "global":
                raise o.unsupported("lanes ask for shared and for device memory at once")
        if (asked & size - 1).any():
            raise self._wrong(o, "that is not aligned", asked[asked & size - 1 != 0])
        if space == "global":
            row = np.searchsorted(self.places[:, 0], asked, "right") - 1
            bad = (row < 0) | (asked + size > self.places[row, 1])
            at = asked - ORIGIN
        elif space == "shared":
            within = asked & (1 << RANK) - 1
            rank = (asked & 0xFFFFFFFF) >> RANK
            bad = (within < RESERVED) | (within + size > self.size) | (rank >= self.cluster)
            at = (self.first_block[mask] + rank) * self.stride + within
            space = "shared" if (rank == self.rank[mask]).all() else "cluster"
        else:
            bad = (asked < 0) | (asked + size > self.stack)
            at = self.local_base[mask] + asked
        if bad.any():
            raise self._wrong(o, f"of the {space} memory that is not there", asked[bad])
        return space, at

    def _wrong(self, o: Operands, why: str, addresses: np.ndarray) -> Unsupported:
        return o.unsupported(f"a place {why}, 0x{int(addresses[0]):x}")

    def wavefronts(self, space: str, at: np.ndarray, mask: np.ndarray, size: int) -> list[int]:
        """Of each warp: sectors of 32 bytes that an access of device memory touches. Of shared memory, for how many cycles it
        keeps it: of all that lanes ask for together (half a warp with 8 bytes each, a quarter with 16), the most different
        words of one bank."""
        key = (at.tobytes(), mask.tobytes(), size)
        if space != "global" and (found := self.waves.get(key)) is not None:
            return found
        words = max(1, size // 4)
        first = np.full(len(mask), -1)
        first[mask] = at >> (5 if space == "global" else 2)
        rows = first.reshape(-1, 32)
        if space != "global":
            rows = np.where(first < 0, -1, first + np.arange(words)[:, None]).T.reshape(-1, 32)
        rows = np.sort(rows, axis=1)
        new = rows >= 0
        new[:, 1:] &= rows[:, 1:] != rows[:, :-1]
        if space == "global":  # addresses that hardly come again
            return new.sum(1).tolist()
        banks = np.arange(len(rows))[:, None] * 32 + (rows & 31)
        counts = np.bincount(banks[new], minlength=32 * len(rows)).reshape(len(rows), 32).max(1)
        found = self.waves[key] = counts.reshape(-1, words).sum(1).tolist()
        return found


def address_of(o: Operands, text: str) -> Callable[[], np.ndarray]:
    """The bytes that the lanes mean."""
    inner = re.sub(r"^desc\[[^\]]*\]", "", text).strip("[]").replace(" ", "")
    fixed, terms = 0, []
    is_long = SPACES[o.ins.base] in ("generic", "global")
    for sign, part in re.findall(r"([+-]?)([^+-]+)", inner):
        if part.startswith("0x"):
            fixed += -int(part, 16) if sign == "-" else int(part, 16)
            continue
        name, _, kind = part.partition(".")
        row = o.row(name)
        if sign == "-" or kind not in ("", "64", "U32", "X4", "X8", "X16"):
            raise o.unsupported(f"{part} in an address")
        if row == RZ:
            continue
        # Beside a register of 32 bits in an address of 64, a uniform one is two.
        if kind == "64" or (is_long and row >= UNIFORM):
            terms.append(f"wide(R{row}, R{row + 1}).view(i64)")
        else:
            terms.append(f"R{row}.astype(i64)" + (f" * {kind[1:]}" if kind.startswith("X") else ""))
    return o.machine.expression(" + ".join([*terms, o.fixed(fixed, np.int64)]))


MODIFIERS = "E 64 128 U U8 S8 U16 S16 CONSTANT LU EF EL NA STRONG GPU SYS CONSTANT".split()


def access(o: Operands):
    """A function of the lanes that take part, which loads or stores and tells the memory and each warp's wavefronts."""
    how, memory, rows, ins = o.allow(*MODIFIERS), o.machine.memory, o.machine.R, o.ins
    size = (
        16
        if "128" in how
        else 8
        if "64" in how
        else 2
        if how & {"U16", "S16"}
        else 1
        if how & {"U8", "S8"}
        else 4
    )
    loads, declared = ins.base.startswith("LD"), SPACES[ins.base]
    texts = [text for text in o.texts if predicate(text) is None]
    address = address_of(o, texts[1 if loads else 0])
    register_text = texts[0 if loads else 1]
    first, unit = o.row(register_text), min(size, 4)
    signed = {"S8": np.int8, "S16": np.int16}.get(next(iter(how & {"S8", "S16"}), ""), None)

    def run(mask: np.ndarray) -> tuple[str, list[int]]:
        space, at = memory.locate(o, declared, address(), mask, size)
        data, index = memory.views[space, unit], at // unit
        for j in range(max(1, size // 4)):
            row = first if first == RZ else first + j
            if not loads:
                data[index + j] = rows[row][mask]
            elif first != RZ:
                found = data[index + j]
                rows[row][mask] = (
                    found if signed is None else found.view(signed).astype(np.int32).view(np.uint32)
                )
        if space == "local":
            return space, [max(1, size // 4)] * (len(mask) // 32)
        return space, memory.wavefronts(space, at, mask, size)

    return run


def constant_load(o: Operands):
    """LDC: a place that is known, or one that lanes compute."""
    how, machine = o.allow("64", "128", "U8", "S8", "U16", "S16"), o.machine
    size = 8 if "64" in how else 2 if how & {"U16", "S16"} else 1 if how & {"U8", "S8"} else 4
    match = re.fullmatch(r"c\[0x(\w+)\]\s*\[(?:(U?R\w+)\s*\+?\s*)?(-?0x\w+)?\]", o.texts[1])
    if match is None or "128" in how:
        raise o.unsupported(f"the operand {o.texts[1]}")
    bank, row, fixed = int(match[1], 16), register(match[2] or "RZ"), int(match[3] or "0", 16)
    bits = 8 * min(size, 4)

    def value(at: int) -> int:
        word = machine.constant(bank, at & ~3, o.ins) >> 8 * (at & 3)
        word &= (1 << bits) - 1
        return word - (1 << bits) & 0xFFFFFFFF if how & {"S8", "S16"} and word >> bits - 1 else word

    to = o.row(o.texts[0])
    words = range(2 if size == 8 else 1)

    def run(mask: np.ndarray) -> None:
        where = machine.warps(mask) if to >= UNIFORM else mask
        if row == RZ:
            for j in words:
                np.copyto(machine.R[to + j], np.uint32(value(fixed + 4 * j)), where=where)
            return
        at = machine.R[row].view(np.int32) + fixed
        for one in set(at[mask].tolist()):
            for j in words:
                np.copyto(machine.R[to + j], np.uint32(value(one + 4 * j)), where=where & (at == one))

    return run
