"""Checks what the built extension and its objects ask of others and offer to them.

    python scripts/check_abi.py [mann_fast/_C.abi3.so] [build/objects]     (exits 1 if something is amiss)

- The library, and that of the CUDA kernels where there is one, may need C and C++ runtime symbols, and of torch
  only aoti_* and torch_* names, all of which libtorch_cpu.so of the oldest supported torch defines
  (scripts/torch_2.11_symbols.txt). So it loads beside any later one.
- It exports nothing of its own (weak copies of what the C++ library defines inline aside).
- An object compiled for one instruction set defines nothing outside the namespace of that set. Else the
  linker might keep its copy of a shared inline function for all, and processors without the set would stop
  at an illegal instruction.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CUDA_LIBRARY = "_C_cuda.abi3.so"
OLDEST = ROOT / "scripts" / "torch_2.11_symbols.txt"
RUNTIME_VERSION = re.compile(r"@+(GLIBC|GLIBCXX|CXXABI|GCC)_")
RUNTIME_WEAK = {
    "_ITM_deregisterTMCloneTable",
    "_ITM_registerTMCloneTable",
    "__gmon_start__",
    "__cxa_finalize",
}
# Of libtorch_cuda.so; torch 2.11 has it.
OF_CUDA = {"aoti_torch_get_current_cuda_stream"}
LINKER_MARKS = {"__bss_start", "_edata", "_end"}


def symbols(file: Path, *options: str) -> list[tuple[str, str]]:
    """(type, name) of each symbol, as nm prints them."""
    listing = subprocess.run(["nm", *options, str(file)], check=True, capture_output=True, text=True).stdout
    return [tuple(line.split()[-2:]) for line in listing.splitlines() if line.strip()]


def check_library(library: Path) -> list[str]:
    """What is wrong with the symbols that the library needs and exports."""
    problems = []
    oldest = {line for line in OLDEST.read_text().splitlines() if not line.startswith("#")}
    if library.name == CUDA_LIBRARY:
        oldest |= OF_CUDA
    needed = [name for _, name in symbols(library, "-D", "--undefined-only")]
    of_torch = {name for name in needed if re.match(r"(aoti|torch)_", name)}
    for name in sorted(of_torch - oldest):
        problems.append(f"{library.name} needs {name}, which torch 2.11 does not have")
    for name in needed:
        if name not in of_torch and name not in RUNTIME_WEAK and not RUNTIME_VERSION.search(name):
            problems.append(
                f"{library.name} needs {name}, neither of the stable ABI nor of the C and C++ runtime"
            )
    for kind, name in symbols(library, "-D", "--defined-only"):
        if kind not in "WVu" and name not in LINKER_MARKS:
            problems.append(f"{library.name} exports {name}")
    print(f"{library.name}: {len(of_torch)} symbols of torch, {len(needed) - len(of_torch)} of the runtime")
    return problems


def check_object(file: Path) -> list[str]:
    """What an object of one instruction set (named <kernel>_<isa>.o) defines for others that it must not."""
    isa = file.stem.split("_")[-1]
    inside = f"_ZN9mann_fast{len(isa)}{isa}"
    defined = symbols(file, "--defined-only", "--extern-only")
    return [
        f"{file.name} defines {name} ({kind}), which objects of other instruction sets may get"
        for kind, name in defined
        if kind in "WwVvu" or not name.startswith(inside)
    ]


def main(arguments: list[str]) -> int:
    library = Path(arguments[0]) if arguments else ROOT / "mann_fast" / "_C.abi3.so"
    folder = Path(arguments[1]) if len(arguments) > 1 else ROOT / "build" / "objects"
    objects = [file for file in sorted(folder.glob("*_*.o")) if not file.name.startswith("cuda_")]
    if not objects:
        print(f"there are no objects in {folder}", file=sys.stderr)
        return 1
    problems = check_library(library)
    if (beside := library.with_name(CUDA_LIBRARY)).exists():
        problems += check_library(beside)
    for file in objects:
        problems += check_object(file)
    print(f"{len(objects)} objects: {' '.join(file.stem for file in objects)}")
    print("\n".join(problems) or "ABI as it should be", file=sys.stderr if problems else sys.stdout)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
