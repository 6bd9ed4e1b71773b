"""What a step costs as the memory grows: sparse access beside dense, time and what is kept for backward.

    python benchmarks/sparse.py --out docs/sparse.png [--largest 20] [--heads 1] [--repeats 3]
    python benchmarks/sparse.py --search     # the exact search alone, beside a copy
    python benchmarks/sparse.py --layer      # a layer's training step of 100 steps, and the most memory that it takes

All on one thread, by its processor's time, which other work disturbs less. A step's figures are the difference between a call
of more steps and one of fewer, over the steps between them: what a call takes once (a copy of the memory, the slots sorted by
age, a gradient of the memory) is not in them. The approximate search is a layer's alone, controller and heads included
(benchmarks/sparse_index.py, which has more of it).
"""

from __future__ import annotations

import argparse
import math
import resource
import time
from collections.abc import Callable, Sequence
from functools import partial

import matplotlib
import torch
from sparse_index import Run, layer_of, memory_of
from torch import Tensor

from mann_fast import MemoryLayer, ops, reference
from mann_fast.benchmark import ceilings
from mann_fast.layers.sparse_index import LEAST_SLOTS

SIZE, READS, PROBES = 32, 4, 16
ALIKE, SPARSE = "sparse, from the start of a sequence", "sparse, every row another"
APPROXIMATE = "every row another, approximate search"
DENSE, EAGER = "dense, lrua_scan", "dense, eager PyTorch"
KINDS = (ALIKE, SPARSE, APPROXIMATE, DENSE, EAGER)


