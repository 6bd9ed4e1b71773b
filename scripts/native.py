"""Compiling csrc/: which file with which flags, and only what has changed. For setup.py and sanitize.py."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
OLDEST_TORCH = (2, 11)

# The one that takes longest first.
KERNELS = ["dnc", "cell", "lrua", "ntm", "content", "sparse"]
CUDA_KERNELS = [
    "lrua_scan_backward",
    "dnc_scan_backward",
    "ntm_scan_backward",
    "cell_backward",
    "ntm_cell_backward",
    "dnc_cell_backward",
    "lrua_scan",
    "cell",
    "ntm_cell",
    "dnc_cell",
    "ntm_scan",
    "dnc_scan",
    "content",
    "sparse",
    "lrua",
    "sparse_backward",
]
ISA_FLAGS = {  # by processor; any other has the baseline only
    "x86_64": {
        "baseline": [],
        "avx2": ["-march=x86-64-v3"],
        "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    },
}
# What Linux calls what the kernels of each use; as `supported` in csrc/cpu/dispatch.cpp.
CPU_FLAGS = {"avx2": {"avx2", "fma", "bmi2"}}
CPU_FLAGS["avx512"] = {*CPU_FLAGS["avx2"], "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"}
COMMON_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Never -ffast-math: NaN and infinity must pass through. These two only say that nobody reads errno or traps.
KERNEL_FLAGS = ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions"]


def binding_flags(torch: Path) -> list[str]:
    """For what includes torch: the stable ABI of the oldest torch that is supported."""
    return [
        f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000",
        f"-isystem{torch}/include",
        f"-isystem{torch}/include/torch/csrc/api/include",
        # Messages name files, but not folders of this machine.
        f"-fmacro-prefix-map={torch.parent}/=",
    ]


class CannotBuild(Exception):
    """Why something cannot be built, in one line."""


class Unit(NamedTuple):
    """One object: <name>.o, compiled from the source with the flags beside the common ones."""

    source: str
    name: str
    flags: list[str]


class Compiler:
    """The C++ compiler: $CXX, or the first of g++, c++, clang++. Raises CannotBuild if there is none."""

    flags = COMMON_FLAGS
    needed = "g++ 12 or newer, or clang++,"
    shows_messages = True

    def __init__(self) -> None:
        candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
        found = [name for name in candidates if shutil.which(shlex.split(name)[0])]
        if not found:
            raise CannotBuild(f"no C++ compiler was found (looked for {', '.join(candidates)})")
        self.command = shlex.split(found[0])
        self.version = self._ask("--version")
        self.isas = ISA_FLAGS.get(self._ask("-dumpmachine").split("-")[0], {"baseline": []})

    def _ask(self, question: str) -> str:
        answer = subprocess.run([*self.command, question], capture_output=True, text=True)
        if answer.returncode != 0 or not answer.stdout.strip():
            raise CannotBuild(f"the C++ compiler {shlex.join(self.command)!r} does not answer {question}")
        return answer.stdout.splitlines()[0].strip()

    def run(self, arguments: list[str]) -> str:
        """What the compiler said, which nobody needs to read where all went well."""
        command = [*self.command, *arguments]
        if os.environ.get("MANN_FAST_VERBOSE") == "1":
            print(shlex.join(command), flush=True)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0 or self.shows_messages:
            sys.stderr.write(done.stderr)
        if done.returncode != 0:
            lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
            reason = next((line for line in lines if "error" in line), lines[-1])
            raise CannotBuild(f"{self.version} failed ({self.needed} is needed): {reason}")
        return done.stderr

    def kernel_units(self, isas: Iterable[str] | None = None) -> list[Unit]:
        """The kernels, once per instruction set, all or those named, and what chooses between them: all that needs no torch."""
        named = self.isas if isas is None else isas
        per_isa = [
            Unit(
                f"csrc/cpu/{kernel}.cpp",
                f"{kernel}_{isa}",
                [*KERNEL_FLAGS, *self.isas[isa], f"-DMANN_FAST_ISA={isa}"],
            )
            for kernel in KERNELS
            for isa in named
        ]
        have = [f"-DMANN_FAST_HAVE_{isa}" for isa in named]
        return [*per_isa, Unit("csrc/cpu/dispatch.cpp", "dispatch", [*KERNEL_FLAGS, *have])]

    def compile(self, units: list[Unit], folder: Path, more_flags: list[str] | None = None) -> list[Path]:
        """Compile what is not up to date, in parallel, into the folder; returns the objects.

        $MANN_FAST_OBJECTS names the folder of another build: an object there that was made of the same files by the same
        command is copied. So the wheel, which is built from an unpacked source distribution, compiles nothing anew.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(lambda unit: self._compile(unit, folder, more_flags or []), units))

    def _compile(self, unit: Unit, folder: Path, more_flags: list[str]) -> Path:
        target = folder / f"{unit.name}.o"
        # Nothing in the command or the object says where this tree lies: sources are named relative to it.
        arguments = [*self.flags, *unit.flags, *more_flags, "-c", unit.source]
        command = f"{self.version}\n{shlex.join(self.command + arguments)}"
        if _up_to_date(target, command):
            return target
        # Others may build in the same folder: files are replaced as a whole, and a stamp holds for one object only.
        with tempfile.TemporaryDirectory(dir=folder, prefix=f"{unit.name}-") as scratch:
            made = Path(scratch).absolute() / target.name
            others = os.environ.get("MANN_FAST_OBJECTS")
            if others and _copy(Path(others) / target.name, made) and _up_to_date(made, command):
                print(f"{unit.name}.o from {others}", flush=True)
            else:
                started = time.time()
                dependencies = made.with_suffix(".d")
                log = self.run([*arguments, "-MD", "-MF", str(dependencies), "-o", str(made)])
                print(f"{unit.name}.o from {unit.source}: {time.time() - started:.0f} seconds", flush=True)
                made.with_suffix(".log").write_text(log)
                _write_stamp(made, command, _files(dependencies), started)
            for suffix in KEPT:
                os.replace(made.with_suffix(suffix), target.with_suffix(suffix))
        return target

    def link(self, target: Path, objects: list[Path], arguments: list[str], folder: Path) -> None:
        """Make a shared library of objects, unless it is there, made by the same command and newer than all of them."""
        command = ["-shared", "-o", str(target.absolute()), *map(str, objects), *arguments]
        stamp = folder / f"{target.name}.stamp"
        made_by = f"{self.version}\n{shlex.join(self.command + command)}\n"
        if target.exists() and stamp.exists() and stamp.read_text() == made_by:
            if all(object_file.stat().st_mtime < target.stat().st_mtime for object_file in objects):
                return
        stamp.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.run(command)
        stamp.write_text(made_by)
        print(f"{target.name} is linked", flush=True)


