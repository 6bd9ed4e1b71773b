"""What a GPU takes for each kernel of the scans, the cell and the ops of large memories, by the profiler.

python benchmarks/kernel_times.py [PREFIX ...] [--json FILE]    those whose name begins so; all without a word
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from mann_fast import MemoryLayer, backend, ops  # noqa: E402

ROUNDS = 5


def lrua(B: int, T: int = 50, N: int = 128, D: int = 40, R: int = 4, dtype: torch.dtype = torch.float32):
    state = ops.LRUAState.initial(B, N, D, R)
    keys, vectors = (torch.randn(T, B, R, D, dtype=dtype, requires_grad=True) for _ in range(2))
    gates, sharpness = (torch.rand(T, B, R, dtype=dtype, requires_grad=True) for _ in range(2))
    return lambda: ops.lrua_scan(state, keys, vectors, gates, sharpness)[0]


def ntm(B: int, T: int = 50, N: int = 128, D: int = 20, R: int = 1):
    def head(count: int) -> ops.NTMHead:
        unit = lambda: torch.rand(T, B, count)  # noqa: E731
        shift = torch.softmax(torch.randn(T, B, count, 3), 3)
        return ops.NTMHead(
            torch.randn(T, B, count, D, requires_grad=True), 1 + unit(), unit(), shift, 1 + unit()
        )

    state, heads = ops.NTMState.initial(B, N, D, R, 1), (head(R), head(1))
    erase, add = torch.rand(T, B, 1, D), torch.randn(T, B, 1, D, requires_grad=True)
    return lambda: ops.ntm_scan(state, *heads, erase, add)[0]


def dnc(B: int, T: int = 50, N: int = 128, D: int = 40, R: int = 4):
    normal = lambda *sizes: torch.randn(T, B, *sizes, requires_grad=True)  # noqa: E731
    unit = lambda *sizes: torch.rand(T, B, *sizes)  # noqa: E731
    interface = ops.DNCInterface(
        *(normal(R, D), 1 + unit(R), normal(D), 1 + unit(), unit(D), normal(D), unit(R), unit(), unit()),
        torch.softmax(torch.randn(T, B, R, 3), 3),
    )
    state = ops.DNCState.initial(B, N, D, R)
    return lambda: ops.dnc_scan(state, interface)[0]


def cell(B: int, T: int = 50, **options):
    layer, x = (
        MemoryLayer(40, 200, num_slots=128, slot_size=40, num_heads=4, **options),
        torch.randn(T, B, 40),
    )
    return lambda: layer(x)[0]


def content(B: int, N: int = 128, D: int = 40, R: int = 4):
    memory, key = torch.randn(B, N, D, requires_grad=True), torch.randn(B, R, D, requires_grad=True)
    return lambda: ops.content_read(memory, key)[0]


def sparse(B: int, T: int = 50, N: int = 128, D: int = 40, R: int = 4, K: int = 4):
    state = ops.SparseState.initial(B, N, D, R, K)
    state = state._replace(memory=torch.randn(B, N, D, requires_grad=True))
    keys, vectors = (torch.randn(T, B, R, D, requires_grad=True) for _ in range(2))
    gates = torch.randn(T, B, R, requires_grad=True)
    return lambda: ops.sparse_scan(state, keys, vectors, gates)[0]


def sparse_read(B: int, N: int, D: int = 64, R: int = 4, K: int = 4):
    memory, key = torch.randn(B, N, D), torch.randn(B, R, D, requires_grad=True)
    return lambda: ops.sparse_read(memory, key, num_reads=K)[0]


def least(B: int, N: int):
    usage = torch.rand(B, N)
    return lambda: ops.least_used(usage, 4)


CASES: dict[str, Callable[[], Callable[[], Tensor]]] = {
    **{f"lrua_scan B={B}": lambda B=B: lrua(B) for B in (1, 16, 132, 256, 1024, 4096)},
    "lrua_scan B=256 bfloat16": lambda: lrua(256, dtype=torch.bfloat16),
    "lrua_scan B=16 N=512": lambda: lrua(16, N=512),
    "lrua_scan B=4 N=4096 D=64 T=10": lambda: lrua(4, T=10, N=4096, D=64),
    "lrua_scan B=1 N=16384 D=64 T=10": lambda: lrua(1, T=10, N=16384, D=64),
    **{f"ntm_scan B={B} D=20 R=1": lambda B=B: ntm(B) for B in (16, 256)},
    "ntm_scan B=16 D=40 R=4": lambda: ntm(16, D=40, R=4),
    **{f"dnc_scan B={B}": lambda B=B: dnc(B) for B in (16, 256)},
    **{f"cell B={B}": lambda B=B: cell(B) for B in (1, 16, 64, 256, 1024)},
    **{f"ntm_cell B={B}": lambda B=B: cell(B, addressing="ntm") for B in (1, 16, 256)},
    **{f"dnc_cell B={B}": lambda B=B: cell(B, addressing="dnc") for B in (1, 16, 256)},
    "content_read B=16": lambda: content(16),
    "content_read B=1 N=65536 D=64": lambda: content(1, 65536, 64),
    "content_read B=2048": lambda: content(2048),
    **{f"sparse_scan B={B}": lambda B=B: sparse(B) for B in (1, 16, 256)},
    **{f"sparse_scan B=1 N={N} T=10": lambda N=N: sparse(1, 10, N) for N in (1024, 4096, 65536, 1 << 20)},
    "sparse_read B=1 N=1048576 D=64": lambda: sparse_read(1, 1 << 20),
    "least_used B=16 N=128": lambda: least(16, 128),
    "least_used B=1 N=65536": lambda: least(1, 65536),
    "least_used B=1 N=1048576": lambda: least(1, 1 << 20),
}  # T=50 N=128 D=40 R=4 where a name says nothing else


def microseconds(run: Callable[[], object], name: str) -> float:
    """Of a round, all kernels of mann_fast together."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the profiler's own
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            for _ in range(ROUNDS):
                run()
            torch.cuda.synchronize()
    ours = [event for event in found.events() if name in event.name]
    return sum(event.device_time for event in ours) / ROUNDS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("prefixes", nargs="*", metavar="PREFIX")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this takes a GPU: torch.cuda.is_available() is False")
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    rows = []
    with backend("cuda"):
        for name, make in CASES.items():
            if args.prefixes and not name.startswith(tuple(args.prefixes)):
                continue
            call = make()

            def both(call=call):
                output = call()
                if output.requires_grad:
                    output.sum().backward()

            def alone(call=call):
                with torch.no_grad():
                    call()

            for _ in range(2):
                both(), alone()
            times = [microseconds(run, "mann_fast") for run in (alone, both)]
            rows.append({"what": name, "forward_us": times[0], "both_us": times[1]})
            print(
                f"{name:34} forward {times[0]:10.1f} us, forward and backward {times[1]:10.1f} us", flush=True
            )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
