"""Which backend serves a call, and loading the compiled extension."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

NAMES = ("auto", "cpp", "reference")

# Schemas and fake rules stand beside the public functions (ops/*.py); the extension only implements them.
LIBRARY = torch.library.Library("mann_fast", "DEF")

EXTENSION = Path(__file__).parent.parent / "_C.abi3.so"


def _load_extension() -> str | None:
    """Load the extension; None if it can be used, else why not."""
    if not EXTENSION.exists():
        return "the C++ extension was not built (`mann-fast doctor` says why)"
    try:
        torch.ops.load_library(str(EXTENSION))
    except OSError as error:
        return f"the C++ extension cannot be loaded: {error}"
    return None


_extension_missing: str | None = "the C++ extension has not been loaded yet"
_selected: str | None = None  # None: MANN_FAST_BACKEND has not been read yet
_said: set[str] = set()


def load() -> None:
    """Called once, by mann_fast.ops, when all schemas are defined."""
    global _extension_missing
    _extension_missing = _load_extension()


def _check_name(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, NAMES))}, got {name!r}")
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Use one backend for the ops called inside the ``with`` block.

    name: ``"auto"`` (the fastest that can serve a call, the default), ``"cpp"`` (fused C++ kernels, CPU tensors) or
    ``"reference"`` (plain PyTorch, any device). A named backend that cannot serve a call raises RuntimeError; ``"auto"``
    falls back to the reference. Backward always runs on the backend that forward used. The choice is one global of the
    process and holds for all threads. The environment variable MANN_FAST_BACKEND sets it at the first op.

    Raises ValueError for an unknown name.
    """
    global _selected
    _check_name(name, "backend")
    previous = _selected
    _selected = name
    try:
        yield
    finally:
        _selected = previous


def backends() -> dict[str, str | None]:
    """Every backend by name: None if it can run here, else the reason why it cannot."""
    return {"cpp": _extension_missing, "reference": None}


def _say_once(message: str) -> None:
    if message not in _said and not torch.compiler.is_compiling():
        _said.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def serving(device: torch.device) -> str:
    """The backend that serves a call on tensors of this device: "cpp" or "reference"."""
    global _selected
    if _selected is None:
        _selected = _check_name(os.environ.get("MANN_FAST_BACKEND", "auto"), "MANN_FAST_BACKEND")
    if _selected == "reference":
        return "reference"
    if device.type in ("cpu", "meta") and _extension_missing is None:
        return "cpp"
    if device.type == "cpu":
        reason = _extension_missing
    else:
        reason = f"tensors on {device.type} have no fused kernels in this version"
    if _selected == "cpp":
        raise RuntimeError(f"backend 'cpp' cannot serve this call: {reason}")
    _say_once(f"mann_fast runs on its plain-PyTorch reference: {reason}")
    return "reference"
