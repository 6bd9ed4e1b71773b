"""Measuring a case: checked first, then timed in turn with the ceilings of the machine."""

from __future__ import annotations

import math
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
from .cases import AUTOCAST, BY_STEPS, EAGER, LSTM, OURS, Call, Case
from .memory import peak_bytes, saved_bytes
from .timer import Timing, interleave

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 8e-2, torch.float16: 2e-2}
STEP_TOLERANCE = (
    1e-2  # of a training step, whose gradients are sums over all samples, those with a tie included
)


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
    tolerance: float,
    most_of_axis: int | None = None,
) -> bool:
    """Whether every tensor is within a tolerance of the greatest number of what is expected; a contestant may give fewer.

    With ``most_of_axis``, the axis of the samples, more than half of them are enough: for a contestant that chooses another
    slot where usages tie but for rounding, which in a long sequence happens to a sample now and then.
    """
    if not expected:  # what was to be held against it failed itself
        return False
    for x, y in zip(actual, expected, strict=False):
        if x.shape != y.shape or not bool(x.isfinite().all()):
            return False
        if x.dtype == torch.int64:
            if not torch.equal(x, y):
                return False
            continue
        wrong = (x.double() - y.double()).abs() > tolerance * y.double().abs().max()
        if most_of_axis is not None:
            wrong = wrong.movedim(most_of_axis, 0).flatten(1).any(1).double().mean() >= 0.5
        if bool(wrong.any()):
            return False
    return True


def verify(case: Case) -> dict[str, dict[str, Any]]:
    """Of each contestant whether its result is right, and how long its first call took. Ours must agree with the oracle, what
    people would use instead with the eager reference; one that fails has a note."""
    tolerance = STEP_TOLERANCE if case.op == "mann_step" else TOLERANCE[case.dtype]
    axis = 1 if case.op == "lrua_scan" else None
    found: dict[str, dict[str, Any]] = {name: {"verified": False} for name in case.calls}
    eager: tuple[Tensor, ...] = ()
    for name in sorted(case.calls, key=lambda name: name != EAGER):
        begin = time.perf_counter()
        try:
            actual = case.calls[name]()
        except RuntimeError as error:  # such as one of torch.compile, or of a GPU whose memory is full
            found[name]["note"] = _first_line(error)
            continue
        found[name]["first_call_s"] = time.perf_counter() - begin
        if name == EAGER:
            eager = actual
        if name == OURS:
            found[name]["verified"] = agrees(actual, case.oracle(), tolerance)
        elif name == AUTOCAST:
            # The loss alone: rounding may decide which of two slots is the less used, and gradients follow the slots.
            found[name]["verified"] = agrees(actual[:1], eager[:1], TOLERANCE[torch.bfloat16])
        else:
            found[name]["verified"] = name == LSTM or agrees(actual, eager, tolerance, axis)
    return found


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def captured(call: Call) -> Callable[[], object]:
    """The replay of a CUDA graph of a call. RuntimeError for one that waits for the GPU, which no graph can hold."""
    torch.cuda.set_sync_debug_mode(
        "error"
    )  # to capture it would leave PyTorch's random numbers unusable (2.11)
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def host_seconds(call: Callable[[], object], calls: int = 20) -> float:
    """Of the processor, until a call has asked the GPU for everything; what the GPU does takes its own time."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    host = (time.perf_counter() - begin) / calls
    torch.cuda.synchronize()
    return host


def gpu_seconds(replay: Callable[[], object], least: float = 0.05) -> float:
    """Of the GPU alone, for a replay of a CUDA graph: by events around so many that they take at least so many seconds."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    replays, seconds = 3, 0.0
    while seconds < least:
        begin.record()
        for _ in range(replays):
            replay()
        end.record()
        torch.cuda.synchronize()
        seconds, done = begin.elapsed_time(end) / 1e3, replays
        replays = math.ceil(1.2 * replays * least / seconds)
    return seconds / done


def _time(
    case: Case, contestants: dict[str, Callable[[], object]], seconds: float, rounds: int
) -> tuple[dict[str, Timing], str, float]:
    """Timings, with those of the ceilings; which ceiling binds; and the seconds that it allows."""
    sgemm, sgemm_flop = ceilings.sgemm(case.device)
    copy, copy_bytes = ceilings.copy(case.device)
    finish = torch.cuda.synchronize if case.device.type == "cuda" else lambda: None
    timings = interleave(
        {**contestants, "sgemm": sgemm, "copy": copy}, seconds=seconds, rounds=rounds, finish=finish
    )
    least = {
        "sgemm": case.flop * timings["sgemm"].median / sgemm_flop,
        "copy": case.transferred * timings["copy"].median / copy_bytes,
    }
    ceiling = max(least, key=least.__getitem__)
    return timings, ceiling, least[ceiling]


def measure(
    case: Case, *, seconds: float = 3.0, rounds: int = 15, timed: bool = True, smaller: Case | None = None
) -> list[dict[str, Any]]:
    """A row for each contestant. One whose result is wrong is "unverified" and not timed; with ``timed`` False none is.

    seconds, rounds: of the timing, at least.
    smaller: the same with fewer samples, checked in its place where the reference of the whole would not fit.
    """
    found = verify(smaller or case)
    contestants: dict[str, Callable[[], object]] = {}
    for name, call in case.calls.items():
        if not found[name]["verified"]:
            continue
        try:
            if not name.startswith("JAX"):
                if case.direction != "forward":
                    found[name]["saved_bytes"] = saved_bytes(call)
                found[name]["peak_bytes"] = peak_bytes(call, case.device)
            contestants[name] = call
            if case.device.type == "cuda" and name in (OURS, BY_STEPS, EAGER, LSTM):
                graph = f"{name}, CUDA graph"
                found[graph] = {"verified": True}
                contestants[graph] = captured(call)
        except RuntimeError as error:
            found[graph if name in contestants else name]["note"] = _first_line(error)
    if timed and contestants:
        timings, ceiling, limit = _time(case, contestants, seconds, rounds)
        for name in contestants:
            t = timings[name]
            if case.device.type == "cuda":
                kind, apart = (
                    ("gpu_ms", gpu_seconds) if name.endswith(", CUDA graph") else ("host_ms", host_seconds)
                )
                found[name][kind] = 1e3 * apart(contestants[name])
            found[name] |= {
                "median_ms": 1e3 * t.median,
                "quartiles_ms": [1e3 * t.low, 1e3 * t.high],
                "rounds": t.rounds,
                "sgemm_ms": 1e3 * timings["sgemm"].median,
                "times_mann_fast": t.median / timings[OURS].median if OURS in timings else None,
                "ceiling": ceiling,
                "share_of_ceiling": None if name.startswith(LSTM) else limit / t.median,
            }
    identity = {
        "op": case.op,
        "direction": case.direction,
        "shape": str(case.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
    return [{**identity, "what": name, **row} for name, row in found.items()]
