"""Blocks of threads, all their lanes side by side: one instruction is one operation on all warps that stand at it.

Lanes that are furthest behind run first, so that those that part meet where the code says (BSSY, BSYNC, WARPSYNC). Which
instructions each warp went through is what comes of it, and the clock (clock.py) works from that alone: in a kernel without
races no number depends on time.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np
from arithmetic import MEANINGS
from capture import Launch
from flow import CONTROLS
from lanes import ACROSS
from machine_code import RESERVED, Instruction, Kernel
from memory import SPACES, Memory, access, constant_load
from operands import PT, ROWS, UNIFORM_PREDICATE, Operands, Unsupported, predicate
from values import CALLED


class Step(NamedTuple):
    """What a warp did: an instruction, whether any lane took part, whether any jumped, and what it asked of a memory."""

    address: int
    active: bool
    taken: bool = False
    space: str = ""
    waves: int = 0


class Machine:
    """Room for `blocks` blocks of a launch."""

    def __init__(self, kernel: Kernel, launch: Launch, blocks: int) -> None:
        self.kernel, self.launch, self.blocks = kernel, launch, blocks
        self.lanes = lanes = blocks * launch.threads
        self.warp_count = lanes // 32
        size = RESERVED + kernel.static_shared + launch.shared
        self.local = -(-kernel.stack // 16) * 16 + 256  # bytes of a lane's stack
        self.memory = Memory(blocks, launch.threads, size, self.local, launch.cluster)
        self.R = np.zeros((ROWS, lanes), np.uint32)
        self.P = np.zeros((2 * UNIFORM_PREDICATE, lanes), bool)
        names = {f"R{i}": row for i, row in enumerate(self.R)}
        names |= {f"F{i}": row for i, row in enumerate(self.R.view(np.float32))}
        names |= {f"I{i}": row for i, row in enumerate(self.R.view(np.int32))}
        names |= {f"P{i}": row for i, row in enumerate(self.P)}
        self.names = CALLED | names | {"warps": self.warps}
        self._bank = self._first_bank()
        self._decoded: dict[int, tuple] = {}
        self._warps: dict[bytes, np.ndarray] = {}
        self._rows: dict[bytes, list[bool]] = {}
        # What warps can do, in the order in which it was seen first; a trace names them by their places there.
        self.steps: dict[Step, int] = {}
        self.traces: list[list[int]] = []

    # ---- for operands and instructions --------------------------------------------------------------------------------

    def name(self, row: np.ndarray) -> str:
        self.names[name := f"K{len(self.names)}"] = row
        return name

    def expression(self, text: str, parameters: str = ""):
        return eval(f"lambda {parameters}: {text}", self.names)

    def warps(self, mask: np.ndarray) -> np.ndarray:
        """All lanes of the warps of these."""
        key = mask.tobytes()
        if (found := self._warps.get(key)) is None:
            found = self._warps[key] = np.repeat(mask.reshape(-1, 32).any(1), 32)
        return found

    def rows(self, mask: np.ndarray) -> list[bool]:
        """Of each warp, whether any of these lanes is in it."""
        key = mask.tobytes()
        if (found := self._rows.get(key)) is None:
            found = self._rows[key] = mask.reshape(-1, 32).any(1).tolist()
        return found

    def ballot(self, mask: np.ndarray) -> np.ndarray:
        """For each lane, its warp's lanes of these as bits."""
        bits = np.packbits(mask.reshape(-1, 32), axis=1, bitorder="little").view(np.uint32)
        return np.repeat(bits, 32)

    def _first_bank(self) -> np.ndarray:
        """Constants of the launch, by words; -1 where nobody knows what there is."""
        bank, launch = np.full(0x1000 // 4 + 1024, -1, np.int64), self.launch
        known = {0x0: launch.threads, 0x4: 1, 0x8: 1, 0xC: launch.blocks, 0x10: 1, 0x14: 1}
        # The stack's end; descriptors of memory; whether there are clusters.
        known |= {0x28: self.local, 0x118: 0, 0x11C: 0, 0x208: 0, 0x20C: 0, 0x140: int(launch.cluster > 1)}
        for at, value in known.items():
            bank[at // 4] = value
        words = np.frombuffer(launch.parameters + bytes(-len(launch.parameters) % 4), np.uint32)
        bank[self.kernel.parameters_at // 4 :][: len(words)] = words
        return bank

    def constant(self, bank: int, at: int, ins: Instruction) -> int:
        if bank == 0:
            value = int(self._bank[at // 4]) if 0 <= at < 4 * len(self._bank) else -1
        else:
            data = self.kernel.constants.get(bank, b"")
            value = int.from_bytes(data[at : at + 4], "little") if 0 <= at <= len(data) - 4 else -1
        if value < 0:
            raise Unsupported(ins, f"the constant at 0x{at:x} of bank {bank}")
        return value

    # ---- running ------------------------------------------------------------------------------------------------------

    def run(self, first_block: int) -> list[list[int]]:
        """The blocks from this one to their ends: of every warp, what it did."""
        lanes = self.lanes
        self.first_block = first_block
        self.memory.clear()
        self.P[:] = False
        self.P[[PT, PT + UNIFORM_PREDICATE]] = True
        self.R[:] = 0
        self.gone = np.zeros(lanes, bool)
        self.ready: dict[int, np.ndarray] = {0: np.ones(lanes, bool)}
        # Lanes that wait for others, and where they go on; of a barrier of convergence, which shall meet, as each lane has it.
        self.waiting: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(lanes, bool))
        self.resume = np.zeros(lanes, np.int64)
        self.meets: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(lanes, np.uint32))
        self.traces = [[] for _ in range(self.warp_count)]
        with np.errstate(all="ignore"):
            while self.ready or self._open_barriers():
                self._step()
        if not self.gone.all():
            raise RuntimeError(f"warps of {self.kernel.name} wait for each other for ever")
        return self.traces

    def move(self, mask: np.ndarray, address: int) -> None:
        there = self.ready.get(address)
        self.ready[address] = mask if there is None else there | mask

    def _decode(self, address: int) -> tuple:
        ins = self.kernel.instructions.get(address)
        if ins is None:
            raise RuntimeError(f"{self.kernel.name} comes to 0x{address:x}, where there is no instruction")
        o = Operands(self, ins)
        guard = None
        if ins.guard:
            row = predicate(ins.guard)
            guard = self.P[row], ins.guard.startswith("!")
        try:
            if ins.base in CONTROLS:
                return ins, guard, "control", CONTROLS[ins.base](self, o)
            if ins.base in SPACES:
                return ins, guard, "memory", access(o)
            if ins.base in ("LDC", "ULDC"):
                return ins, guard, "plain", constant_load(o)
            if ins.base in ACROSS:
                return ins, guard, "plain", ACROSS[ins.base](self, o)
            if ins.base in MEANINGS:
                return ins, guard, "plain", self.expression(MEANINGS[ins.base](o), "mask")
        except (ValueError, IndexError, TypeError, StopIteration) as problem:
            raise Unsupported(ins, f"its form ({problem!r})") from problem
        raise Unsupported(ins, "the instruction")

    def _step(self) -> None:
        address = min(self.ready)
        group = self.ready.pop(address)
        entry = self._decoded.get(address)
        if entry is None:
            entry = self._decoded[address] = self._decode(address)
        ins, guard, kind, run = entry
        mask = group
        if guard is not None:
            mask = group & ~guard[0] if guard[1] else group & guard[0]
        active = guard is None or mask.any()
        if kind == "control":
            jumped = run(group, mask) if active else self.move(group, address + 16)
            self._log(address, group, mask, jumped)
            return
        found = run(mask) if active else None
        self.move(group, address + 16)
        if kind == "memory" and active:
            self._log(address, group, mask, None, *found)
        else:
            self._log(address, group, mask)

    def _log(self, address, group, mask, jumped=None, space="", waves=None) -> None:
        here = self.rows(group)
        took_part = here if mask is group else self.rows(mask)
        if jumped is None and waves is None:
            on, off = self._step_number(Step(address, True)), self._step_number(Step(address, False))
            for trace, is_here, active in zip(self.traces, here, took_part, strict=True):
                if is_here:
                    trace.append(on if active else off)
            return
        jumps = self.rows(jumped) if jumped is not None else [False] * len(here)
        waves = waves or [0] * len(here)
        for trace, is_here, active, taken, count in zip(
            self.traces, here, took_part, jumps, waves, strict=True
        ):
            if is_here:
                trace.append(self._step_number(Step(address, active, taken, space, count)))

    def _step_number(self, step: Step) -> int:
        return self.steps.setdefault(step, len(self.steps))

    def release(self, name: str) -> None:
        """Lets lanes go on that wait at a barrier of convergence, where all that still run have come."""
        here = self.waiting[name]
        missing = self.meets[name] & ~self.ballot(here) & ~self.ballot(self.gone)
        self._go_on(name, here & (missing == 0))

    def _go_on(self, name: str, mask: np.ndarray) -> bool:
        if not mask.any():
            return False
        self.waiting[name] = self.waiting[name] & ~mask
        for address in set(self.resume[mask].tolist()):
            self.move(mask & (self.resume == address), address)
        return True

    def _open_barriers(self) -> bool:
        """Where all of a block, or of a cluster, have come to their barrier."""
        opened = False
        for name, count in (("block", 1), ("cluster", self.launch.cluster)):
            here = self.waiting[name]
            came = (here | self.gone).reshape(-1, count * self.launch.threads).all(1)
            opened |= self._go_on(name, here & np.repeat(came, count * self.launch.threads))
        return opened
