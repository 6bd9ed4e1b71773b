"""Measuring a case: checked first, then timed in turn with the ceilings of the machine."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from . import ceilings
from .cases import OURS, Call, Case
from .timer import interleave

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-2, torch.bfloat16: 8e-2, torch.float16: 2e-2}


def environment() -> dict[str, Any]:
    """What the figures were measured with."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "mann_fast": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def _commit() -> str | None:
    """Of the git checkout that this package lies in, if it lies in one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    return done.stdout.strip() or None


def agrees(
    actual: tuple[Tensor, ...],
    expected: tuple[Tensor, ...],
    dtype: torch.dtype,
    most_of_axis: int | None = None,
) -> bool:
    """Whether every tensor is within a tolerance of the greatest number of what is expected; a contestant may give fewer.

    With ``most_of_axis``, the axis of the samples, more than half of them are enough: for a contestant that chooses another
    slot where usages tie but for rounding, which in a long sequence happens to a sample now and then.
    """
    for x, y in zip(actual, expected, strict=False):
        if x.shape != y.shape or not bool(x.isfinite().all()):
            return False
        if x.dtype == torch.int64:
            if not torch.equal(x, y):
                return False
            continue
        wrong = (x.double() - y.double()).abs() > TOLERANCE[dtype] * y.double().abs().max()
        if most_of_axis is not None:
            wrong = wrong.movedim(most_of_axis, 0).flatten(1).any(1).double().mean() >= 0.5
        if bool(wrong.any()):
            return False
    return True


def saved_bytes(call: Call) -> int:
    """Bytes of the tensors that autograd keeps between forward and backward of a call, each storage once."""
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    return sum(storages.values())


def measure(case: Case, *, seconds: float = 3.0, timed: bool = True) -> list[dict[str, Any]]:
    """A row for each contestant. One whose result is wrong is "unverified" and not timed; with ``timed`` False none is."""
    expected = case.oracle()
    verified, first_calls, memory = {}, {}, {}
    for name, call in case.calls.items():
        begin = time.perf_counter()
        actual = call()
        first_calls[name] = time.perf_counter() - begin
        axis = 1 if case.op == "lrua_scan" and name != OURS else None
        verified[name] = name == "nn.LSTM alone" or agrees(actual, expected, case.dtype, axis)
        of_torch = case.direction != "forward" and not name.startswith("JAX")
        memory[name] = saved_bytes(call) if of_torch else None
    timings: dict[str, Any] = {}
    limit, ceiling = None, None
    if timed:
        sgemm, sgemm_flop = ceilings.sgemm()
        copy, copy_bytes = ceilings.copy()
        contestants: dict[str, Callable] = {name: call for name, call in case.calls.items() if verified[name]}
        timings = interleave({**contestants, "sgemm": sgemm, "copy": copy}, seconds=seconds)
        least = {
            "sgemm": case.flop * timings["sgemm"].median / sgemm_flop,
            "copy": case.transferred * timings["copy"].median / copy_bytes,
        }
        ceiling = max(least, key=least.__getitem__)
        limit = least[ceiling]
    rows = []
    for name in case.calls:
        row = {
            "op": case.op,
            "direction": case.direction,
            "shape": str(case.shape),
            "dtype": str(case.dtype).removeprefix("torch."),
            "what": name,
            "verified": verified[name],
            "first_call_s": first_calls[name],
            "saved_bytes": memory[name],
        }
        if name in timings:
            t = timings[name]
            row |= {
                "median_ms": 1e3 * t.median,
                "quartiles_ms": [1e3 * t.low, 1e3 * t.high],
                "rounds": t.rounds,
                "sgemm_ms": 1e3 * timings["sgemm"].median,
                "times_mann_fast": t.median / timings[OURS].median if OURS in timings else None,
                "ceiling": ceiling,
                "share_of_ceiling": None if name == "nn.LSTM alone" else limit / t.median,
            }
        rows.append(row)
    return rows
