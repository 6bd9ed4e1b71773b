"""The table of a page: what the kernels take by the model, written anew or compared with."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from measure import ARCHITECTURE, CLOCK, Model
from native import Nvcc

MARKS = ("<!-- begin: scripts/gpu_model --write -->", "<!-- end: scripts/gpu_model -->")
WORSE = 0.03  # by which a kernel may be slower
WIDE = {"D": 40, "R": 4}
CASES = {  # a row, and what measure has for it
    "`lrua_scan`": ("lrua_scan", "forward", {}),
    "`lrua_scan`, keeping anchors": ("lrua_scan", "keep", {}),
    "`lrua_scan` back": ("lrua_scan", "backward", {}),
    "`ntm_scan`": ("ntm_scan", "forward", {}),
    "`ntm_scan` back": ("ntm_scan", "backward", {}),
    "`ntm_scan`, four heads that read": ("ntm_scan", "forward", WIDE),
    "`ntm_scan`, four heads that read, back": ("ntm_scan", "backward", WIDE),
    "`dnc_scan`": ("dnc_scan", "forward", {}),
    "`dnc_scan` back": ("dnc_scan", "backward", {}),
    "`cell`, 10 steps": ("cell", "forward", {"T": 10}),
    "`cell`, 10 steps, back": ("cell", "backward", {"T": 10}),
    "`content_read`": ("content_read", "forward", {}),
    "`content_read` back": ("content_read", "backward", {}),
    "`least_used`": ("least_used", "forward", {}),
}
HEAD = [
    "",
    "cycles",
    "us",
    "if nothing had to wait but to be issued",
    "instructions of a warp",
    "warps",
    "registers",
]


def rows(anew: Callable[[], Model], measured: Callable) -> Iterator[tuple[str, int, str]]:
    """Of each case: its name, cycles of a step, and its row."""
    model = anew()
    for name, (op, part, sizes) in CASES.items():
        launches, steps = measured(model, op, part, **sizes)
        cycles = round(sum(x.record.cycles for x in launches) / steps)
        bound = sum(max(x.record.issued.values()) for x in launches) / steps
        count = sum(sum(x.record.count.values()) / x.record.warps for x in launches) / steps
        last = launches[-1]
        row = [
            name,
            f"{cycles:,}",
            f"{cycles / CLOCK / 1000:.2f}",
            f"{bound:,.0f}",
            f"{count:,.0f}",
            f"{last.launch.threads // 32}",
            f"{last.kernel.registers}",
        ]
        yield name, cycles, "| " + " | ".join(row) + " |"


def compiler() -> str:
    return Nvcc([ARCHITECTURE]).version


def split(file: Path) -> tuple[str, str, str]:
    """The page before, in and after the marks."""
    begin, rest = file.read_text().split(MARKS[0])
    table, end = rest.split(MARKS[1])
    return begin + MARKS[0], table, MARKS[1] + end


def write(anew: Callable[[], Model], measured: Callable, file: Path) -> int:
    begin, _, end = split(file)
    lines = [f"{compiler()}, sm_{ARCHITECTURE}, us at {CLOCK} GHz", ""]
    lines += ["| " + " | ".join(HEAD) + " |", "| --- " * len(HEAD) + "|"]
    lines += [row for _, _, row in rows(anew, measured)]
    print("\n".join(lines))
    file.write_text(f"{begin}\n" + "\n".join(lines) + f"\n{end}")
    return 0


def check(anew: Callable[[], Model], measured: Callable, file: Path) -> int:
    """1 where a kernel is slower than the table says, or has no row."""
    _, table, _ = split(file)
    made_by = re.search(r"nvcc [\d.]+", table)
    if made_by is None or made_by[0] != compiler():
        there = made_by[0] if made_by else "no compiler"
        print(
            f"gpu_model: SKIPPED, the table of {file} is of {there} and this is {compiler()}, which makes other code"
        )
        return 0
    known = {
        name: int(cycles.replace(",", ""))
        for name, cycles in re.findall(r"(?m)^\| (.*?) \| ([\d,]+) \|", table)
    }
    slower, faster = [], []
    for name, cycles, _ in rows(anew, measured):
        before = known.get(name)
        print(
            f"{name}: {cycles:,} cycles a step, {'not in the table' if before is None else f'{before:,} in the table'}"
        )
        if before is None or cycles > before * (1 + WORSE):
            slower.append(
                f"{name} takes {cycles:,} cycles a step, and {before or 'nothing'} is what {file} says"
            )
        elif cycles < before * (1 - WORSE):
            faster.append(name)
    if faster:
        print(f"faster than {file} says, which --write would put right: {', '.join(faster)}")
    for line in slower:
        print(f"gpu_model: {line}", file=sys.stderr)
    return 1 if slower else 0
