"""What the CUDA kernels take on an H200, by a model of their machine code: no GPU is needed.

python scripts/gpu_model lrua_scan [--backward] [--profile] ...   one op
python scripts/gpu_model --write docs/cuda.md                     the table in the file, between its two marks
python scripts/gpu_model --check docs/cuda.md                     fails where a kernel is slower than the table says

The op runs on CPU tensors. Each kernel that it launches is compiled by nvcc and interpreted, and what comes out is compared
with the reference. docs/cuda.md says what the model has and what it leaves out.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from machine_code import find_tool  # noqa: E402
from measure import ARCHITECTURE, Model, Timed, WrongNumbers  # noqa: E402
from native import CannotBuild, Nvcc, cuda_architectures  # noqa: E402
from operands import Unsupported  # noqa: E402
from report import figures, profile  # noqa: E402
from table import check, write  # noqa: E402

OPTIONS = {"T": "--steps", "N": "--slots", "D": "--slot-size", "R": "--heads", "dtype": "--dtype"}


def workloads() -> dict:
    """What makes the inputs of an op, as benchmarks/kernel_times.py has it."""
    import kernel_times as make

    return {
        "lrua_scan": make.lrua,
        "ntm_scan": make.ntm,
        "dnc_scan": make.dnc,
        "cell": make.cell,
        "ntm_cell": lambda B, T=50: make.cell(B, T, addressing="ntm"),
        "dnc_cell": lambda B, T=50: make.cell(B, T, addressing="dnc"),
        "content_read": make.content,
        "least_used": lambda B, N=128: make.least(B, N),
        "sparse_scan": make.sparse,
        "sparse_read": lambda B, N=1024, D=64, R=4: make.sparse_read(B, N, D, R),
    }


def measured(model: Model, op: str, part: str, samples: int = 1, **sizes) -> tuple[list[Timed], int]:
    """Its launches, and the steps of its sequence; sizes by the names that the maker of its inputs has."""
    make = workloads()[op]
    known = inspect.signature(make).parameters
    if unknown := sorted(set(sizes) - set(known)):
        raise ValueError(f"{op} does not take {', '.join(OPTIONS[name] for name in unknown)}")
    torch.manual_seed(0)
    steps = sizes.get("T", known["T"].default) if "T" in known else 1
    return model.run(make(samples, **sizes), part), steps


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python scripts/gpu_model",
    )
    parser.add_argument("op", nargs="?")
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--backward", dest="part", action="store_const", const="backward", default="forward")
    parts.add_argument(
        "--keep", dest="part", action="store_const", const="keep", help="forward as backward needs it"
    )
    parser.add_argument(
        "--profile", action="store_true", help="where the cycles go: reasons, functions, lines"
    )
    for name in ("T", "N", "D", "R"):
        parser.add_argument(OPTIONS[name], dest=name, type=int)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), help="of the inputs of lrua_scan")
    parser.add_argument("--blocks-per-processor", type=int, default=1, metavar="N")
    parser.add_argument("--scale", type=float, default=1.0, help="all latencies times this")
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--check", type=Path, metavar="FILE")
    args = parser.parse_args()
    if (args.op is None) == (args.write is None and args.check is None):
        parser.error("an op, --write or --check")
    try:
        Nvcc([ARCHITECTURE]), find_tool("nvdisasm")
        if args.op is None:
            os.environ["MANN_FAST_CUDA"] = "1"  # as scripts/cuda_report.py has it, whose objects serve
            find_tool("cuobjdump")
            if ARCHITECTURE not in cuda_architectures():
                raise CannotBuild(f"MANN_FAST_CUDA_ARCHS is without sm_{ARCHITECTURE}")
    except CannotBuild as problem:
        print(f"gpu_model: SKIPPED, {problem}")
        return 0
    try:
        if args.op is None:
            anew = lambda: Model(of_build=True)  # noqa: E731
            return write(anew, measured, args.write) if args.write else check(anew, measured, args.check)
        model = Model(args.blocks_per_processor, args.scale)
        if args.op not in workloads():
            parser.error(f"no op {args.op}: there are {', '.join(workloads())}")
        sizes = {name: value for name in OPTIONS if (value := getattr(args, name)) is not None}
        if args.dtype:
            sizes["dtype"] = getattr(torch, args.dtype)
        launches, steps = measured(model, args.op, args.part, args.blocks_per_processor, **sizes)
    except (CannotBuild, Unsupported, WrongNumbers, ValueError) as problem:
        print(f"gpu_model: {problem}", file=sys.stderr)
        return 1
    print(f"the numbers are the reference's but for {model.worst:.1e} of the greatest")
    for timed in launches:
        print(figures(timed, steps))
        if args.profile:
            print(profile(timed, steps))
    return 0


if __name__ == "__main__":
    sys.exit(main())
