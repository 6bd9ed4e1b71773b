"""mann-fast doctor: what this machine runs mann_fast on, and what keeps it from the fastest path."""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path

import torch

from .. import __version__, backend, backends, ops, reference
from ..ops._backend import NAMES
from . import _explain

EXAMPLE = """\
example:
  mann-fast doctor
  mann-fast doctor --explain lrua_scan 4096 64 4  (how each backend serves it with N=4096, D=64, R=4)

Put its output into every bug report. Exits with status 1 if a backend that should run gives no or a wrong
result.
"""

BUILD_INFO = Path(__file__).parent.parent / "_build_info.json"


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "doctor",
        help="say which backends can run here, and why others cannot",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--explain",
        nargs=4,
        metavar=("OP", "N", "D", "R"),
        help="instead, say how each backend serves an op with N slots of width D and R heads",
    )
    return parser


def explain(op: str, *sizes: str) -> int:
    try:
        numbers = [int(size) for size in sizes]
    except ValueError:
        raise ValueError(f"--explain takes an op and three numbers, got {op} {' '.join(sizes)}") from None
    for name, answer in _explain.explain(op, *numbers).items():
        print(f"{name:10} {answer}")
    return 0


def run(args: argparse.Namespace) -> int:
    if args.explain:
        return explain(*args.explain)
    lines = [
        ("mann_fast", __version__),
        (
            "python",
            f"{platform.python_version()} on {platform.system()} {platform.release()}, {platform.machine()}",
        ),
        ("torch", torch.__version__),
        (
            "processor",
            f"{processor()}, {usable_cores()} of {os.cpu_count()} cores usable, {instruction_set()}",
        ),
        ("threads", f"{torch.get_num_threads()} (OMP_NUM_THREADS sets it)"),
        ("gpu", gpu()),
        ("extension", extension()),
        ("CUDA kernels", cuda_kernels()),
    ]
    healthy = True
    for name, reason in backends().items():
        if reason is None:
            reason = trial(name)
            healthy = healthy and reason is None
        lines.append((f"backend {name}", "runs" if reason is None else f"cannot run: {reason}"))
    lines.append(("in use", in_use()))
    healthy = healthy and os.environ.get("MANN_FAST_BACKEND", "auto") in NAMES
    for name, value in lines:
        print(f"{name:18} {' '.join(value.split())}")
    return 0 if healthy else 1


def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may use, which containers and taskset make fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def instruction_set() -> str:
    forced = os.environ.get("MANN_FAST_CPU_ISA")
    return f"{torch.backends.cpu.get_cpu_capability()}" + (f" (MANN_FAST_CPU_ISA={forced})" if forced else "")


def gpu() -> str:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return f"{', '.join(names)}; CUDA {torch.version.cuda}"
    if torch.version.cuda is None:
        return "none: this torch is built without CUDA"
    return "none: torch finds no CUDA device or driver"


def extension() -> str:
    """How the C++ extension was built, or why it was not."""
    try:
        info = json.loads(BUILD_INFO.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if backends()["cpp"] is None:
            return "present, but not built by pip: nothing is known about its making"
        return "not built: this source tree was never installed; run `pip install -e .` in it"
    if not info["extension"]:
        return f"not built: {info['reason']}"
    return f"built with torch {info['torch']} and {info['compiler']} for {', '.join(info['isas'])}"


def cuda_kernels() -> str:
    """How the CUDA kernels were built, or why they were not."""
    try:
        info = json.loads(BUILD_INFO.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "not built"
    if info["cuda"] is None:
        return f"not built: {info['cuda_reason']}"
    return f"built with {info['cuda']} for {', '.join(f'sm_{arch}' for arch in info['architectures'])}"


def trial(name: str) -> str | None:
    """Run one op on a backend and compare with the reference; None if it is right, else what is wrong."""
    generator = torch.Generator().manual_seed(0)
    device = "cuda" if name in ("cuda", "triton") and torch.cuda.is_available() else "cpu"
    memory, key = (torch.randn(2, n, 5, generator=generator).to(device) for n in (7, 3))
    try:
        with backend(name):
            results = ops.content_read(memory, key)
    except RuntimeError as error:
        return str(error)
    expected = reference.content_read(memory, key)
    close = all(torch.allclose(a, b, atol=1e-5) for a, b in zip(results, expected, strict=True))
    return None if close else "its results differ from the reference's; please report this"


def in_use() -> str:
    forced = os.environ.get("MANN_FAST_BACKEND", "auto")
    if forced not in NAMES:
        return f"none: MANN_FAST_BACKEND must be one of {', '.join(NAMES)}, got {forced!r}"
    if forced != "auto":
        return f"{forced} (MANN_FAST_BACKEND)"
    return (
        "cpp on the CPU; on NVIDIA GPUs cuda, or triton where that cannot run; reference elsewhere"
        if backends()["cpp"] is None
        else "reference, which is many times slower"
    )
