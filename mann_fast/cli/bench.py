"""mann-fast bench: the fused ops beside what people would use instead, on this machine."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

EXAMPLE = """\
examples:
  mann-fast bench                                             (every op at the paper's size, about 2 minutes)
  mann-fast bench --op lrua_scan --shape T=50,B=1             (one op, about 10 seconds)
  mann-fast bench --op mann_step --compile --json now.json --report now.html
  mann-fast bench --op lrua_scan --sweep --report sweep.html  (how the time grows with B, T, N, D and R)
  mann-fast bench --compare before.json now.json

Contestants run in turn, in random order, round by round: ratios within one run hold, absolute times of a shared machine
mean little. A result is checked against the reference before it is timed.
"""

SWEEP = {
    "B": (1, 4, 16, 64),
    "T": (5, 20, 50, 200),
    "N": (32, 128, 512, 2048),
    "D": (8, 40, 160),
    "R": (1, 2, 4, 8),
}


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "bench",
        help="measure the ops beside what people would use instead",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    setting = parser.add_argument
    setting(
        "--op",
        action="append",
        metavar="OP",
        help="an op, or mann_step for a training step; again for more (default: all)",
    )
    setting(
        "--shape",
        default="",
        metavar="T=..,B=..",
        help="steps T, batch B, slots N of D numbers, heads R, hidden units H; the paper's where left out",
    )
    setting(
        "--dtype",
        default="float32",
        choices=("float32", "float64", "bfloat16", "float16"),
        help="(default: float32)",
    )
    setting("--backend", default="auto", metavar="NAME", help="of mann_fast (default: auto)")
    setting("--direction", choices=("forward", "both"), help="only forward, or only forward+backward")
    setting("--threads", type=int, metavar="N", help="of PyTorch (default: as it is)")
    setting(
        "--compile",
        action="store_true",
        help="also torch.compile of a step, which compiles for half a minute",
    )
    setting(
        "--jax",
        action="store_true",
        help="with mann_step: also JAX, lax.scan under jit (needs the package jax)",
    )
    setting(
        "--seconds", type=float, default=3.0, metavar="S", help="for the rounds of each case (default: 3)"
    )
    setting("--sweep", action="store_true", help="vary each size, one at a time, from --shape")
    setting("--json", type=Path, metavar="FILE", help="write the figures to a file, for --compare")
    setting("--report", type=Path, metavar="FILE", help="write one page with everything in it: .html or .md")
    setting(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("BEFORE", "AFTER"),
        help="instead, compare two files of --json",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    if args.compare:
        return print_comparison(*args.compare)
    import torch
    from rich.console import Console

    from .. import backend, backends
    from ..benchmark.cases import DIRECTIONS, OPS, Shape
    from ..benchmark.measure import environment
    from ..benchmark.report import write_report
    from ..training.files import write_json

    shape, names = Shape.parse(args.shape), args.op or OPS
    for name in names:
        if name not in OPS:
            raise ValueError(f"--op must be one of {', '.join(OPS)}, got {name!r}")
    if args.seconds <= 0:
        raise ValueError(f"--seconds must be above 0, got {args.seconds}")
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    if args.report and args.report.suffix not in (".html", ".md"):
        raise ValueError(f"--report must end in .html or .md, got {args.report}")
    if reason := backends().get(args.backend):
        raise ValueError(f"--backend {args.backend} cannot run here: {reason}")
    directions = DIRECTIONS
    if args.direction:
        directions = DIRECTIONS[:1] if args.direction == "forward" else DIRECTIONS[1:]
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    with backend(args.backend):
        for name in names:
            for point, where in points(shape, args.sweep):
                rows += [{**row, **where} for row in measure_op(name, point, directions, args)]
    report = {"environment": environment(), "rows": rows}
    wide = Console(width=max(Console().width, 132))
    for table in tables(rows):
        wide.print(table)
    print(json.dumps(report["environment"]))
    if args.json:
        write_json(args.json, report)
    if args.report:
        write_report(args.report, report)
        print(f"report: {args.report}")
    return 0 if all(row["verified"] for row in rows if row["what"] == "mann_fast") else 1


def points(shape, sweep: bool):
    """The shapes to measure, each with what is varied."""
    if not sweep:
        yield shape, {}
        return
    for axis, values in SWEEP.items():
        for value in values:
            if axis != "R" or value <= shape.N:
                yield replace(shape, **{axis: value}), {"axis": axis, "value": value}


def measure_op(
    name: str, shape, directions: tuple[str, ...], args: argparse.Namespace
) -> list[dict[str, Any]]:
    import torch

    from ..benchmark.cases import cases
    from ..benchmark.measure import measure

    dtype = getattr(torch, args.dtype)
    if name == "mann_step" and dtype != torch.float32:
        raise ValueError(f"mann_step is measured in float32, got --dtype {args.dtype}")
    interpreted = args.backend == "triton" and not torch.cuda.is_available()  # its times say nothing
    rows = []
    jax = args.jax and name == "mann_step"
    if jax and importlib.util.find_spec("jax") is None:
        print("JAX is left out: the package jax is not installed", file=sys.stderr)
        jax = False
    for case in cases(name, shape, dtype, directions, compiled=args.compile, jax=jax):
        print(f"{name} {case.direction}, {shape} ...", file=sys.stderr)
        rows += measure(case, seconds=args.seconds, timed=not interpreted)
    return rows


def tables(rows: list[dict[str, Any]]):
    from rich.table import Table

    from ..benchmark.report import COLUMNS, cells, titles

    for title, group in titles(rows):
        table = Table(title=title)
        for name in COLUMNS:
            table.add_column(name, no_wrap=name in ("op", "what"))
        for row in group:
            table.add_row(*cells(row))
        yield table


def print_comparison(before: Path, after: Path) -> int:
    """One line per row; exit status 1 where something has become slower."""
    from rich.table import Table

    from ..benchmark.compare import compare
    from ._report import print_table

    reports = []
    for path in (before, after):
        try:
            reports.append(json.loads(path.read_text(encoding="utf-8"))["rows"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is not a file of `mann-fast bench --json`") from None
    found = compare(*reports)
    table = Table("op", "direction", "shape", "what", "time after / before", "verdict")
    for row in found:
        low, high = row["ratio"]
        table.add_row(
            row["op"], row["direction"], row["shape"], row["what"], f"{low:.2f} to {high:.2f}", row["verdict"]
        )
    print_table(table)
    return 1 if any(row["verdict"] == "slower" for row in found) else 0
