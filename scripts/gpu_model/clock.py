"""How long warps take for what they went through, by a model of a multiprocessor of sm_90.

An instruction says how many cycles its warp waits before the next, and which scoreboards guard a result of unknown latency: so
has the compiler counted. Four schedulers issue an instruction a cycle each, of the warp that could first. Added to that are
latencies, pipes that take longer than a cycle, one memory pipe a multiprocessor, and barriers.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from capture import Launch
from machine import Step
from machine_code import Kernel

SCHEDULERS = 4

# Cycles from an instruction to the first that may use what it gives. MEASURED: on an H200, by chains of dependent instructions
# (benchmarks/results/nvidia-h200-2026-11-29.json).
MEASURED = {
    "shared load": 23,
    "generic shared load": 28,
    "global load": 285,  # from the second-level cache
    "local load": 36,
    "shuffle": 24,
    "reduction": 38,
    "special function": 17,
    "conversion": 17,
    "barrier": 28,  # from the last warp's arrival until all go on
    "cluster barrier": 392,
    "jump": 5,  # beside the cycles that the instruction says
}
ASSUMED = {
    "cluster load": 200,  # from the shared memory of another multiprocessor
    "constant": 30,  # of a place that is only known when it runs, in the cache
    "special register": 30,
    "float64": 16,
    "other": 16,  # whatever else sets a scoreboard
    "read by memory": 8,  # until a memory instruction has read its registers,
    "read": 12,  # and any other
    "off": 4,  # an instruction that no lane ran
}
LATENCIES = MEASURED | ASSUMED

CLASSES = {
    "shared load": "LDS",
    "local load": "LDL",
    "global load": "LDG LD",
    "constant": "LDC ULDC",
    "shuffle": "SHFL",
    "reduction": "REDUX",
    "special function": "MUFU",
    "conversion": "I2F F2I F2F FRND I2FP",
    "special register": "S2R S2UR R2UR",
    "float64": "DADD DMUL DFMA DSETP",
}
CLASS_OF = {base: name for name, bases in CLASSES.items() for base in bases.split()}

# What each scheduler has one of, and for how many cycles an instruction keeps it: 128 multiply-adds of floats a cycle and
# multiprocessor, 64 operations of integers, 16 reciprocals, 64 of float64.
PIPES = [
    ("fma", 1, "FFMA FADD FMUL"),
    ("fma", 2, "IMAD HFMA2 HADD2"),
    (
        "alu",
        2,
        "FSETP FSET ISETP LOP3 IADD3 SEL FSEL LEA SHF PRMT VIADD IABS VIMNMX IMNMX VIADDMNMX FMNMX PLOP3 MOV P2R R2P",
    ),
    ("alu", 2, "I2FP FCHK F2FP"),
    ("special", 8, "MUFU"),
    ("special", 2, "I2F F2I F2F FRND POPC FLO"),
    ("float64", 2, "DADD DMUL DFMA DSETP"),
]
PIPE_OF = {base: (pipe, cycles) for pipe, cycles, bases in PIPES for base in bases.split()}
SECTORS = 2  # of 32 bytes that the second-level cache and a multiprocessor exchange in a cycle
BARRIERS = {"BAR": "barrier", "UCGABAR_WAIT": "cluster barrier"}


def room(registers: int, threads: int, shared: int) -> int:
    """How many such blocks a multiprocessor takes: a warp's registers are given by 256, of a quarter of 65,536 for each
    scheduler, and a block takes a kilobyte of shared memory beside what it asked for."""
    warps = 65536 // SCHEDULERS // (-(-registers * 32 // 256) * 256) * SCHEDULERS
    return min(warps // (threads // 32), 228 * 1024 // (shared + 1024), 2048 // threads)


def keeps_stacks(kernel: Kernel, launch: Launch, blocks: int) -> bool:
    """Whether the first-level cache has room for the stacks of so many blocks: it is what shared memory leaves of 256 KB."""
    shared = blocks * (launch.shared + kernel.static_shared + 1024)
    carved = next(
        (1024 * size for size in (0, 8, 16, 32, 64, 100, 132, 164, 196, 228) if 1024 * size >= shared), shared
    )
    return blocks * launch.threads * kernel.stack <= 256 * 1024 - carved


class Cost(NamedTuple):
    """What the clock must know of a step, worked out once."""

    address: int
    active: bool
    taken: bool
    pipe: tuple[str, int] | None
    stall: int
    sets: int
    reads: int
    waits: tuple[int, ...]
    waves: int  # cycles for which the memory pipe of the multiprocessor is kept,
    sectors: int  # and what it exchanges with the second-level cache
    conflicts: int  # of these, beyond what the same bytes take without bank conflicts
    latency: int
    read: int
    kind: str
    barrier: str | None


@dataclass
class Record:
    """What a run was. Counters are by address; cycles are those of warps, and so add up to more than `cycles`."""

    cycles: int = 0
    warps: int = 0
    issued: Counter[int] = field(default_factory=Counter)  # by scheduler
    count: Counter[int] = field(default_factory=Counter)
    spent: Counter[int] = field(default_factory=Counter)
    conflicts: Counter[int] = field(default_factory=Counter)
    why: Counter[str] = field(default_factory=Counter)


def cost_of(kernel: Kernel, step: Step, latencies: dict[str, int], near_stacks: bool) -> Cost:
    ins = kernel.instructions[step.address]
    sectors = step.waves if step.space == "global" else 0
    kind, memory = CLASS_OF.get(ins.base, "other"), bool(step.space) or ins.base == "SHFL"
    if kind == "global load" and step.space in ("shared", "cluster"):
        kind = "generic shared load"
    if kind.endswith("load") and step.space == "cluster":
        kind = "cluster load"
    if step.space == "local" and not near_stacks:
        sectors = 4 * step.waves
        kind = "global load" if kind == "local load" else kind
    waves = -(-step.waves // 4) if step.space == "global" else step.waves  # four sectors are a line
    waves = max(1, waves) if memory and step.active else 0
    fewest = 4 if "128" in ins.modifiers else 2 if "64" in ins.modifiers else 1
    pipe = PIPE_OF.get(ins.base)
    if ins.base == "IMAD" and "MOV" in ins.modifiers:
        pipe = ("fma", 1)
    if pipe is None and ins.base.startswith("U") and ins.base not in BARRIERS:
        pipe = ("uniform", 2)
    return Cost(
        step.address,
        step.active,
        step.taken,
        pipe,
        max(1, ins.stall),
        ins.sets,
        ins.reads,
        tuple(i for i in range(6) if ins.waits >> i & 1),
        waves,
        sectors,
        max(0, step.waves - fewest) if step.space in ("shared", "cluster") else 0,
        latencies[kind] if step.active else latencies["off"],
        latencies["read by memory" if memory else "read"],
        kind,
        BARRIERS.get(ins.base) if step.active else None,
    )


class Clock:
    """Blocks of a launch on the multiprocessors of one cluster, several on one where there are more blocks than it has."""

    def __init__(
        self,
        kernel: Kernel,
        launch: Launch,
        steps: Iterable[Step],
        blocks: list[list[list[int]]],  # of each block the traces of its warps
        latencies: dict[str, int],
    ) -> None:
        cluster = launch.cluster
        near_stacks = keeps_stacks(kernel, launch, len(blocks) // cluster)
        self.costs = [cost_of(kernel, step, latencies, near_stacks) for step in steps]
        self.latencies, self.record = latencies, Record()
        self.traces = [iter(trace) for block in blocks for trace in block]
        self.block_of = [b for b, block in enumerate(blocks) for _ in block]
        count, per_block = len(self.traces), len(blocks[0])
        self.record.warps = count
        # Blocks take the multiprocessors in turn, and the warps of one its schedulers.
        self.scheduler_of = [
            self.block_of[g] % cluster * SCHEDULERS
            + (self.block_of[g] // cluster * per_block + g % per_block) % SCHEDULERS
            for g in range(count)
        ]
        schedulers = cluster * SCHEDULERS
        self.warps_of = [[g for g in range(count) if self.scheduler_of[g] == q] for q in range(schedulers)]
        self.issue_free = [0] * schedulers
        self.pipe_free: list[dict[str, int]] = [{} for _ in range(schedulers)]
        self.memory_free, self.cache_free = [0] * cluster, [0.0] * cluster
        self.last, self.ready, self.start = [0] * count, [0] * count, [0] * count
        self.ready_why = ["fixed latency"] * count
        self.free = [[0] * 6 for _ in range(count)]
        self.free_why = [["other"] * 6 for _ in range(count)]
        self.next: list[Cost | None] = [None] * count
        # Of each barrier of a block, or of a cluster: how many warps still run, and those that wait.
        self.blocks_of = {"barrier": 1, "cluster barrier": cluster}
        self.running = Counter((name, b // n) for name, n in self.blocks_of.items() for b in self.block_of)
        self.waiting: dict[tuple[str, int], list[int]] = {barrier: [] for barrier in self.running}

    def run(self) -> Record:
        self.queue: list[tuple[int, int, int]] = []  # of schedulers: when, which, with which warp
        self.chosen: list[tuple[int, int, int] | None] = [None] * len(self.warps_of)
        for g in range(len(self.traces)):
            self._prepare(g)
        for q in range(len(self.warps_of)):
            self._choose(q)
        while self.queue:
            entry = heapq.heappop(self.queue)
            if entry == self.chosen[entry[1]]:
                self._issue(*entry)
        if any(self.running.values()):
            raise RuntimeError("warps wait for each other for ever")
        return self.record

    def _prepare(self, g: int) -> None:
        """When the warp's next instruction may issue, as far as the warp goes."""
        step = next(self.traces[g], None)
        if step is None:
            return self._end(g)
        cost = self.costs[step]
        start, free = self.ready[g], self.free[g]
        for i in cost.waits:
            if free[i] > start:
                start = free[i]
        self.start[g], self.next[g] = start, cost

    def _choose(self, q: int) -> None:
        best, warp = None, -1
        pipes, least = self.pipe_free[q], self.issue_free[q]
        for g in self.warps_of[q]:
            cost = self.next[g]
            if cost is None:
                continue
            t = self.start[g]
            if t < least:
                t = least
            if cost.pipe is not None and (busy := pipes.get(cost.pipe[0], 0)) > t:
                t = busy
            if best is None or t < best:
                best, warp = t, g
        self.chosen[q] = None if best is None else (best, q, warp)
        if best is not None:
            heapq.heappush(self.queue, self.chosen[q])

    def _issue(self, t: int, q: int, g: int) -> None:
        cost, record = self.next[g], self.record
        self._account(t, g, cost)
        record.count[cost.address] += 1
        record.issued[q] += 1
        record.cycles = max(record.cycles, t)
        self.issue_free[q] = t + 1
        if cost.pipe is not None:
            self.pipe_free[q][cost.pipe[0]] = t + cost.pipe[1]
        self.last[g], self.ready[g], self.ready_why[g] = t, t + cost.stall, "fixed latency"
        if cost.taken:
            self.ready[g] += self.latencies["jump"]
            self.ready_why[g] = "jump"
        begin = t
        if cost.waves:
            processor = q // SCHEDULERS
            begin = max(t, self.memory_free[processor])
            self.memory_free[processor] = begin + cost.waves
            record.conflicts[cost.address] += cost.conflicts
            begin += cost.waves - 1
            if cost.sectors:
                begin = max(begin, self.cache_free[processor])
                self.cache_free[processor] = begin = begin + cost.sectors / SECTORS
        for which, done, why in (
            (cost.sets, begin + cost.latency, cost.kind),
            (cost.reads, t + cost.read, "read"),
        ):
            if which < 6 and done > self.free[g][which]:
                self.free[g][which], self.free_why[g][which] = done, why
        if cost.barrier:
            barrier = cost.barrier, self.block_of[g] // self.blocks_of[cost.barrier]
            self.waiting[barrier].append(g)
            self.next[g] = None
            self._open(barrier, cost.address)
        else:
            self._prepare(g)
        self._choose(q)

    def _account(self, t: int, g: int, cost: Cost) -> None:
        """What the cycles since the warp's last instruction went on."""
        record, ready, start, last = self.record, self.ready[g], self.start[g], self.last[g]
        record.spent[cost.address] += t - last
        record.why[self.ready_why[g]] += ready - last
        if start > ready:
            held = max(cost.waits, key=self.free[g].__getitem__)
            record.why["waits for " + self.free_why[g][held]] += start - ready
        if t > start:
            record.why["others issue or hold the pipe"] += t - start

    def _end(self, g: int) -> None:
        self.next[g] = None
        for name, n in self.blocks_of.items():
            barrier = name, self.block_of[g] // n
            self.running[barrier] -= 1
            self._open(barrier, None)

    def _open(self, barrier: tuple[str, int], address: int | None) -> None:
        """Lets the warps of a barrier go on, where the last of them has come, or ended."""
        here = self.waiting[barrier]
        if not here or len(here) < self.running[barrier]:
            return
        self.waiting[barrier] = []
        opens = max(self.last[g] for g in here) + self.latencies[barrier[0]]
        for g in here:
            self.record.why[barrier[0]] += opens - self.last[g]
            if address is not None:
                self.record.spent[address] += opens - self.last[g]
            self.last[g] = opens
            self.ready[g], self.ready_why[g] = max(opens, self.ready[g]), barrier[0]
            self._prepare(g)
        for q in {self.scheduler_of[g] for g in here}:
            self._choose(q)
