"""Compiles the CUDA kernels, warnings as errors, and shows what each takes: registers, stack and spills.

python scripts/cuda_report.py [--write docs/cuda.md]     (exits 1 if a kernel of the paper's size spills)

Needs nvcc and no GPU. For three generations of them, or those that MANN_FAST_CUDA_ARCHS names. --write replaces the table
in the file between its two marks.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from native import CannotBuild, Nvcc, cuda_architectures

# What may not spill: 33 to 40 numbers a slot in registers, of LRUA with more than one head, of NTM, of a cell and of a DNC, and
# all with a plan that is known when compiled.
PAPER = ("<float, 5, 4, true", "<float, 5, true", "<float, true>", "FixedPlan<", "held_kernel<")
# Bytes that are known to be spilt, stored and loaded, at most. dnc: loop variables of a step that has twice what registers
# hold, five times as fast on an H200 as without registers. cell back: sizes that are not known when compiled.
KNOWN_SPILLS = {
    "dnc_backward_held_kernel<": {"sm_80": 736, "sm_90": 432, "sm_100": 16},
    "cell_backward_kernel<float, 5, true, Plan": {"sm_90": 228},
}
ENTRY = re.compile(
    r"Compiling entry function '(\w+)' for '(sm_\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)
MARKS = ("<!-- begin: scripts/cuda_report.py --write -->", "<!-- end -->")


def demangle(names: list[str]) -> list[str]:
    if not shutil.which("c++filt"):
        return names
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def main(arguments: list[str]) -> int:
    try:
        os.environ["MANN_FAST_CUDA"] = (
            "1"  # whether or not there is a GPU, and whatever the build was asked for
        )
        nvcc = Nvcc(cuda_architectures())
        objects = nvcc.compile(nvcc.kernel_units(), Path("build/objects"))
    except CannotBuild as problem:
        if "no nvcc" in str(problem):
            print(f"cuda_report: SKIPPED, {problem}")
            return 0
        print(problem, file=sys.stderr)
        return 1
    found = [match for file in objects for match in ENTRY.findall(file.with_suffix(".log").read_text())]
    kernels: dict[str, dict[str, str]] = {}
    spilling = []
    for name, (_, architecture, stack, stores, loads, registers) in zip(
        demangle([entry[0] for entry in found]), found, strict=True
    ):
        match = re.search(r"(\w+_kernel<.*?>)\(", name)
        name = match[1].replace("mann_fast::cuda::", "").replace(" >", ">") if match else name
        spills = int(stores) + int(loads)
        kernels.setdefault(name, {})[architecture] = f"{registers}, {stack}, {spills}"
        known = max(
            (known.get(architecture, 0) for begin, known in KNOWN_SPILLS.items() if name.startswith(begin)),
            default=0,
        )
        if spills > known and any(paper in name for paper in PAPER):
            spilling.append(f"{name} spills {spills} bytes on {architecture}")
    if not kernels:
        print("cuda_report: the compiler said nothing of its kernels", file=sys.stderr)
        return 1
    architectures = [f"sm_{architecture}" for architecture in nvcc.architectures]
    lines = [f"{nvcc.version}: registers, bytes of stack, bytes spilt", ""]
    lines += ["| kernel | " + " | ".join(architectures) + " |", "| --- " * (len(architectures) + 1) + "|"]
    lines += [
        f"| `{name}` | " + " | ".join(row.get(architecture, "") for architecture in architectures) + " |"
        for name, row in sorted(kernels.items())
    ]
    print("\n".join(lines))
    if arguments:
        file = Path(arguments[1])
        begin, end = (file.read_text().index(mark) for mark in MARKS)
        text = file.read_text()
        file.write_text(text[: begin + len(MARKS[0])] + "\n" + "\n".join(lines) + "\n" + text[end:])
    print("\n".join(spilling) or f"no kernel {' or '.join(PAPER)} spills more than is known")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
