"""What is printed of a launch: figures, and where its cycles go."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path

from clock import BARRIERS, room
from measure import CLOCK, Timed
from native import ROOT

MOST = 30  # rows of a list


def figures(timed: Timed, steps: int) -> str:
    launch, kernel, record = timed
    per_warp = 1 / record.warps / steps
    bound = max(record.issued.values()) / steps
    stopped = sum(record.why[name] for name in BARRIERS.values()) * per_warp
    clusters = f" in clusters of {launch.cluster}" if launch.cluster > 1 else ""
    shared = launch.shared + kernel.static_shared
    rows = [
        (
            "cycles",
            f"{record.cycles / steps:,.0f}",
            f"{record.cycles / steps / CLOCK / 1000:.2f} us at {CLOCK} GHz",
        ),
        ("if instructions had only to be issued", f"{bound:,.0f}", ""),
        (
            "instructions of a warp",
            f"{sum(record.count.values()) * per_warp:,.0f}",
            f"{launch.threads // 32} warps a block",
        ),
        ("a warp waits at barriers", f"{stopped:,.0f}", "cycles"),
        (
            "memory pipe, for bank conflicts",
            f"{sum(record.conflicts.values()) / steps / launch.cluster:,.0f}",
            "cycles",
        ),
        ("registers", f"{kernel.registers}", f"{kernel.stack} bytes of stack"),
        ("shared memory", f"{shared:,}", "bytes"),
        (
            "blocks that a multiprocessor has room for",
            f"{room(kernel.registers, launch.threads, shared)}",
            "",
        ),
    ]
    timed_blocks = record.warps * 32 // launch.threads
    head = f"{launch.kernel}: {timed_blocks} of {launch.blocks} blocks{clusters}, for one of {steps} steps"
    return "\n".join([head, *(f"  {name:42}{value:>10}  {more}" for name, value, more in rows)])


def profile(timed: Timed, steps: int) -> str:
    """Cycles of a warp, on average: by what they go on, by function and by line."""
    launch, kernel, record = timed
    per_warp = 1 / record.warps / steps
    alone: Counter[str] = Counter()
    within: Counter[str] = Counter()
    lines: Counter[tuple[str, int]] = Counter()
    issued: Counter[tuple[str, int]] = Counter()
    for address, cycles in record.spent.items():
        chain = [place for place in kernel.instructions[address].lines if place[0].startswith(str(ROOT))] or [
            ("?", 0)
        ]
        lines[chain[0]] += cycles
        issued[chain[0]] += record.count[address]
        alone[function_of(*chain[0])] += cycles
        within.update(dict.fromkeys({function_of(*place) for place in chain}, cycles))
    rows = ["", "cycles of a warp by what they go on"]
    rows += [f"  {cycles * per_warp:8,.0f}  {why}" for why, cycles in record.why.most_common() if cycles]
    rows += ["", "by function: with what it calls, and without"]
    rows += [f"  {c * per_warp:8,.0f} {alone[f] * per_warp:8,.0f}  {f}" for f, c in within.most_common(MOST)]
    rows += ["", "by line: cycles, instructions"]
    for place, cycles in lines.most_common(MOST):
        name = f"{Path(place[0]).name}:{place[1]}"
        rows.append(
            f"  {cycles * per_warp:8,.0f} {issued[place] * per_warp:6,.1f}  {name:28} {source(place[0], place[1])}"
        )
    rows += ["", "bank conflicts: cycles of a multiprocessor's memory pipe"]
    for address, cycles in record.conflicts.most_common(5):
        file, line = next(iter(kernel.instructions[address].lines), ("?", 0))
        if cycles:
            rows.append(
                f"  {cycles / steps / launch.cluster:8,.0f}  {Path(file).name}:{line}  {source(file, line)}"
            )
    return "\n".join(rows)


@cache
def read(file: str) -> list[str]:
    return Path(file).read_text().splitlines() if Path(file).exists() else []


def source(file: str, line: int) -> str:
    rows = read(file)
    return rows[line - 1].strip()[:90] if 0 < line <= len(rows) else ""


@cache
def function_of(file: str, line: int) -> str:
    """The function of the GPU that begins last before a line: everything is inlined, and only lines are known."""
    for row in reversed(read(file)[:line]):
        if "__device__" in row or "__global__" in row:
            named = re.search(r"(operator\W+?|~?\w+)\(", re.sub(r"__\w+__(\([^)]*\))?", "", row))
            if named:
                return f"{Path(file).name} {named[1]}"
    return Path(file).name
