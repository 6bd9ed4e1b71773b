"""mann-fast bench: the fused ops beside what people would use instead, on this machine."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data.images import expand_user

EXAMPLE = """\
examples:
  mann-fast bench                                             (every op at the paper's size, a minute and a half)
  mann-fast bench --op lrua_scan --shape T=50,B=1             (one op, about 10 seconds)
  mann-fast bench --op mann_step --compile --json now.json --report now.html
  mann-fast bench --op lrua_scan --sweep --report sweep.html  (how the time grows with B, T, N, D, R and threads)
  mann-fast bench --compare before.json now.json
  mann-fast bench --op lrua_scan --base HEAD~1                (beside the kernels of another commit, in a git checkout)
  mann-fast bench --instructions --base HEAD~1 --shape T=8,B=2,H=50    (by instructions, on however busy a machine)
  mann-fast bench --instructions --shape T=8,B=2,H=50 --json benchmarks/instructions.json    (recorded, to be such a base)

Contestants run in turn, in random order, round by round: ratios within one run hold, absolute times of a shared machine
mean little. A result is checked against the reference before it is timed.
"""

SWEEP = {
    "B": (1, 4, 16, 64),
    "T": (5, 20, 50, 200),
    "N": (32, 128, 512, 2048),
    "D": (8, 40, 160),
    "R": (1, 2, 4, 8),
    "threads": (1, 2, 4, 8, 16, 32, 64),  # as far as there are cores
    "dtype": ("float64", "bfloat16", "float16"),  # beside --dtype
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
    setting("--device", default="cpu", choices=("cpu", "cuda"), help="(default: cpu)")
    setting(
        "--compile",
        nargs="?",
        const="default",
        default="",
        metavar="MODE,..",
        help="also torch.compile of a step, which compiles for half a minute, in these modes: default (if none is "
        "named), reduce-overhead, max-autotune",
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
    setting(
        "--base",
        metavar="REF",
        help="instead, beside the kernels of another commit, built under build/base of this git checkout; with "
        "--instructions also beside what --json wrote to a file, FILE.json",
    )
    setting(
        "--instructions",
        action="store_true",
        help="instead, count instructions per call with valgrind's callgrind, two minutes for all ops at T=8,B=2,H=50; "
        "with --base at both commits",
    )
    setting("--json", type=expand_user, metavar="FILE", help="write the figures to a file, for --compare")
    setting(
        "--report",
        type=expand_user,
        metavar="FILE",
        help="write one page with everything in it: .html or .md",
    )
    setting(
        "--compare",
        nargs=2,
        type=expand_user,
        metavar=("BEFORE", "AFTER"),
        help="instead, compare two files of --json",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    if args.compare:
        return print_comparison(*args.compare)
    import torch

    from .. import backend, backends
    from ..benchmark.cases import DIRECTIONS, OPS, Shape, has, takes
    from ..benchmark.measure import environment
    from ..benchmark.report import write_report
    from ..training.files import write_json
    from ._report import print_table

    check(args)
    shape = Shape.parse(args.shape)
    names = args.op or [name for name in OPS if takes(name, args.dtype)]
    if reason := backends().get(args.backend):
        raise ValueError(f"--backend {args.backend} cannot run here: {reason}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda cannot be had: no CUDA device is available")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    directions = DIRECTIONS
    if args.direction:
        directions = DIRECTIONS[:1] if args.direction == "forward" else DIRECTIONS[1:]
    if not any(has(name, direction) for name in names for direction in directions):
        raise ValueError(
            f"{', '.join(names)} cannot be measured in the direction that --direction {args.direction} asks for"
        )
    torch.manual_seed(0)
    if args.instructions:
        return count_instructions(names, shape, directions, args)
    if args.base:
        rows = rows_beside_base(names, shape, directions, args)
    else:
        rows = []
        with backend(args.backend):
            for name in names:
                for point, dtype, threads, where in points(shape, args):
                    torch.set_num_threads(threads)
                    rows += [{**row, **where} for row in measure_op(name, point, dtype, directions, args)]
    report = {"environment": environment(), "rows": rows}
    for table in tables(rows):
        print_table(table)
    for row in rows:
        if "verdict" in row:
            low, high = row["ratio"]
            print(
                f"{row['op']} {row['direction']}: {row['verdict']} ({low:.2f} to {high:.2f} of the time at {args.base})"
            )
    print(json.dumps(report["environment"]))
    if args.json:
        write_json(args.json, report)
    if args.report:
        write_report(args.report, report)
        print(f"report: {args.report}")
    wrong = any(not row["verified"] for row in rows if row["what"] == "mann_fast")
    return 1 if wrong or any(row.get("verdict") == "slower" for row in rows) else 0


def check(args: argparse.Namespace) -> None:
    """ValueError for what the parser lets through."""
    from ..benchmark.cases import MODES, OPS, takes

    for name in args.op or ():
        if name not in OPS:
            raise ValueError(f"--op must be one of {', '.join(OPS)}, got {name!r}")
        if not takes(name, args.dtype):
            raise ValueError(f"{name} is measured in float32, got --dtype {args.dtype}")
    if args.seconds <= 0:
        raise ValueError(f"--seconds must be above 0, got {args.seconds}")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {args.threads}")
    if args.report and args.report.suffix not in (".html", ".md"):
        raise ValueError(f"--report must end in .html or .md, got {args.report}")
    args.compile = tuple(filter(None, args.compile.split(",")))
    for mode in args.compile:
        if mode not in MODES:
            raise ValueError(f"--compile takes {', '.join(MODES)}, got {mode!r}")
    for name in ("base", "instructions"):
        if args.sweep and getattr(args, name):
            raise ValueError(f"--{name} and --sweep cannot be had in one run")
    if args.instructions and args.device != "cpu":
        raise ValueError(f"--instructions counts those of a processor, got --device {args.device}")


def points(shape, args: argparse.Namespace):
    """What to measure: a shape, a dtype, a number of threads, and what is varied."""
    import torch

    threads = torch.get_num_threads()
    if not args.sweep:
        yield shape, args.dtype, threads, {}
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for axis, values in SWEEP.items():
        for value in values:
            where = {"axis": axis, "value": value}
            if axis == "threads":
                if value <= cores and args.device == "cpu":
                    yield shape, args.dtype, value, where
            elif axis == "dtype":
                if value != args.dtype:
                    yield shape, value, threads, where
            elif axis != "R" or value <= shape.N:
                yield replace(shape, **{axis: value}), args.dtype, threads, where


def measure_op(
    name: str, shape, dtype: str, directions: tuple[str, ...], args: argparse.Namespace
) -> list[dict[str, Any]]:
    import torch

    from ..benchmark.cases import cases, takes
    from ..benchmark.measure import measure

    if not takes(name, dtype):
        return []
    interpreted = args.backend == "triton" and args.device == "cpu"  # its times say nothing
    rows = []
    jax = args.jax and name == "mann_step" and args.device == "cpu"
    if jax and importlib.util.find_spec("jax") is None:
        print("JAX is left out: the package jax is not installed", file=sys.stderr)
        jax = False
    for case in cases(
        name, shape, getattr(torch, dtype), directions, device=args.device, modes=args.compile, jax=jax
    ):
        print(f"{name} {case.direction}, {shape} {dtype} ...", file=sys.stderr)
        rows += measure(case, seconds=args.seconds, timed=not interpreted)
    return rows


def requests(names, shape, directions: tuple[str, ...], args: argparse.Namespace) -> list[dict[str, Any]]:
    """What another process is to measure, as of benchmark/worker.py."""
    import torch

    from ..benchmark.cases import has

    return [
        {
            "op": name, "direction": direction, "shape": str(shape), "dtype": args.dtype, "device": args.device,
            "backend": args.backend, "threads": torch.get_num_threads(),
        }
        for name in names
        for direction in directions
        if has(name, direction)
    ]  # fmt: skip


def rows_beside_base(
    names, shape, directions: tuple[str, ...], args: argparse.Namespace
) -> list[dict[str, Any]]:
    from ..benchmark.base import build, measure_beside

    tree, rows = build(args.base), []
    for request in requests(names, shape, directions, args):
        print(f"{request['op']} {request['direction']}, {shape} ...", file=sys.stderr)
        rows += measure_beside(tree, args.base, request, seconds=args.seconds)
    return rows


def count_instructions(names, shape, directions: tuple[str, ...], args: argparse.Namespace) -> int:
    """One row per op and direction; exit status 1 where one cannot be called, or takes more than at --base by MARGIN. --base is
    a commit or a file of --json, which counts by other versions are not compared with."""
    from rich.table import Table

    from ..benchmark import instructions
    from ..benchmark.base import ROOT, build
    from ..training.files import write_json
    from ._report import print_table

    asked = requests(names, shape, directions, args)
    record = Path(args.base) if args.base and args.base.endswith(".json") else None
    if record and (reason := instructions.incomparable(record)):
        print(f"instructions: SKIPPED, {reason}")  # as make check has it, which passes then
        return 0
    tree = build(args.base) if args.base and not record else None
    print(
        f"{len(asked)} cases under callgrind, at T=8,B=2,H=50 two minutes for each commit ...",
        file=sys.stderr,
    )
    ours = instructions.count(ROOT, asked)
    columns = {"instructions per call": ours}
    if args.base:
        base = instructions.recorded(record, asked) if record else instructions.count(tree, asked)
        columns = {
            "instructions per call": instructions.fewer_alone(asked, ours, base),
            f"at {args.base}": base,
        }
    times = ["times"] if args.base else []
    table = Table("op", "direction", *columns, *times, title=f"{shape}, {args.dtype}, one thread")
    ratios, changed = [], []
    for request, ours, *theirs in zip(asked, *columns.values(), strict=True):
        cells = [f"{x:,}" if isinstance(x, int) else x for x in (ours, *theirs)]
        if isinstance(ours, int) and any(isinstance(x, int) for x in theirs):
            ratios.append(ours / theirs[0])
            cells.append(f"{ratios[-1]:.3f}")
            if not 1 - instructions.MARGIN <= ratios[-1] <= 1 + instructions.MARGIN:
                changed.append((instructions.name_of(request), *cells, ratios[-1] > 1))
        table.add_row(request["op"], request["direction"], *cells)
    print_table(table)
    if args.base and not ratios:
        raise ValueError(f"there is nothing to compare with {args.base}")
    for name, now, before, ratio, more in changed:
        print(
            f"{name}: {now} instructions, {before} at {args.base}, {ratio} times{', a regression' if more else ''}"
        )
    if record and changed:
        print(
            "Where this is as it should be, the record is made anew: "
            f"mann-fast bench --instructions --shape {args.shape} --json {record}"
        )
    if any(isinstance(ours, str) for ours in columns["instructions per call"]):
        return 1
    if args.json:
        write_json(args.json, instructions.record_of(asked, columns["instructions per call"]))
    return 1 if any(more for *_, more in changed) else 0


def tables(rows: list[dict[str, Any]]):
    from rich.table import Table

    from ..benchmark.report import filled, titles

    for title, group in titles(rows):
        columns, lines = filled(group)
        table = Table(title=title)
        for name in columns:
            table.add_column(name, no_wrap=name in ("op", "direction", "what"))
        for line in lines:
            table.add_row(*line)
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