def isas_here(known: Iterable[str]) -> list[str]:
    """Those that this processor has, the best last."""
    flags = re.search(r"(?m)^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text())
    here = set(flags.group(1).split()) if flags else set()
    return [isa for isa in known if CPU_FLAGS.get(isa, set()) <= here]


def chosen_isas(known: Iterable[str]) -> list[str]:
    """The instruction sets to build for, of those known: all, or with MANN_FAST_ISAS="baseline avx2" these, or with "native"
    the best of this processor, which takes a third of the time. Raises CannotBuild for others."""
    asked = os.environ.get("MANN_FAST_ISAS", "").replace(",", " ").split()
    if asked == ["native"]:
        asked = isas_here(known)[-1:]
    if unknown := [isa for isa in asked if isa not in known]:
        raise CannotBuild(f"MANN_FAST_ISAS must be native or some of {', '.join(known)}, got {unknown[0]!r}")
    return [isa for isa in known if not asked or isa in asked]


CUDA_ARCHITECTURES = ["80", "90", "100"]


def cuda_architectures() -> list[str]:
    """For which GPUs to build the CUDA kernels. Raises CannotBuild where that is for none.

    For those of this machine, or with MANN_FAST_CUDA=1 for the generations above; MANN_FAST_CUDA_ARCHS="90" names others, and
    MANN_FAST_CUDA=0 makes a build without CUDA. Compiling for one takes minutes, which are lost where there is no GPU.
    """
    asked, named = os.environ.get("MANN_FAST_CUDA", ""), os.environ.get("MANN_FAST_CUDA_ARCHS", "")
    if asked not in ("", "0", "1"):
        raise CannotBuild(f"MANN_FAST_CUDA must be 0 or 1, got {asked!r}")
    if asked == "0":
        raise CannotBuild("MANN_FAST_CUDA=0 asked for a build without CUDA")
    if named:
        return sorted(set(named.replace(",", " ").split()), key=int)
    if asked == "1":
        return CUDA_ARCHITECTURES
    oldest = CUDA_ARCHITECTURES[0]
    here = {architecture for architecture in _capabilities() if int(architecture) >= int(oldest)}
    if not here:
        raise CannotBuild(
            f"no NVIDIA GPU of sm_{oldest} or newer was found to build them for (MANN_FAST_CUDA=1 builds them all the same)"
        )
    return sorted(here, key=int)


def _capabilities() -> list[str]:
    """Of the GPUs of this machine, as their driver says: "90" for each of 9.0."""
    if not shutil.which("nvidia-smi"):
        return []
    question = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    answer = subprocess.run(question, capture_output=True, text=True)
    return ["".join(found) for found in re.findall(r"(?m)^(\d+)\.(\d)$", answer.stdout)]


class Nvcc(Compiler):
    """NVIDIA's compiler, for the CUDA kernels: $CUDACXX, or nvcc in $CUDA_HOME, the path or /usr/local/cuda.

    It compiles for the architectures given, and PTX for later ones; one that it does not know yet runs the PTX of its last.
    Raises CannotBuild if there is none or it is too old.
    """

    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Werror", "all-warnings", "-Xptxas", "-v",
             "--compress-mode=size", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-x", "cu"]  # fmt: skip
    needed = "CUDA 12.8 or newer"
    shows_messages = False  # of registers and shared memory, which scripts/cuda_report.py shows

    def __init__(self, architectures: list[str]) -> None:
        homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
        places = [f"{home}/bin/nvcc" for home in homes] + ["nvcc", "/usr/local/cuda/bin/nvcc"]
        found = [place for place in [os.environ.get("CUDACXX"), *places] if place and shutil.which(place)]
        if not found:
            raise CannotBuild("no nvcc was found, which compiles the CUDA kernels")
        self.command = [found[0]]
        answer = subprocess.run([*self.command, "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release (\d+)\.(\d+)", answer)
        self.version = (
            f"nvcc {release.group(1)}.{release.group(2)}" if release else "nvcc of an unknown release"
        )
        if release is None or (int(release.group(1)), int(release.group(2))) < (12, 8):
            raise CannotBuild(f"CUDA 12.8 or newer is needed, this is {self.version}")
        known = subprocess.run([*self.command, "--list-gpu-arch"], capture_output=True, text=True).stdout
        last = max(re.findall(r"compute_(\d+)", known), key=int, default=architectures[-1])
        self.architectures = sorted({min(name, last, key=int) for name in architectures}, key=int)

    def kernel_units(self) -> list[Unit]:
        last = self.architectures[-1]
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in self.architectures]
        codes.append(f"-gencode=arch=compute_{last},code=compute_{last}")
        return [Unit(f"csrc/cuda/{name}.cu", f"cuda_{name}", codes) for name in CUDA_KERNELS]


# Of each object: itself, what the compiler said, and what it was made of, by which command.
KEPT = (".o", ".log", ".stamp")


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _files(dependencies: Path) -> list[str]:
    """The source and the headers in the compiler's list of dependencies: relative to ROOT, or of the system."""
    return shlex.split(dependencies.read_text().replace("\\\n", " ").split(":", 1)[1])


def _write_stamp(target: Path, command: str, files: list[str], started: float) -> None:
    if any((ROOT / name).stat().st_mtime >= started for name in files):
        command = "a file changed meanwhile"  # and which content was compiled is not known
    stamp = {"command": command, "object": _digest(target), "files": {x: _digest(ROOT / x) for x in files}}
    target.with_suffix(".stamp").write_text(json.dumps(stamp, indent=1) + "\n")


def _up_to_date(target: Path, command: str) -> bool:
    """Whether the object was made by this command of files that have the same content now."""
    try:
        stamp = json.loads(target.with_suffix(".stamp").read_text())
        return (
            stamp["command"] == command
            and stamp["object"] == _digest(target)
            and all(_digest(ROOT / name) == digest for name, digest in stamp["files"].items())
        )
    except (OSError, ValueError):
        return False


def _copy(source: Path, target: Path) -> bool:
    try:
        for suffix in KEPT:
            shutil.copyfile(source.with_suffix(suffix), target.with_suffix(suffix))
    except OSError:
        return False
    return True
