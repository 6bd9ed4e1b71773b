"""Compiles the CUDA kernels as C++ for this processor: a fiber for every thread of a block (tests/cpp/emulation.h).

python scripts/emulate.py FILE.so      a library that serves CPU tensors with backend "cuda", where MANN_FAST_EMULATION names it
"""

from __future__ import annotations

import sys
from pathlib import Path

from build_backend import find_torch
from native import CUDA_KERNELS, CannotBuild, Compiler, Unit, binding_flags

FLAGS = ["-DMANN_FAST_EMULATION", "-Itests/cpp", "-Wno-unknown-pragmas"]


def kernel_units() -> list[Unit]:
    return [Unit(f"csrc/cuda/{name}.cu", name, [*FLAGS, "-x", "c++"]) for name in CUDA_KERNELS]


def build_library(target: Path) -> None:
    compiler, torch = Compiler(), find_torch()
    if torch is None:
        raise CannotBuild("no torch was found to build with")
    bindings = Unit("csrc/cuda/bindings.cpp", "bindings", [*FLAGS, *binding_flags(torch)])
    # -O3 takes five times as long to compile, and what runs are mostly switches from one fiber to the next.
    objects = compiler.compile([*kernel_units(), bindings], target.parent, ["-O1"])
    compiler.run(
        ["-shared", "-o", str(target), *map(str, objects), "-lstdc++", f"-L{torch}/lib", "-ltorch_cpu"]
    )


if __name__ == "__main__":
    try:
        build_library(Path(sys.argv[1]).absolute())
    except CannotBuild as problem:
        sys.exit(str(problem))
