"""The project's own ops on CPU tensors, with every launch of a kernel handed to Python: no code per op.

The bindings and the host part of csrc/cuda are compiled with emulation.h of this folder in the place of CUDA. What they
launch is known by the name of its kernel, its shape and the bytes of its parameters; pointers are the tensors' own.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from build_backend import find_torch
from native import CUDA_KERNELS, ROOT, CannotBuild, Compiler, Unit, binding_flags

FOLDER = ROOT / "build" / "gpu_model"
FLAGS = ["-DMANN_FAST_EMULATION", "-Iscripts/gpu_model", "-Wno-unknown-pragmas"]


class Launch(NamedTuple):
    kernel: str  # as plain_name has it
    unit: str  # of csrc/cuda/, that has the kernel
    blocks: int
    threads: int
    cluster: int
    shared: int  # bytes that it asked for
    parameters: bytes


class _Recorded(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("blocks", "threads", "cluster", "shared")),
        ("parameters", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
    ]


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_Recorded))


def plain_name(demangled: str) -> str:
    """A kernel's name and template arguments, the same from every compiler."""
    name = demangled.replace("(anonymous namespace)::", "").removeprefix("void ")
    return re.sub(r"\((bool|int)\)", "", name).split("(")[0].replace("mann_fast::cuda::", "").strip()


def demangle(names: list[str]) -> list[str]:
    try:
        done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise CannotBuild("no c++filt was found, which tells the names of kernels") from None
    return done.stdout.splitlines()


def _symbols(file: Path) -> dict[str, int]:
    """Functions of an object or library: mangled name and address."""
    done = subprocess.run(["nm", str(file)], capture_output=True, text=True, check=True)
    return {name: int(at, 16) for at, name in re.findall(r"(?m)^(\w+) [tTwW] (\w*_kernel\w*)$", done.stdout)}


class Recorder:
    """The library, built where it is not up to date; once it is loaded, launches go to `on_launch`."""

    def __init__(self) -> None:
        compiler, torch = Compiler(), find_torch()
        if torch is None:
            raise CannotBuild("no torch was found to build with")
        kernels = [Unit(f"csrc/cuda/{name}.cu", name, [*FLAGS, "-x", "c++"]) for name in CUDA_KERNELS]
        bindings = Unit("csrc/cuda/bindings.cpp", "bindings", [*FLAGS, *binding_flags(torch)])
        objects = compiler.compile([*kernels, bindings], FOLDER / "host", ["-O0"])
        self.library = FOLDER / "recording.so"
        compiler.link(self.library, objects, ["-lstdc++", f"-L{torch}/lib", "-ltorch_cpu"], FOLDER)
        self._names: dict[int, tuple[str, str]] = {}
        units = {name: file.stem for file in objects for name in _symbols(file)}
        found = _symbols(self.library)
        for (name, at), plain in zip(found.items(), demangle(list(found)), strict=True):
            self._names[at] = plain_name(plain), units[name]
        self._base = 0
        self.failure: Exception | None = None

    def load(self, on_launch: Callable[[Launch], None]) -> None:
        """Before mann_fast is imported, which then serves CPU tensors with backend "cuda"."""
        os.environ["MANN_FAST_EMULATION"] = str(self.library)
        import torch

        torch.ops.load_library(str(self.library))
        maps = Path("/proc/self/maps").read_text()
        self._base = int(re.search(rf"(?m)^(\w+)-.* {re.escape(str(self.library))}$", maps)[1], 16)

        def called(recorded: ctypes._Pointer) -> int | None:
            r = recorded.contents
            name, unit = self._names[r.kernel - self._base]
            parameters = ctypes.string_at(r.parameters, r.bytes)
            try:
                on_launch(Launch(name, unit, r.blocks, r.threads, r.cluster, r.shared, parameters))
            except Exception as problem:  # ctypes would only print it
                self.failure, self._said = problem, ctypes.create_string_buffer(str(problem).encode())
                return ctypes.addressof(self._said)
            return None

        self._callback = _CALLBACK(called)
        ctypes.CDLL(str(self.library)).mann_fast_on_launch(self._callback)
