"""The training step of a layer of each memory beside nn.LSTM's, the eager reference and the dnc package where it is installed,
as ratios of one run; for docs/benchmarks.md. With --ledger instead what a step of lrua and of ntm consists of; for docs/cpu.md.

python benchmarks/whole_sequence.py [--threads N] [--memories lrua ntm dnc] [--shape T=50,B=16,N=128,D=40,R=4,H=200] [--ledger]
"""

import argparse
import collections
import math
import statistics
import time

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mann_fast import MemoryLayer, ops
from mann_fast.benchmark.cases import OURS, Shape, cases
from mann_fast.benchmark.cost import lrua_scan_flop, ntm_scan_flop
from mann_fast.reference.cell import head_sizes, ntm_head_sizes

INPUTS = 40
SLOW = 6  # rounds of what takes seconds


def training(module, run):
    def step():
        module.zero_grad()
        run().sum().backward()

    return step


def calls_of(shape, memories):
    """By name, each a training step: forward and backward of a sum."""
    x = torch.randn(shape.T, shape.B, INPUTS)
    lstm = nn.LSTM(INPUTS, shape.H)
    calls = {"nn.LSTM": training(lstm, lambda: lstm(x)[0])}
    sizes = {"num_slots": shape.N, "slot_size": shape.D, "num_heads": shape.R}
    for name in memories:
        layer = MemoryLayer(INPUTS, shape.H, addressing=name, **sizes)

        def on_reference(layer=layer):
            with ops.backend("reference"):
                return layer(x)[0]

        calls[name] = training(layer, lambda layer=layer: layer(x)[0])
        calls[f"{name}, eager reference"] = training(layer, on_reference)
    if "dnc" in memories:
        try:
            from dnc import DNC
        except ImportError as error:
            print(f"the dnc package is left out: {error}")
        else:
            package = DNC(
                INPUTS, shape.H, nr_cells=shape.N, cell_size=shape.D, read_heads=shape.R, num_hidden_layers=1
            )
            calls["dnc package"] = training(
                package, lambda: package(x.transpose(0, 1), (None, None, None))[0]
            )
    return calls


def measured(calls, rounds):
    """Median milliseconds of each; in turn, so that what else the machine does meets all alike."""
    times = {name: [] for name in calls}
    for done in range(rounds + 1):  # the first is not counted
        for name, call in calls.items():
            if done > SLOW and statistics.median(times[name]) > 1e3:
                continue
            started = time.perf_counter()
            call()
            if done:
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


class Parts(TorchDispatchMode):
    """CPU milliseconds of each operator below autograd, by name."""

    def __init__(self):
        super().__init__()
        self.spent = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        started = time.thread_time()
        result = func(*args, **(kwargs or {}))
        self.spent[func.name()] += 1e3 * (time.thread_time() - started)
        return result


def cpu_time(call):
    started = time.thread_time()
    call()
    return 1e3 * (time.thread_time() - started)


def parts_of(call, rounds):
    """The least that each operator takes of a call, and the least of all of it without the mode that tells them apart."""
    least = collections.defaultdict(lambda: math.inf)
    for done in range(rounds + 1):  # the first is not counted
        with Parts() as parts:
            call()
        parts.spent["all"] = cpu_time(call)
        if done:
            for key, value in parts.spent.items():
                least[key] = min(least[key], value)
    return least


def ledger(shape, name, rounds):
    """Rows of what a training step consists of: part, CPU milliseconds, counted FLOP (None where nothing is counted)."""
    T, B, N, D, R, H = (getattr(shape, axis) for axis in "TBNDRH")
    if name == "lrua":
        cell, scan, heads, flop = (
            "cell",
            "lrua_scan",
            sum(head_sizes(R, D, "separate", "learned")),
            lrua_scan_flop,
        )
        sizes = (T, B, N, D, R)
    else:
        cell, scan, heads, flop = "ntm_cell", "ntm_scan", sum(ntm_head_sizes(R, D, 1)), ntm_scan_flop
        sizes = (T, B, N, D, R, R)
    (case,) = cases(scan, shape, torch.float32, ("forward+backward",))
    memory = parts_of(case.calls[OURS], rounds)
    torch.manual_seed(0)  # the same layer whatever was measured before
    step = parts_of(calls_of(shape, [name])[name], rounds)
    of_memory = [flop(*sizes), flop(*sizes, backward=True) - flop(*sizes)]
    of_products = 2 * T * B * ((H + R * D) * 4 * H + H * heads)
    rows = []
    for direction, op, counted in zip(("forward", "backward"), ("", "_backward"), of_memory, strict=True):
        scanned, whole = memory[f"mann_fast::{scan}{op}"], step[f"mann_fast::{cell}{op}"]
        rows.append((f"{direction}: memory", scanned, counted))
        rows.append((f"{direction}: controller and heads of each step", whole - scanned, of_products))
    of_library = of_products + 2 * 2 * T * B * INPUTS * 4 * H
    rows.append(
        ("products over all steps, of the library", step["aten::mm"] + step["aten::addmm"], of_library)
    )
    rows.append(("the rest: sums, copies, autograd", step["all"] - sum(row[1] for row in rows), None))
    return [*rows, ("all", step["all"], sum(row[2] or 0 for row in rows))]


def print_ledger(shape, rounds):
    ledgers = {name: ledger(shape, name, rounds) for name in ("lrua", "ntm")}
    square = torch.randn(512, 512)
    product = min(cpu_time(lambda: square @ square) for _ in range(rounds))
    alone = parts_of(calls_of(shape, [])["nn.LSTM"], rounds)["all"]
    print(f"The library's product of 512 x 512: {2 * 512**3 / 1e6 / product:.1f} GFLOP/s")
    print(f"A training step at {shape}, one thread, float32: nn.LSTM {alone:.2f} ms")
    for name, rows in ledgers.items():
        print(f"{name}, {rows[-1][1] / alone:.2f} times nn.LSTM:")
        for part, milliseconds, counted in rows:
            rate = f"{counted / 1e6 / milliseconds:6.1f} GFLOP/s" if counted else ""
            print(f"  {part:45} {milliseconds:7.2f} ms {rate}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--memories", nargs="+", default=["lrua", "ntm", "dnc"])
    parser.add_argument("--shape", type=Shape.parse, default=Shape())
    parser.add_argument(
        "--ledger",
        action="store_true",
        help="CPU time of the parts of a step, on one thread",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1 if arguments.ledger else arguments.threads)
    torch.manual_seed(0)
    if arguments.ledger:
        print_ledger(arguments.shape, arguments.rounds)
        return
    times = measured(calls_of(arguments.shape, arguments.memories), arguments.rounds)
    print(f"A training step at {arguments.shape}, {arguments.threads} threads, float32:")
    for name, value in times.items():
        print(f"  {name:24} {value:9.1f} ms {value / times['nn.LSTM']:7.2f} times nn.LSTM")


if __name__ == "__main__":
    main()
