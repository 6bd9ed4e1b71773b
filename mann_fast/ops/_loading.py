"""Loading what the backends need, once and no sooner than a call could use it; and why one cannot serve."""

from __future__ import annotations

import importlib
import os
import threading
from pathlib import Path

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ._register import LIBRARIES

LIBRARIES["cuda"].define("probe(Tensor tensor) -> Tensor")

EXTENSION = Path(__file__).parent.parent / "_C.abi3.so"
CUDA_EXTENSION = EXTENSION.with_name("_C_cuda.abi3.so")
# For tests: the CUDA kernels compiled for a processor (scripts/emulate.py), which then serve CPU tensors.
EMULATION = os.environ.get("MANN_FAST_EMULATION")

# Of every backend that has been tried: None if it can be used, else why not.
_missing: dict[str, str | None] = {}
_loading = threading.Lock()


def missing(backend: str) -> str | None:
    """None if the kernels of this backend can be used, else why not. Loads them at the first call.

    Raises ValueError where MANN_FAST_CPU_ISA asks for C++ kernels that there are not.
    """
    if backend not in _missing:
        # The first call may come while something traces, which must not see the loading.
        with _loading, _disable_current_modes():
            if backend not in _missing:  # another thread may have been first
                load = {"cpp": _try_cpp, "cuda": _load_cuda, "triton": _load_triton}[backend]
                _missing[backend] = load()
    return _missing[backend]


# For torch.compile, which cannot trace an import: called while tracing, its result a constant. This is all that
# torch.compiler.assume_constant_result does, which would import Dynamo here.
missing._dynamo_marked_constant = True


def _load_library(name: str, path: Path) -> str | None:
    if not path.exists():
        return f"the {name} extension was not built (`mann-fast doctor` says why)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the {name} extension cannot be loaded: {error.__cause__ or error}"
    return None


def load_cpp() -> str | None:
    """The raw ops, without asking whether there are kernels for the instruction set that MANN_FAST_CPU_ISA names."""
    return _load_library("C++", EXTENSION)


def _try_cpp() -> str | None:
    reason = load_cpp()
    if reason is not None:
        return reason
    try:  # the kernels know whether there are any for this processor, and would say it at the first call
        torch.ops.mann_fast.least_used(torch.zeros(1, 1, dtype=torch.float32, device="cpu"), 1)
    except RuntimeError as error:
        _, name, said = str(error).splitlines()[0].partition("MANN_FAST_CPU_ISA")
        if not name:
            raise
        if forced := os.environ.get("MANN_FAST_CPU_ISA"):
            raise ValueError(f"{name}{said}; got {forced!r}") from None
        return "the C++ extension was built for other processors (MANN_FAST_ISAS): build it again"
    return None


def _load_triton() -> str | None:
    try:
        kernels = importlib.import_module("mann_fast.kernels")
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    kernels.register(LIBRARIES["triton"])
    return None


def _load_cuda() -> str | None:
    if EMULATION:
        return _load_library("emulated CUDA", Path(EMULATION))
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    return _load_library("CUDA", CUDA_EXTENSION) or _probe_cuda()


def _probe_cuda() -> str | None:
    """None if driver and current device can run the CUDA kernels, else why not."""
    try:
        torch.ops.mann_fast_cuda.probe(torch.empty(0, device="cuda"))
    except RuntimeError as error:
        return f"the CUDA kernels cannot run here: {str(error).splitlines()[0]}"
    return None
