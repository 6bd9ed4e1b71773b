"""lrua_scan beside what people would use instead, in one run: ratios, and the share of this machine's own sgemm rate.

python benchmarks/lrua_scan.py [--steps 50] [--batch 16] [--slots 128] [--size 40] [--heads 4] [--compile] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import time

import torch
from rich.console import Console
from rich.table import Table

from mann_fast import __version__, ops, reference
from mann_fast.benchmark import baselines, ceilings
from mann_fast.benchmark.cost import lrua_scan_flop
from mann_fast.benchmark.timer import interleave


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in {"steps": 50, "batch": 16, "slots": 128, "size": 40, "heads": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument(
        "--compile", action="store_true", help="also torch.compile of a step in a loop (about 20 s)"
    )
    parser.add_argument(
        "--compile-scan", action="store_true", help="also torch.compile of the whole loop (minutes)"
    )
    parser.add_argument("--seconds", type=float, default=15.0, help="time for the rounds of each direction")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    torch.manual_seed(0)
    leading = (args.steps, args.batch, args.heads)
    state = ops.LRUAState.initial(args.batch, args.slots, args.size, args.heads)
    inputs = [torch.tanh(torch.randn(*leading, args.size)) for _ in range(2)]
    inputs += [torch.randn(leading), 1 + 10 * torch.rand(leading)]
    for x in inputs:
        x.requires_grad_()

    scans = {
        "mann_fast": lambda: ops.lrua_scan(state, *inputs),
        "eager reference": lambda: reference.lrua_scan(state, *inputs),
        "eager by products": lambda: baselines.scan(baselines.lrua_step_by_products, state, *inputs),
    }
    if args.compile:
        step = torch.compile(baselines.lrua_step_by_products)
        scans["torch.compile of the step"] = lambda: baselines.scan(step, state, *inputs)
    if args.compile_scan:
        whole = torch.compile(lambda *inputs: baselines.scan(baselines.lrua_step_by_products, state, *inputs))
        scans["torch.compile of the scan"] = lambda: whole(*inputs)

    def forward(scan):
        with torch.no_grad():
            return scan()[0]

    def both(scan):
        return torch.autograd.grad(scan()[0].sum(), inputs)

    expected = [forward(scans["eager reference"]), *both(scans["eager reference"])]
    verified, compile_seconds = {}, {}
    for name, scan in scans.items():
        begin = time.perf_counter()
        actual = [forward(scan), *both(scan)]
        compile_seconds[name] = time.perf_counter() - begin if "compile" in name else 0.0
        verified[name] = all(
            torch.allclose(x, y, rtol=1e-3, atol=1e-3 * y.abs().max())
            for x, y in zip(actual, expected, strict=True)
        )

    sgemm, sgemm_flop = ceilings.sgemm()
    rows = []
    for direction, run in (("forward", forward), ("forward+backward", both)):
        contestants = {name: (lambda scan=scan, run=run: run(scan)) for name, scan in scans.items()}
        timings = interleave({**contestants, "sgemm": sgemm}, seconds=args.seconds)
        rate = sgemm_flop / timings["sgemm"].median
        sizes = (args.steps, args.batch, args.slots, args.size, args.heads)
        flop = lrua_scan_flop(*sizes, backward=direction != "forward")
        for name in scans:
            t = timings[name]
            rows.append(
                {
                    "direction": direction,
                    "what": name,
                    "verified": verified[name],
                    "median_ms": 1e3 * t.median,
                    "quartiles_ms": [1e3 * t.low, 1e3 * t.high],
                    "times_mann_fast": t.median / timings["mann_fast"].median,
                    "share_of_sgemm": flop / t.median / rate,
                    "first_calls_s": compile_seconds[name],
                    "sgemm_gflops": rate / 1e9,
                }
            )
    table = Table(
        title="lrua_scan, float32, " + ", ".join(f"{k} {v}" for k, v in list(vars(args).items())[:5])
    )
    for column in (
        "direction",
        "what",
        "median ms (quartiles)",
        "times mann_fast",
        "share of sgemm",
        "first calls s",
    ):
        table.add_column(column)
    for row in rows:
        low, high = row["quartiles_ms"]
        time_text = f"{row['median_ms']:.2f} ({low:.2f}-{high:.2f})" if row["verified"] else "unverified"
        first = f"{row['first_calls_s']:.0f}" if row["first_calls_s"] else ""
        table.add_row(
            row["direction"],
            row["what"],
            time_text,
            f"{row['times_mann_fast']:.1f}",
            f"{row['share_of_sgemm']:.0%}",
            first,
        )
    Console(width=120).print(table)
    environment = {
        "mann_fast": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "sgemm GFLOP/s": [round(row["sgemm_gflops"]) for row in rows[:: len(scans)]],
    }
    print(json.dumps(environment))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"environment": environment, "sizes": vars(args), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
