"""Runs the kernels under sanitizers, with nothing of torch around them: those for the CPU on each instruction set
(tests/cpp/kernels_driver.cpp), and those for CUDA emulated on this processor (tests/cpp/cuda_driver.cpp).

For the emulated ones it also shows that the check can fail: kernels with a planted defect are noticed, and so is every barrier
that is left out.

python scripts/sanitize.py [options] [address,undefined | thread]...     (both if none is named)

--kernels cpu, or cuda: those alone.
--reduced-cpu: the first and the last of the instruction sets that this processor has: there is hardly a line for another alone.
--reduced-cuda: one order of warps and lanes, no barrier left out, and under the thread sanitizer only those cases of the
emulated kernels in which barriers are left out otherwise.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import emulate
from native import ROOT, CannotBuild, Compiler, Unit, isas_here

DRIVERS = {
    "cpu": [Unit("tests/cpp/kernels_driver.cpp", "kernels_driver", [])],
    "cuda": [Unit("tests/cpp/cuda_driver.cpp", "cuda_driver", emulate.FLAGS), *emulate.kernel_units()],
}
# What a sanitizer must notice in tests/cpp/cuda_driver.cpp.
PLANTED = {"address,undefined": ["divergent", "out-of-bounds"], "thread": ["divergent", "late"]}
# Of the order in which warps and lanes run. A race is one in any order.
SEEDS = {"address,undefined": ("1", "2", "3"), "thread": ("1",)}
NOT_SUPPORTED = 77  # the driver's exit code for an instruction set that the processor does not have
AT_ONCE = ThreadPoolExecutor(os.cpu_count())  # runs of a driver


def chosen(compiler: Compiler, sanitizers: str, reduced: bool) -> list[str]:
    """The instruction sets to run."""
    if sanitizers == "thread":
        return ["baseline"]  # threads do the same on each
    here = isas_here(compiler.isas)
    return sorted({here[0], here[-1]}, key=here.index) if reduced else list(compiler.isas)


def build(compiler: Compiler, sanitizers: str, isas: list[str], kernels: list[str]) -> dict[str, Path]:
    """The drivers of these kernels, by "cpu" and "cuda"; both have the CPU's, for these instruction sets."""
    folder = Path("build") / f"sanitize-{sanitizers.replace(',', '-')}"
    # -g1: the functions and lines that a finding names; -g takes half as long again to compile, and -O1 with the
    # undefined-behaviour sanitizer five times.
    level = "-O0" if "undefined" in sanitizers else "-O1"
    flags = [level, "-g1", "-fno-omit-frame-pointer", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    shared = compiler.kernel_units(isas)
    units = {name: units for name, units in DRIVERS.items() if name in kernels}
    built = iter(
        map(str, compiler.compile([*shared, *(x for part in units.values() for x in part)], folder, flags))
    )
    objects = [next(built) for _ in shared]
    programs = {}
    for name, part in units.items():
        programs[name] = folder / f"{name}_driver"
        own = [next(built) for _ in part]
        compiler.run([*flags, "-o", str(programs[name]), *own, *objects, "-lstdc++", "-lm", "-pthread"])
    return programs


def run(
    program: Path, sanitizers: str, *arguments: str, quiet: bool = False, **environment: str
) -> tuple[int, str]:
    """Exit status and standard output."""
    command = [str(ROOT / program), *arguments]
    if "thread" in sanitizers and shutil.which("setarch"):
        # ThreadSanitizer knows where programs are loaded, which far-reaching address randomisation changes.
        command = ["setarch", platform.machine(), "--addr-no-randomize", *command]
    settings = {"MANN_FAST_POISON": "1", "MANN_FAST_CPU_ISA": "baseline", "TSAN_OPTIONS": "halt_on_error=1"}
    environment = {**os.environ, **settings, **environment}
    done = subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if quiet else None,
        text=True,
    )
    return done.returncode, done.stdout


def sanitize(program: Path, sanitizers: str, isas: list[str]) -> bool:
    """Whether those of the instruction sets that this processor has run without a finding."""
    clean = True
    runs = AT_ONCE.map(lambda isa: run(program, sanitizers, MANN_FAST_CPU_ISA=isa), isas)
    for isa, (status, _) in zip(isas, runs, strict=True):
        if status == NOT_SUPPORTED:
            print(f"{sanitizers}: {isa} SKIPPED, this processor does not have it")
        else:
            print(f"{sanitizers}: {isa} {'passed' if status == 0 else 'FAILED'}", flush=True)
            clean = clean and status == 0
    return clean


def sanitize_cuda(program: Path, sanitizers: str, reduced: bool) -> bool:
    """Whether the emulated kernels run without a finding, and whatever is wrong on purpose is noticed."""
    clean = True

    def say(what: str, good: bool) -> None:
        nonlocal clean
        clean = clean and good
        print(f"{sanitizers}: emulated CUDA, {what} {'passed' if good else 'FAILED'}", flush=True)

    seeds = SEEDS[sanitizers][: 1 if reduced else None]
    few = ["--few"] if reduced and sanitizers == "thread" else []
    runs = AT_ONCE.map(lambda seed: run(program, sanitizers, "--seed", seed, *few), seeds)
    for seed, (status, output) in zip(seeds, runs, strict=True):
        say(f"seed {seed}: {output.strip()}", status == 0)
    for defect in PLANTED[sanitizers]:
        status, _ = run(program, sanitizers, "--plant", defect, quiet=True)
        say(f"a planted defect ({defect}) is noticed:", status != 0)
    if sanitizers == "thread" and not reduced:
        # Not dnc_cell: two of a cell's barriers are for what other memories do between them.
        for kernel in ("content", "write", "scan", "cell", "ntm", "ntm_cell", "dnc"):
            _, output = run(program, sanitizers, kernel, "--few")
            for scope, count in zip(
                ("block", "warp"), re.findall(r"(\d+) barriers of a|and (\d+) of", output), strict=True
            ):
                numbers = range(int("".join(count)))
                omitting = partial(run, program, sanitizers, kernel, "--few", f"--omit-{scope}", quiet=True)
                runs = AT_ONCE.map(omitting, map(str, numbers))
                missed = [number for number, (status, _) in zip(numbers, runs, strict=True) if status == 0]
                say(
                    f"{kernel}: each of {len(numbers)} barriers of a {scope} is needed, not noticed {missed}:",
                    not missed,
                )
    return clean


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sanitizers", nargs="*", default=["address,undefined", "thread"])
    parser.add_argument("--kernels", nargs="+", choices=("cpu", "cuda"), default=["cpu", "cuda"])
    parser.add_argument("--reduced-cpu", action="store_true")
    parser.add_argument("--reduced-cuda", action="store_true")
    args = parser.parse_args()
    try:
        compiler = Compiler()
        clean = []
        for sanitizers in args.sanitizers:
            isas = chosen(compiler, sanitizers, args.reduced_cpu)
            programs = build(compiler, sanitizers, isas, args.kernels)
            if "cuda" in programs:
                clean.append(sanitize_cuda(programs["cuda"], sanitizers, args.reduced_cuda))
            if "cpu" in programs:
                clean.append(sanitize(programs["cpu"], sanitizers, isas))
    except CannotBuild as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0 if all(clean) else 1


if __name__ == "__main__":
    sys.exit(main())
