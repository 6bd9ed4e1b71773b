"""Builds tests/cpp/kernels_driver.cpp with the kernels under sanitizers and runs it for each instruction set.

python scripts/sanitize.py [address,undefined | thread]...     (both if none is named)
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from native import ROOT, CannotBuild, Compiler, Unit

DRIVER = Unit("tests/cpp/kernels_driver.cpp", "driver", [])
NOT_SUPPORTED = 77  # the driver's exit code for an instruction set that the processor does not have


def sanitize(compiler: Compiler, sanitizers: str) -> bool:
    """Whether all instruction sets that this processor has run without a finding."""
    folder = Path("build") / f"sanitize-{sanitizers.replace(',', '-')}"
    flags = ["-O1", "-g", "-fno-omit-frame-pointer", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    objects = compiler.compile([*compiler.kernel_units(), DRIVER], folder, flags)
    program = folder / "driver"
    compiler.run([*flags, "-o", str(program), *map(str, objects), "-pthread"])
    command = [str(ROOT / program)]
    if "thread" in sanitizers and shutil.which("setarch"):
        # ThreadSanitizer knows where programs are loaded, which far-reaching address randomisation changes.
        command = ["setarch", platform.machine(), "--addr-no-randomize", *command]
    clean = True
    for isa in compiler.isas:
        done = subprocess.run(command, env={**os.environ, "MANN_FAST_CPU_ISA": isa, "MANN_FAST_POISON": "1"})
        if done.returncode == NOT_SUPPORTED:
            print(f"{sanitizers}: {isa} SKIPPED, this processor does not have it")
        else:
            print(f"{sanitizers}: {isa} {'passed' if done.returncode == 0 else 'FAILED'}", flush=True)
            clean = clean and done.returncode == 0
    return clean


def main(arguments: list[str]) -> int:
    try:
        compiler = Compiler()
        clean = [
            sanitize(compiler, sanitizers) for sanitizers in arguments or ["address,undefined", "thread"]
        ]
    except CannotBuild as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0 if all(clean) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