def best_of(functions: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """The least seconds of each; in turn, so that what else the machine does meets all alike."""
    least = [math.inf] * len(functions)
    for _ in range(repeats):
        for at, function in enumerate(functions):
            start = time.process_time()
            function()
            least[at] = min(least[at], time.process_time() - start)
    return least


def kept_bytes(function: Callable[[], object]) -> int:
    """Of the storages that are saved for backward."""
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = function()
    del result
    return sum(storages.values())


def call_of(kind: str, slots: int, heads: int, steps: int) -> Callable[[], Tensor]:
    torch.manual_seed(0)
    keys, vectors = (torch.randn(steps, 1, heads, SIZE).requires_grad_() for _ in range(2))
    gates, sharpness = torch.randn(steps, 1, heads), torch.full((steps, 1, heads), 5.0)
    memory = torch.randn(1, slots, SIZE)
    if kind in (ALIKE, SPARSE):
        state = ops.SparseState.initial(1, slots, SIZE, heads, READS)
        if kind == SPARSE:
            state = state._replace(memory=memory)
        return lambda: ops.sparse_scan(state, keys, vectors, gates, sharpness)[0]
    dense = ops.LRUAState.initial(1, slots, SIZE, heads)._replace(memory=memory)
    scan = ops.lrua_scan if kind == DENSE else reference.lrua_scan
    return lambda: scan(dense, keys, vectors, gates, sharpness)[0]


def measure(kind: str, slots: int, heads: int, repeats: int) -> tuple[float, float, float]:
    """Of a step: seconds forward, seconds forward and backward, bytes kept. NaN for what there is not, or is not known."""
    if kind == APPROXIMATE:
        if slots < LEAST_SLOTS or heads > 1:
            return math.nan, math.nan, math.nan
        run = Run(layer_of(slots, PROBES), memory_of("random", slots))
        run.build()
        forward, both = (run.step(backward, repeats) / 1e3 for backward in (False, True))
        return forward, both, math.nan
    few = 2
    # Enough that timings stand out, and for a dense scan several of the steps between two memories kept.
    many = 202 if slots <= 1 << 12 else {ALIKE: 2002, SPARSE: 22, DENSE: 34, EAGER: 5}[kind]
    calls = [call_of(kind, slots, heads, steps) for steps in (few, many)]
    # A step from the start takes microseconds, what a call takes once up to a tenth of a second: that has to be told well.
    repeats *= 3 if slots <= 1 << 14 or kind == ALIKE else 1
    forward = best_of([torch.no_grad()(call) for call in calls], repeats)
    both = best_of([lambda call=call: call().sum().backward() for call in calls], repeats)
    found = zip(forward, both, map(kept_bytes, calls), strict=True)
    return tuple((y - x) / (many - few) for x, y in zip(*found, strict=True))  # type: ignore[return-value]


def print_search(slots: int, bandwidth: float, repeats: int) -> None:
    """Of sparse_read, and of a step, which knows the norms, with one head and with four: at what share of a copy's bandwidth
    they read."""
    torch.manual_seed(0)
    memory = torch.randn(1, slots, SIZE)
    for heads in (1, 4):
        key = torch.randn(1, heads, SIZE)
        read = partial(ops.sparse_read, memory, key, num_reads=READS)
        scans = [call_of(SPARSE, slots, heads, steps) for steps in (2, 22)]
        with torch.no_grad():
            alone, few, many = best_of([read, *scans], 3 * repeats)
        for name, seconds in (("sparse_read", alone), ("a step", (many - few) / 20)):
            rate = memory.nbytes / seconds
            print(
                f"{name} of {slots:,} slots, {heads} heads: {seconds * 1e3:.2f} ms, {rate / 1e9:.1f} GB/s, "
                f"{rate / bandwidth:.0%} of the copy"
            )


def print_layer(slots: int) -> None:
    """A loop of training steps, as users have it: the state before is held while the next is made."""
    for batch in (1, 8):
        torch.manual_seed(0)
        layer = MemoryLayer(
            SIZE, 64, addressing="sparse", num_slots=slots, slot_size=SIZE, num_heads=1, num_reads=READS
        )
        x = torch.randn(100, batch, SIZE)
        for call in range(3):
            start = time.process_time()
            output, state = layer(x)
            middle = time.process_time()
            output.square().mean().backward()
            end = time.process_time()
            most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(
                f"100 steps of {batch} samples of {slots:,} slots, call {call}: {middle - start:.2f} s forward, "
                f"{end - middle:.2f} s backward; {most:.2f} GiB at most so far"
            )
        del state, output


def plot(path: str, sizes: list[int], rows: dict[str, list[tuple[float, float, float]]]) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for kind, values in rows.items():
        axes[0].loglog(sizes, [row[1] * 1e3 for row in values], marker="o", label=kind)
        axes[1].loglog(sizes, [row[2] / 1024 for row in values], marker="o", label=kind)
    for axis, title in zip(
        axes, ("forward and backward, ms per step", "kept for backward, KiB per step"), strict=True
    ):
        axis.set(title=title, xlabel="slots N")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="write a plot there")
    parser.add_argument(
        "--largest", type=int, default=20, help="exponent of 2 of the greatest number of slots"
    )
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--search", action="store_true", help="the exact search of the largest memory alone")
    parser.add_argument("--layer", action="store_true", help="a layer with the largest memory alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.layer:
        print_layer(1 << options.largest)
        return
    copy, copied = ceilings.copy(torch.device("cpu"))
    bandwidth = copied / best_of([copy], 10)[0]
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, copy {bandwidth / 1e9:.1f} GB/s; ",
        end="",
    )
    print(f"B=1, D={SIZE}, R={options.heads}, K={READS}, float32")
    if options.search:
        print_search(1 << options.largest, bandwidth, options.repeats)
        return
    print("| N | " + " | ".join(f"{kind}: forward, both (ms), kept (KiB)" for kind in KINDS) + " |")
    print("| --- " * (1 + len(KINDS)) + "|")
    sizes = [1 << k for k in range(8, options.largest + 1, 4)]
    rows: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in KINDS}
    for slots in sizes:
        for kind, values in rows.items():
            values.append(measure(kind, slots, options.heads, options.repeats))
        cells = (values[-1] for values in rows.values())
        print(
            f"| {slots} | "
            + " | ".join(f"{f * 1e3:.3g}, {b * 1e3:.3g}, {k / 1024:.4g}" for f, b, k in cells)
            + " |",
            flush=True,
        )
    if options.out:
        plot(options.out, sizes, rows)


if __name__ == "__main__":
    main()
