"""Instructions per call, counted by callgrind: unlike a time they repeat, on however busy a machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .worker import CALLS

MARGIN = 0.03  # more than this is a regression


def count(tree: Path, requests: Sequence[dict[str, Any]]) -> list[int | str]:
    """For each request the instructions of one call of the kernels of a built tree, after first ones, on one thread,
    interpreter included; or why it cannot be called there. Takes a minute, and for each call a thousand times its own time.

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
        dumps = (Path(folder) / f"counted.{i}" for i in range(1, len(requests) + 1))
        return [reason or _total(next(dumps)) // CALLS for reason in json.loads(done.stdout)]


def _total(dump: Path) -> int:
    (total,) = re.findall(r"^totals: (\d+)$", dump.read_text(), re.MULTILINE)
    return int(total)
