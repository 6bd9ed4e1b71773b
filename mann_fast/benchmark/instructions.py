"""Instructions per call, counted by callgrind: unlike a time they repeat, on however busy a machine."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .base import ROOT
from .worker import CALLS

MARGIN = 0.03  # more than this is a regression
WITH = "made with"  # in a record, what the counts were made with; beside it, by shape and dtype, counts by op and direction


def count(tree: Path, requests: Sequence[dict[str, Any]]) -> list[int | str]:
    """For each request the instructions of one call of the kernels of a built tree, after first ones, on one thread,
    interpreter included: the fewest of several, without what a call does now and then. Or why it cannot be called there. Takes
    a minute, and for each call a thousand times its own time.

    requests: as of worker.py; of one backend. Callgrind knows no AVX-512: kernels run as on a processor with AVX2. Raises
    ValueError where valgrind is not installed, or the tree cannot be measured at all.
    """
    if shutil.which("valgrind") is None:
        raise ValueError("--instructions needs valgrind; on Debian: apt install valgrind")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                *("valgrind", "--tool=callgrind", "--quiet", "--collect-atstart=no", "--instr-atstart=no"),
                *(f"--callgrind-out-file={folder}/counted", sys.executable, str(Path(__file__).with_name("worker.py"))),
                *(str(tree), "instructions", json.dumps([{**request, "threads": 1} for request in requests])),
            ],
            env={**os.environ, "PYTHONHASHSEED": "0"}, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            words = done.stderr.strip().splitlines()
            raise ValueError(f"{tree.name} cannot be counted: {words[-1] if words else 'it ended'}")
        dumps = (Path(folder) / f"counted.{i}" for i in range(1, CALLS * len(requests) + 1))
        return [
            reason or min(_total(next(dumps)) for _ in range(CALLS)) for reason in json.loads(done.stdout)
        ]


def fewer_alone(
    requests: Sequence[dict[str, Any]], ours: list[int | str], base: Sequence[int | str]
) -> list[int | str]:
    """What was counted of these kernels, and where it is more than at a base by MARGIN counted once more without the other
    requests: these decide what lies where in memory, which changes a count by up to 3%. The lower one holds."""
    more = [
        i
        for i, (x, y) in enumerate(zip(ours, base, strict=True))
        if isinstance(x, int) and isinstance(y, int) and x > y * (1 + MARGIN)
    ]
    again = iter(count(ROOT, [requests[i] for i in more]) if more else ())
    return [min(x, next(again)) if i in more else x for i, x in enumerate(ours)]


def made_with() -> dict[str, str]:
    """What decides how many instructions the same sources take."""
    built = json.loads((ROOT / "mann_fast" / "_build_info.json").read_text(encoding="utf-8"))
    avx2 = "avx2" in built["isas"] and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return {
        "compiler": built["compiler"],
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "kernels": "avx2" if avx2 else built["isas"][0],
    }


def incomparable(record: Path) -> str | None:
    """Why counts made here could not be compared with those of a record; None where they can."""
    if shutil.which("valgrind") is None:
        return "valgrind is not installed"
    there, here = json.loads(record.read_text(encoding="utf-8"))[WITH], made_with()
    other = [f"{name} {there.get(name)}, here {here[name]}" for name in here if there.get(name) != here[name]]
    return f"{record.name} was made with {'; '.join(other)}" if other else None


def recorded(record: Path, requests: Sequence[dict[str, Any]]) -> list[int | str]:
    """For each request the instructions that a record has of it, or that it has none."""
    known = json.loads(record.read_text(encoding="utf-8"))
    return [known.get(_size(request), {}).get(name_of(request), "not recorded") for request in requests]


def record_of(requests: Sequence[dict[str, Any]], counted: Sequence[int]) -> dict[str, dict[str, Any]]:
    """A record of what was counted here."""
    record: dict[str, dict[str, Any]] = {WITH: made_with()}
    for request, instructions in zip(requests, counted, strict=True):
        record.setdefault(_size(request), {})[name_of(request)] = instructions
    return record


def name_of(request: dict[str, Any]) -> str:
    return f"{request['op']} {request['direction']}"


def _size(request: dict[str, Any]) -> str:
    return f"{request['shape']}, {request['dtype']}"


def _total(dump: Path) -> int:
    (total,) = re.findall(r"^totals: (\d+)$", dump.read_text(), re.MULTILINE)
    return int(total)
