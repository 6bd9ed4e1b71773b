"""What a step costs as the memory grows: sparse access beside dense, time and what is kept for backward.

    python benchmarks/sparse.py --out docs/sparse.png [--largest 20] [--heads 1]

A step's figures are the difference between a call of more steps and one of fewer, over the steps between them: what a call
takes once (a copy of the memory, the slots sorted by age, a gradient of the memory) is not in them. The approximate search is
a layer's alone, controller and heads included (benchmarks/sparse_index.py, which has more of it).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import matplotlib
import torch
from sparse_index import Run, layer_of, memory_of
from torch import Tensor

from mann_fast import ops, reference
from mann_fast.benchmark import ceilings
from mann_fast.ops.sparse_index import LEAST_SLOTS

SIZE, READS, PROBES = 32, 4, 16
ALIKE, SPARSE = "sparse, from the start of a sequence", "sparse, every row another"
APPROXIMATE = "the same, approximate search"
DENSE, EAGER = "dense, lrua_scan", "dense, eager PyTorch"
KINDS = (ALIKE, SPARSE, APPROXIMATE, DENSE, EAGER)


def best_of(function: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


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
    repeats *= 3 if slots <= 1 << 14 else 1
    found = []
    for steps in (few, many):
        call = call_of(kind, slots, heads, steps)
        with torch.no_grad():
            forward = best_of(call, repeats)
        both = best_of(lambda: call().sum().backward(), repeats)  # noqa: B023, called at once
        found.append((forward, both, kept_bytes(call)))
    return tuple((y - x) / (many - few) for x, y in zip(*found, strict=True))  # type: ignore[return-value]


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
    options = parser.parse_args()
    copy, copied = ceilings.copy(torch.device("cpu"))
    bandwidth = copied / best_of(copy, 10)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, copy {bandwidth / 1e9:.1f} GB/s; ",
        end="",
    )
    print(f"B=1, D={SIZE}, R={options.heads}, K={READS}, float32")
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
    read = sizes[-1] * SIZE * 4 / rows[SPARSE][-1][0]
    print(f"the search at N = {sizes[-1]}: {read / 1e9:.1f} GB/s, {read / bandwidth:.0%} of the copy")
    if options.out:
        plot(options.out, sizes, rows)


if __name__ == "__main__":
    main()
