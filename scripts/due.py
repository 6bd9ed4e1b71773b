"""What `make check` has to show again: of its parts, by name, those of which a file has changed since they last passed.

    python scripts/due.py TEST...                      of make check, and the tests given that have changed
    python scripts/due.py --nightly                    of make nightly: what was never shown with nothing left out
    python scripts/due.py --passed check NAME...       these parts and tests passed on the files as they are: remember that
    python scripts/due.py --passed nightly NAME...

.ci/passed.json has a digest of each part's files, by which nothing but their content counts: no date, no history.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from native import CUDA_ARCHITECTURES, CannotBuild, Nvcc

ROOT = Path(__file__).resolve().parent.parent
PASSED = ROOT / ".ci" / "passed.json"
# What a part shows of the kernels can change with these alone. What it shows of the Python around them, a sample does.
CPU = ("csrc/cpu", "csrc/include", "scripts/native.py")
BINDINGS = ("csrc/bindings", "csrc/bindings.cpp", "csrc/bindings.h")
CUDA = ("csrc/cuda", "csrc/include", "scripts/native.py")
EMULATION = ("tests/cpp/emulation.h", "scripts/emulate.py")
RECORD = "benchmarks/instructions.json"
PARTS = {
    "isas": CPU,
    # Python too: of a single op most instructions are the way to its kernel.
    "instructions": (*CPU, *BINDINGS, "mann_fast/ops", "mann_fast/layers", "mann_fast/benchmark", RECORD),
    "cuda": (*CUDA, "scripts/cuda_report.py", "scripts/gpu_model", "benchmarks/kernel_times.py"),
    "emulate": (*CUDA, *EMULATION),
    "triton": ("kernels", "scripts/triton_aot.py"),
    "sanitize-cpu": (*CPU, "tests/cpp", "scripts/sanitize.py"),
    "sanitize-cuda": (*CUDA, *EMULATION, "tests/cpp", "scripts/sanitize.py"),
    "wheel": ("setup.py", "pyproject.toml", "MANIFEST.in", "scripts/build_backend.py", "scripts/native.py"),
}


def files(name: str) -> Iterator[Path]:
    path = ROOT / name
    if not path.is_dir():
        return iter([path])
    return (file for file in sorted(path.rglob("*")) if file.is_file() and "__pycache__" not in file.parts)


def digest(names: tuple[str, ...]) -> str:
    """Of what these files and folders hold; FileNotFoundError where there is none of a name."""
    sums = hashlib.sha256()
    for file in (file for name in names for file in files(name)):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        sums.update(f"{file.relative_to(ROOT)} {content}\n".encode())
    return sums.hexdigest()


def why_skipped(name: str) -> str | None:
    """Of a part that says so and passes where it cannot be shown: why that is so here, or None."""
    if name == "cuda":
        try:
            Nvcc(CUDA_ARCHITECTURES)
        except CannotBuild as problem:
            return str(problem)
    if name == "instructions":
        sys.path.insert(0, str(ROOT))
        from mann_fast.benchmark.instructions import incomparable  # imports torch

        return incomparable(ROOT / RECORD)
    return None


def was_shown(name: str) -> bool:
    if reason := why_skipped(name):
        print(f"{name} is not remembered as passed: {reason}", file=sys.stderr)
    return not reason


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="files of tests, relative to the root of the project")
    parser.add_argument("--nightly", action="store_true")
    parser.add_argument("--passed", choices=("check", "nightly"))
    args = parser.parse_args()
    known = json.loads(PASSED.read_text()) if PASSED.exists() else {"check": {}, "nightly": {}}
    if args.passed:
        shown = [name for name in args.names if was_shown(name)]
        known[args.passed] |= {name: digest(PARTS.get(name, (name,))) for name in shown}
        PASSED.write_text(json.dumps(known, indent=1) + "\n")
        return
    before = known["nightly" if args.nightly else "check"]
    parts = PARTS | {test: (test,) for test in args.names}
    print(*(name for name, made_of in parts.items() if before.get(name) != digest(made_of)))


if __name__ == "__main__":
    main()
